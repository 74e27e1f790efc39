"A folder of photographs: what lies in it, who is found, what does not fit, and that a run takes the result."

import json
import os
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import in_process
from PIL import Image
from pycocotools import mask as rle
from torch import nn

from masked_ldm.data.images import read_row
from masked_ldm.data.inspection import check_manifest, kept_by_crop, shared_pictures
from masked_ldm.data.manifest import load_manifest
from masked_ldm.data.photographs import (
    MaskRCNN,
    build_photographs,
    find_people,
    image_number,
    list_photographs,
    load_segmenter,
    split_of,
)


class Whites(nn.Module):
    "Takes every bright pixel for one person, and remembers what it saw."

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, image):
        self.seen.append(image.size)
        bright = torch.from_numpy(np.array(image.convert("L"))) > 128
        return bright[None].float() if bright.any() else torch.zeros(0, *bright.shape)


class Nobody(nn.Module):
    "May not be asked."

    def forward(self, image):
        raise AssertionError("the network was asked")


def picture(w=60, h=40, box=(6, 4, 30, 36)):
    "Black, with a white person."
    image = Image.new("RGB", (w, h))
    image.paste("white", box)
    return image


@pytest.fixture
def album(tmp_path):
    "A dozen photographs with captions; which are held out is known."
    folder = tmp_path / "album"
    folder.mkdir()
    for k in range(12):
        picture().save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"somebody, number {k}\n", "utf-8")
    return folder


def build(folder, split="train", segmenter=None, **settings):
    "(rows by the name of their file, manifest.json)."
    given = dict(faces="none", val_share=0.3) | settings
    path = build_photographs(folder, split, segmenter=segmenter or Whites(), **given)
    rows, info = load_manifest(path)
    assert info["kept"] + sum(info["dropped"].values()) == info["pictures"]
    assert check_manifest(path) == [] and rows
    return {Path(row["file_name"]).name: row for row in rows}, info


def both(folder, **settings):
    "Rows of both splits, and {reason: pictures dropped}."
    train, info = build(folder, **settings)
    val, of_val = build(folder, "val", **settings)
    dropped = {k: info["dropped"].get(k, 0) for k in info["dropped"]}
    for reason, number in of_val["dropped"].items():
        dropped[reason] = dropped.get(reason, 0) + number
    return train | val, dropped


def test_pictures_that_are_added_move_none(album):
    before = {split: set(build(album, split)[0]) for split in ("train", "val")}
    assert before["train"] | before["val"] == {f"{k}.png" for k in range(12)}
    for k in range(12, 40):
        picture().save(album / f"{k}.png")
        (album / f"{k}.txt").write_text("somebody", "utf-8")
    after = {split: set(build(album, split)[0]) for split in ("train", "val")}
    assert all(before[split] < after[split] for split in before)
    paths = {split: album / "people" / split / "metadata.jsonl" for split in before}
    assert shared_pictures(paths) == []


def test_a_split_goes_by_the_name_alone():
    names = [f"{k}.jpg" for k in range(2000)]
    assert all(split_of(n, 0.1) == "train" or split_of(n, 0.4) == "val" for n in names)
    assert image_number("a.jpg") == image_number("a.png") != image_number("b/a.png")
    assert max(map(image_number, names)) < 2**52


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(60, 40), (50, 50)], ids=["wide", "square"])
@pytest.mark.parametrize("own", [False, True], ids=["network", "own"])
def test_masks_lie_on_upright_pictures(orientation, size, own, album):
    "Whatever way a camera stores a picture; a mask of one's own is of what an editor shows."
    from PIL import ImageOps

    stored = picture(*size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for old in album.glob("0.*"):
        old.unlink()
    stored.save(album / "0.jpg", exif=exif, quality=95)
    (album / "0.txt").write_text("somebody", "utf-8")
    upright = ImageOps.exif_transpose(Image.open(album / "0.jpg")).convert("L")
    if own:
        upright.point(lambda v: 255 * (v > 128)).save(album / "0.mask.png")
    rows, _ = build(album, split_of("0.jpg", 0.3))
    row = rows["0.jpg"]
    out = album / "people" / split_of("0.jpg", 0.3)
    shown = np.array(read_row(row, out).convert("L")) > 128
    mask = rle.decode(row["people"][0]["segmentation"]).astype(bool)
    assert mask.shape == shown.shape and (mask == shown).mean() > 0.99
    assert (shown == (np.array(upright) > 128)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16", "CMYK", "LA"])
def test_pictures_of_any_mode(mode, album):
    name = "0.tif" if mode == "CMYK" else "0.png"
    (album / "0.png").unlink()
    if mode == "I;16":
        Image.fromarray(np.array(picture().convert("L")).astype(np.uint16) * 257).save(album / name)
    else:
        picture().convert(mode).save(album / name)
    rows, _ = build(album, split_of(name, 0.3))
    assert rows[name]["people"][0]["area"] == 24 * 32


def test_captions_in_every_form(album):
    (album / "0.txt").write_bytes("\ufeffa  woman \r\n\r\nZoë\n".encode())
    (album / "1.txt").unlink()
    (album / "2.txt").unlink()
    lines = [
        dict(file_name="1.png", text="by text"),
        dict(file_name="./2.png", caption=["first", "second"]),
        dict(file_name="3.png", text="one more"),
        dict(file_name="4.png", width=60),
    ]
    (album / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", "utf-8")
    (album / "more").mkdir()
    picture().save(album / "more" / "5.png")
    row = dict(file_name="5.png", text="in a folder")
    (album / "more" / "metadata.jsonl").write_text(json.dumps(row), "utf-8")
    captions = {p.name: p.captions for p in list_photographs(album)[0]}
    assert captions["0.png"] == ["a woman", "Zoë"]
    assert captions["1.png"] == ["by text"] and captions["2.png"] == ["first", "second"]
    assert captions["3.png"] == ["somebody, number 3", "one more"]
    assert captions["4.png"] == ["somebody, number 4"]
    assert captions["more/5.png"] == ["in a folder"]


def test_missing_captions_are_an_error_or_skipped_or_empty(album):
    (album / "3.txt").unlink()
    (album / "4.txt").write_text("  \n", "utf-8")
    with pytest.raises(ValueError, match="2 of 12 photographs have no caption, the first is 3.png"):
        build(album)
    rows, dropped = both(album, no_caption="skip")
    assert len(rows) == 10 and dropped == {"no caption": 2}
    for settings in (dict(no_caption="empty"), dict(need_caption=False)):
        rows, dropped = both(album, **settings)
        assert rows["3.png"]["captions"] == rows["4.png"]["captions"] == [""] and not dropped


SPOILT = [
    (lambda p: p.write_bytes(p.read_bytes()[:90]), "truncated or damaged"),
    (lambda p: p.write_bytes(b""), "is empty"),
    (lambda p: p.write_text("<html>"), "is a web page"),
    (lambda p: p.unlink(), "is missing"),
]


@pytest.mark.parametrize("spoil, said", SPOILT)
@pytest.mark.parametrize("own", [False, True])
def test_a_damaged_picture_is_named_and_counted(spoil, said, own, album):
    if own:
        picture().save(album / "0.mask.png")
    if said == "is missing":  # but listed
        row = dict(file_name="0.png", text="gone")
        (album / "metadata.jsonl").write_text(json.dumps(row), "utf-8")
    spoil(album / "0.png")
    split = split_of("0.png", 0.3)
    with pytest.raises(ValueError, match=f"0.png .image {image_number('0.png')}. .*{said}"):
        build(album, split)
    rows, info = build(album, split, max_bad=0.5)
    (bad,) = info["quarantined"]
    assert bad["file"] == "0.png" and said in bad["reason"] and "0.png" not in rows
    assert info["dropped"] == {"picture quarantined": 1}


def test_huge_pictures_are_refused_and_large_ones_seen_small(album, monkeypatch):
    from masked_ldm.data import images

    picture(4000, 2500, (400, 300, 2000, 2400)).save(album / "0.png")
    whites = Whites()
    rows, _ = build(album, split_of("0.png", 0.3), whites)
    mask = rle.decode(rows["0.png"]["people"][0]["segmentation"])
    assert (1333, 833) in whites.seen and max(max(size) for size in whites.seen) == 1333
    assert mask.shape == (2500, 4000) and abs(mask.sum() / (1600 * 2100) - 1) < 0.01
    monkeypatch.setattr(images, "MAX_PIXELS", 9_000_000)
    shutil.rmtree(album / "people")
    _, info = build(album, split_of("0.png", 0.3), max_bad=0.5)
    assert "has 4000 x 2500 pixels, more than" in info["quarantined"][0]["reason"]


def test_pictures_without_people_are_counted(album):
    Image.new("RGB", (60, 40)).save(album / "0.png")
    picture(box=(0, 0, 3, 3)).save(album / "1.png")
    rows, dropped = both(album)
    assert len(rows) == 10 and dropped == {"no person": 1, "people below min_area": 1}


OWN = [
    (Image.new("L", (40, 60), 255), "has a mask of (40, 60), its upright picture is (60, 40)"),
    (Image.new("L", (60, 40), 1), "has a mask whose brightest pixel is 1: people are white, 255"),
    (Image.new("LA", (60, 40), (255, 0)), "has a mask with transparency"),
    (None, "has a mask that is not JPEG"),
]


@pytest.mark.parametrize("mask, said", OWN, ids=["size", "ones", "clear", "damaged"])
def test_a_mask_that_cannot_be_is_a_picture_that_cannot(mask, said, album):
    if mask is None:
        (album / "0.mask.png").write_bytes(b"no picture")
    else:
        mask.save(album / "0.mask.png")
    split = split_of("0.png", 0.3)
    with pytest.raises(ValueError) as e:
        build(album, split)
    assert "0.png (image" in str(e.value) and said in str(e.value)
    rows, info = build(album, split, max_bad=0.5)
    (bad,) = info["quarantined"]
    assert said in bad["reason"] and bad["file"] == "0.png" and "0.png" not in rows


def test_own_masks_are_taken_instead_of_the_network(album):
    half = Image.new("1", (60, 40))
    half.paste(1, (0, 0, 30, 40))
    (album / "masks").mkdir()
    for k in range(12):
        half.save(album / (f"{k}.mask.png" if k % 2 else f"masks/{k}.{'jpg' if k == 4 else 'png'}"))
    Image.new("L", (60, 40)).save(album / "5.mask.png")  # nobody is there
    train, info = build(album, "train", Nobody())
    val, of_val = build(album, "val", Nobody())
    assert {row["area_fraction"] for row in (train | val).values()} == {0.5}
    assert info["masks"]["own"] + of_val["masks"]["own"] == 12 and len(train | val) == 11
    assert "5.png" not in train | val and not list(album.rglob(".masks/*.json"))
    assert info["warnings"] == []


def test_what_was_found_is_kept_until_the_picture_changes(album):
    build(album)
    names = [f"{k}.png" for k in range(12) if split_of(f"{k}.png", 0.3) == "train"]
    again = Whites()
    before, _ = build(album, segmenter=again)
    assert again.seen == []
    picture(70, 50).save(album / names[0])
    kept = album / "people" / "train" / ".masks"
    (kept / f"{image_number(names[1])}.json").write_text("{")
    after, _ = build(album, segmenter=again)
    assert again.seen in ([(70, 50), (60, 40)], [(60, 40), (70, 50)])
    assert after[names[0]]["width"] == 70 and after[names[1]] == before[names[1]]
    build(album, segmenter=again, person_score=0.5)
    assert len(again.seen) == 2 + len(names)


def test_a_split_of_ones_own(album):
    (album / "train").mkdir()
    (album / "validation").mkdir()
    for k in range(11):
        for kind in ("png", "txt"):
            target = album / ("train" if k % 3 else "validation") / f"{k}.{kind}"
            shutil.move(album / f"{k}.{kind}", target)
    train, info = build(album)
    val, _ = build(album, "val")
    assert set(train) == {f"{k}.png" for k in range(11) if k % 3}
    assert set(val) == {f"{k}.png" for k in range(11) if not k % 3}
    assert "1 picture(s) lie in neither train/ nor val/" in info["warnings"][0]
    out = album / "train" / "people"
    build_photographs(album / "train", "val", out, Whites(), faces="none", val_share=0.5)
    assert set(build(album)[0]) == set(train)  # manifests among pictures are passed over


def test_what_belongs_to_nothing_is_counted(album):
    for name in ("lost.txt", "film.mov", "phone.heic", "other.HEIC", "lost.mask.png"):
        (album / name).write_bytes(b"")
    (album / ".hidden").mkdir()
    picture().save(album / ".hidden" / "x.png")
    (album / ".DS_Store").write_bytes(b"")
    listed, said = list_photographs(album)
    assert len(listed) == 12 and said == [
        "1 text file(s) belong to no picture, the first is lost.txt",
        "1 mask(s) belong to no picture, the first is lost.mask.png",
        "3 file(s) are of a kind that is not read: 2 .heic, 1 .mov",
    ]


def _metadata(line):
    return lambda album: (album / "metadata.jsonl").write_text("\n" + line, "utf-8")


WRONG = {
    "twice": (lambda album: picture().save(album / "3.jpg"), "3.jpg and 3.png have the same name"),
    "latin": (lambda album: (album / "3.txt").write_bytes(b"Zo\xeb"), "3.txt is not UTF-8 text"),
    "json": (_metadata("{"), "metadata.jsonl, line 2, is no row with a file_name"),
    "number": (_metadata('{"file_name": "3.png", "text": 3}'), "line 2, is no row"),
    "nameless": (_metadata('{"text": "somebody"}'), "line 2, is no row"),
    "list": (_metadata("[]"), "line 2, is no row"),
    "outside": (_metadata('{"file_name": "../x.png", "text": "x"}'), "../x.png is outside"),
    "one side": (lambda album: shutil.copytree(album, album / "train"), "make both train/ and"),
}


@pytest.mark.parametrize("change, said", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_one_sentence(change, said, album):
    change(album)
    with pytest.raises(ValueError) as error:
        build(album)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(val_share=0), "val_share must be"),
        (dict(val_share=1e-9), "none of 12 pictures falls to val at val_share=1e-09"),
        (dict(no_caption="maybe"), "no_caption must be one of error, skip, empty"),
        (dict(person_score=2), "person_score must be 0 to 1"),
        (dict(val_shar=0.2), "did you mean 'val_share'?"),
        (dict(licenses=[4]), "licenses: '4' is none of this data set's: 0 = unknown"),
        (dict(faces="keypoints"), "needs a joint"),
        (dict(min_area=1.0), "is left after filtering"),
    ],
)
def test_settings_that_cannot_be(given, said, album):
    with pytest.raises(ValueError) as error:
        build(album, **given)
    assert said in str(error.value)


def test_a_manifest_goes_beside_no_picture(album, tmp_path):
    (album / "sub").mkdir()
    (album / "sub" / "metadata.jsonl").write_text("", "utf-8")
    for out in (album, album / "sub"):
        with pytest.raises(ValueError, match="is a folder of pictures"):
            build_photographs(album, "train", out, Whites())
    (album / "sub" / "metadata.jsonl").unlink()
    for _ in range(2):  # what `inspect` draws beside a manifest is no picture of the folder
        build_photographs(album, "train", album / "sub", Whites(), faces="none", val_share=0.3)
        picture().save(album / "sub" / "contact-sheet-train.png")
    (album / "people").mkdir()
    picture().save(album / "people" / "12.png")  # a folder of that name is taken
    (album / "people" / "12.txt").write_text("somebody", "utf-8")
    with pytest.raises(ValueError, match="people is a folder of pictures"):
        build_photographs(album, "train", segmenter=Whites())
    with pytest.raises(FileNotFoundError, match="has no pictures, or is a COCO"):
        build_photographs(tmp_path / "nowhere")


# Networks


def torchvision_network():
    "torchvision's Mask R-CNN without its weights, small pictures, certain that all is a person."
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    network = maskrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=8,
        box_detections_per_img=3,
    )
    nn.init.zeros_(network.roi_heads.box_predictor.cls_score.weight)
    nn.init.zeros_(network.roi_heads.box_predictor.cls_score.bias)
    network.roi_heads.box_predictor.cls_score.bias.data[1] = 9.0
    nn.init.constant_(network.roi_heads.mask_predictor.mask_fcn_logits.bias, 3.0)
    return network


def test_torchvisions_network_finds_people(album):
    torch.manual_seed(0)
    network = torchvision_network().train()
    finder = MaskRCNN(network, least=0.7)
    maps = finder(picture(90, 60))
    assert maps.shape[1:] == (60, 90) and 0 < len(maps) <= 3 and 0 <= maps.min() <= maps.max() <= 1
    assert network.training and all(p.requires_grad for p in network.parameters())  # as it was
    assert not maps.requires_grad
    assert find_people(picture(90, 60), finder)[0]["size"] == [60, 90]
    assert len(MaskRCNN(network, least=1.0)(picture(90, 60))) == 0
    network.roi_heads.box_predictor.cls_score.bias.data[1:3] = torch.tensor([0.0, 9.0])  # bicycles
    assert len(finder(picture(90, 60))) == 0


def test_a_mask2former_from_a_folder(tmp_path):
    "transformers' own class, small and of random weights, by the same `from_pretrained`."
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        encoder_feedforward_dim=16,
        decoder_layers=2,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=4,
        id2label={0: "person", 1: "bicycle"},
    )
    network = Mask2FormerForUniversalSegmentation(config)
    for label, found in ((0, True), (1, False)):
        nn.init.zeros_(network.class_predictor.weight)
        network.class_predictor.bias.data[:] = torch.tensor([-9.0, -9.0, -9.0])
        network.class_predictor.bias.data[label] = 9.0
        network.save_pretrained(tmp_path / "small")
        processor = Mask2FormerImageProcessor(size=dict(height=64, width=64), size_divisor=0)
        processor.save_pretrained(tmp_path / "small")
        finder = load_segmenter(str(tmp_path / "small"), least=0.1, device="cpu")
        maps = finder(picture(90, 60))
        assert maps.shape[1:] == (60, 90) and bool(len(maps)) == found
    network.config.id2label = {0: "cat", 1: "dog"}
    network.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="knows no 'person'"):
        load_segmenter(str(tmp_path / "small"), device="cpu")


def test_weights_that_are_not_there_are_named(album, monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    name = "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"
    kept = tmp_path / "hub" / "checkpoints" / name
    with pytest.raises(FileNotFoundError) as error:
        build_photographs(album, "train", faces="none", val_share=0.3, device="cpu")
    said = str(error.value)
    assert f"Mask R-CNN needs the weights {kept}, which are not there" in said, said
    assert f"put https://download.pytorch.org/models/{name} there" in said and "\n" not in said
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=f"{name}, the weights of Mask R-CNN, is damaged"):
        load_segmenter(device="cpu")
    with pytest.raises(FileNotFoundError, match="Mask2Former needs the weights"):
        load_segmenter(str(tmp_path / "no" / "such"), device="cpu")


def test_a_segmenter_of_another_size_is_refused():
    with pytest.raises(ValueError, match="maps of .2, 8, 8., expected .people, 40, 60."):
        find_people(picture(), lambda image: torch.ones(2, 8, 8))


# What comes after


def masked_album(folder, n=10):
    "A folder of drawings with masks of their own, square, wide and tall."
    from masked_ldm.toy.scenes import captions, render, sample_scene

    folder.mkdir()
    for k in range(n):
        drawing = render(sample_scene(0, k), 96)
        box = ((0, 0, 96, 96), (0, 0, 96, 72), (12, 0, 84, 96))[k % 3]
        drawing.image.crop(box).save(folder / f"{k}.png")
        mask = Image.fromarray(drawing.masks().any(0)).crop(box)
        mask.save(folder / f"{k}.mask.png")
        (folder / f"{k}.txt").write_text("\n".join(captions(drawing.scene)), "utf-8")
    return folder


def test_from_a_folder_to_a_step_by_commands(tmp_path):
    from masked_ldm import train
    from masked_ldm.data import command
    from masked_ldm.data.dataset import PersonDataset

    folder = masked_album(tmp_path / "photos")
    people, cache = tmp_path / "people", tmp_path / "cache"
    how = ("--out", people, "--val_share", "0.3", "--min_area", "0.02")
    for line, said in (
        (("build", folder, *how), f"masked-ldm-train --data_root {people}"),
        (("check", people), "thing(s) wrong"),
        (("inspect", people, "--n", "4", "--side", "64"), "kept by a square crop:"),
        (("cache", people, "--cache_dir", cache), "shard(s) were made"),
    ):
        code, text = in_process(command.main, *line)
        assert code == 0 and said in text, text
    assert (people / "contact-sheet-train.png").is_file()
    settings = dict(max_steps=1, batch_size=2, val_pictures=0, sample_steps=1, report_to="none")
    settings |= dict(
        cache_latents=True, cache_dir=cache, out_dir=tmp_path / "run", data_root=people
    )
    given = [word for name, value in settings.items() for word in (f"--{name}", value)]
    code, text = in_process(train.main, *given)
    assert code == 0, text
    sample = PersonDataset(people / "train" / "metadata.jsonl", 64)[0]
    assert sample["joints"].shape == (1, 17, 3) and not sample["joints"].any()
    assert sample["mask"].max() == 1 and sample["people"].shape == (1, 64, 64)


def test_the_command_knows_which_folder_it_is_given(tmp_path, album):
    from masked_ldm.data import command

    code, text = in_process(command.main, "build", album, "--no_caption", "maybe")
    assert code == 2 and "no_caption must be one of" in text
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    picture().save(tmp_path / "coco" / "a.png")
    code, text = in_process(command.main, "build", tmp_path / "coco")
    assert code == 1 and "a COCO 2017 root has" in text
    code, text = in_process(command.main, "build", tmp_path / "coco", "--val_share", "0.2")
    assert code == 1 and "are for a folder of photographs" in text
    code, text = in_process(command.main, "build", tmp_path / "albun")
    assert code == 1 and "albun is no folder" in text
    code, text = in_process(command.main, "build", album, "--out", album)
    assert code == 1 and "is a folder of pictures" in text and not (album / "train").exists()


@pytest.mark.parametrize("asked", ["maskrcnn", "facebook/mask2former-swin-small-coco-instance"])
def test_the_command_asks_the_network_that_is_named(asked, album, tmp_path, monkeypatch):
    from masked_ldm.data import command

    names = []

    def loaded(name, *_):
        names.append(name)
        return Whites()

    monkeypatch.setattr("masked_ldm.data.photographs.load_segmenter", loaded)
    flags = [] if asked == "maskrcnn" else ["--segmenter", asked]
    how = ("--out", tmp_path / "people", "--faces", "none", "--val_share", "0.3")
    code, text = in_process(command.main, "build", album, *how, *flags)
    assert code == 0 and set(names) == {asked}, text


def test_what_was_dropped_is_named(album):
    Image.new("RGB", (60, 40)).save(album / "0.png")
    (album / "1.txt").write_text("", "utf-8")
    dropped = {}
    for split in ("train", "val"):
        dropped |= build(album, split, no_caption="skip")[1]["dropped_files"]
    assert dropped == {"0.png": "no person", "1.png": "no caption"}


def test_what_a_crop_keeps():
    mask = np.zeros((100, 40), np.uint8, order="F")
    mask[:20] = 1
    tall = dict(width=40, height=100, faces=[dict(box=[10, 5, 20, 15])])
    tall["people"] = [dict(iscrowd=0, segmentation=rle.encode(mask))]
    assert kept_by_crop([tall]) == dict(center=(0.0, 0.0), people=(1.0, 1.0))
    large = dict(width=2400, height=6000, faces=[dict(box=[600, 300, 1200, 900])])
    whole = np.asfortranarray(np.kron(mask, np.ones((60, 60), np.uint8)))
    large["people"] = [dict(iscrowd=0, segmentation=rle.encode(whole))]
    assert kept_by_crop([large]) == kept_by_crop([tall])


COCO_ROOT = os.environ.get("MASKED_LDM_COCO")


@pytest.mark.skipif(not COCO_ROOT, reason="MASKED_LDM_COCO names no COCO root")
def test_photographs_give_what_coco_gives(tmp_path):
    "COCO's photographs in a folder, COCO's masks as one's own: the same areas, captions and faces."
    from masked_ldm.data.faces import people_mask
    from masked_ldm.data.manifest import build_manifest

    given = dict(faces="mtcnn", device="cpu", on_person=0.5)
    rows, _ = load_manifest(build_manifest(COCO_ROOT, "train", tmp_path / "coco", **given))
    rows = rows[:6]
    for row in rows:
        source = (tmp_path / "coco" / row["file_name"]).resolve()
        target = tmp_path / "photos" / "train" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        Image.fromarray(255 * people_mask(row)).save(target.with_suffix(".mask.png"))
        target.with_suffix(".txt").write_text("\n".join(row["captions"]), "utf-8")
    (tmp_path / "photos" / "val").mkdir()
    picture().save(tmp_path / "photos" / "val" / "x.png")
    (tmp_path / "photos" / "val" / "x.txt").write_text("somebody", "utf-8")
    path = build_photographs(tmp_path / "photos", "train", segmenter=Nobody(), **given)
    own = {Path(row["file_name"]).name: row for row in load_manifest(path)[0]}
    assert len(own) == len(rows)
    for row in rows:
        ours = own[Path(row["file_name"]).name]
        assert abs(ours["area_fraction"] - row["area_fraction"]) < 1e-6
        assert ours["captions"] == row["captions"] and ours["license_name"] == "unknown"
        boxes = [face["box"] for face in row["faces"]]
        assert all(face["box"] in boxes or not boxes for face in ours["faces"])
    assert sum(len(row["faces"]) for row in own.values()) > 0
