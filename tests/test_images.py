"Picture files of bad days and of every kind, on their way from a COCO root to a batch."

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from masked_ldm.data.dataset import PersonDataset, collate
from masked_ldm.data.images import ImageError, read_image
from masked_ldm.data.manifest import build_manifest, load_manifest


@pytest.fixture
def root(world, tmp_path):
    "A copy of the small world that may be spoilt."
    return Path(
        shutil.copytree(world, tmp_path / "root", ignore=shutil.ignore_patterns("m*.json*"))
    )


def victim(root, k=5):
    "Path and image record of a validation picture."
    im = sorted(
        json.loads((root / "annotations" / "instances_val2017.json").read_text())["images"],
        key=lambda im: im["id"],
    )[k]
    return root / "val2017" / im["file_name"], im


def png_header(w, h):
    return (
        b"\x89PNG\r\n\x1a\n"
        + b"\0\0\0\rIHDR"
        + w.to_bytes(4, "big")
        + h.to_bytes(4, "big")
        + b"\x08\x02\0\0\0"
    )


def bomb():
    import zlib

    head = png_header(60000, 60000)
    return (
        head
        + zlib.crc32(head[12:]).to_bytes(4, "big")
        + b"\0\0\0\0IDAT"
        + zlib.crc32(b"IDAT").to_bytes(4, "big")
        + b"\0\0\0\0IEND\xaeB`\x82"
    )


FAULTS = dict(
    truncated=(lambda b: b[: len(b) // 2], "truncated or damaged"),
    empty=(lambda b: b"", "is empty (0 bytes)"),
    page=(lambda b: b"<!DOCTYPE html><h1>404</h1>", "is a web page"),
    missing=(None, "is missing"),
    bomb=(lambda b: bomb(), "far too many pixels"),
    junk=(lambda b: b"\0" * 500, "its header is damaged"),
)


def spoil(path, fault):
    change = FAULTS[fault][0]
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()


@pytest.mark.parametrize("faces", ["annotation", "mtcnn", "keypoints", "none"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_quarantined(root, fault, faces):
    path, im = victim(root)
    spoil(path, fault)
    said = FAULTS[fault][1]
    with pytest.raises(ValueError) as e:
        build_manifest(root, "val", faces=faces)
    assert (
        all(s in str(e.value) for s in (path.name, str(im["id"]), said, "max_bad=0.01"))
        and "\n" not in str(e.value)
        and not (root / "val2017" / "manifest.json").exists()
    )
    rows, info = load_manifest(build_manifest(root, "val", faces=faces, max_bad=0.1))
    (bad,) = info["quarantined"]
    assert (
        (bad["file"], bad["image_id"]) == (path.name, im["id"])
        and said in bad["reason"]
        and path.name not in {r["file_name"] for r in rows}
    )
    assert (
        info["kept"] + sum(info["dropped"].values()) == info["pictures"]
        and info["dropped"]["picture quarantined"] == 1
    )


def test_a_file_fetched_again_is_found(root):
    "A stale face chunk does not keep a mended picture out."
    path, _ = victim(root)
    whole = path.read_bytes()
    spoil(path, "truncated")
    build_manifest(root, "val", faces="mtcnn", max_bad=0.1)
    path.write_bytes(whole)
    rows, info = load_manifest(build_manifest(root, "val", faces="mtcnn"))
    assert info["quarantined"] == [] and path.name in {r["file_name"] for r in rows}


def test_a_byte_that_changed_needs_the_full_look(root):
    path, _ = victim(root)
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 255
    path.write_bytes(body)
    build_manifest(root, "val")
    with pytest.raises(ValueError, match="truncated or damaged"):
        build_manifest(root, "val", verify="full")


@pytest.mark.parametrize("kept_time", [False, True])
def test_a_byte_that_changed_after_the_face_pass(root, kept_time, capsys):
    "Of equal size: its chunk is made again; where the file's time was put back too, verify='full' finds it all the same."
    build_manifest(root, "val", faces="mtcnn", device="cpu")
    path, _ = victim(root)
    at = path.stat()
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 255
    path.write_bytes(body)
    if kept_time:
        os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    with pytest.raises(ValueError, match="truncated or damaged"):
        build_manifest(root, "val", faces="mtcnn", device="cpu", verify="full")
    assert (
        "of other pictures or settings: it is made again" in capsys.readouterr().out
    ) is not kept_time


def test_the_share_is_bounded(root):
    for k in range(3):
        victim(root, k)[0].unlink()
    with pytest.raises(ValueError, match=r"3 of \d+ pictures cannot be used"):
        build_manifest(root, "val", max_bad=0.2)
    assert len(load_manifest(build_manifest(root, "val", max_bad=0.5))[1]["quarantined"]) == 3
    shutil.rmtree(root / "val2017")
    with pytest.raises(FileNotFoundError, match="val2017 is missing"):
        build_manifest(root, "val")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_goes_bad_later_stops_training_by_name(root, fault):
    ds = PersonDataset(build_manifest(root, "val"), 64)
    path = ds.folder / ds.rows[2]["file_name"]
    spoil(path, fault)
    with pytest.raises(ImageError, match=path.name):
        ds[2]
    with pytest.raises(ImageError, match=path.name):
        list(torch.utils.data.DataLoader(ds, 4, num_workers=1, collate_fn=collate))


def save_as(root, kind):
    "Store a validation picture as another kind of file; returns its image id."
    path, im = victim(root)
    rgb = Image.open(path).convert("RGB")
    grey = np.asarray(rgb.convert("L"))
    new = path.with_suffix(".jpg" if kind in ("cmyk", "exif") else ".png")
    path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "grey":
        rgb.convert("L").save(new)
    if kind == "16 bit":
        Image.fromarray(grey.astype(np.uint16) * 257).save(new)
    if kind == "palette":
        rgb.quantize(256).save(new)
    if kind == "rgba":
        rgb.putalpha(255)
        rgb.save(new)
    if kind == "cmyk":
        rgb.convert("CMYK").save(new, quality=98)
    if kind == "exif":
        rgb.transpose(Image.ROTATE_90).save(new, quality=98, exif=exif)
    for p in (root / "annotations").glob("*_val2017.json"):
        d = json.loads(p.read_text())
        for i in d["images"]:
            if i["id"] == im["id"]:
                i["file_name"] = new.name
        p.write_text(json.dumps(d))
    return im["id"]


@pytest.mark.parametrize("kind", ["grey", "16 bit", "palette", "rgba", "cmyk"])
@pytest.mark.parametrize("crop", ["center", "people"])
def test_every_kind_of_file_gives_the_same_sample(root, kind, crop):
    before = {s["image_id"]: s for s in PersonDataset(build_manifest(root, "val"), 64, crop=crop)}
    i = save_as(root, kind)
    after = {s["image_id"]: s for s in PersonDataset(build_manifest(root, "val"), 64, crop=crop)}
    a, b = before[i], after[i]
    for k in ("mask", "people", "boxes", "joints"):
        assert torch.equal(a[k], b[k])
    want = (
        a["pixels"].mean(0, keepdim=True).expand(3, -1, -1)
        if kind in ("grey", "16 bit")
        else a["pixels"]
    )
    assert b["pixels"].shape == (3, 64, 64) and (b["pixels"] - want).abs().mean() < (
        0.15 if kind in ("grey", "16 bit") else 0.05
    )


def test_a_turned_picture_lies_under_its_mask(tmp_path):
    "A file that the camera stored on its side: annotated upright, and annotated as stored. A white rectangle is the person."
    from pycocotools import mask as rle

    for k, (w, h) in enumerate(((60, 40), (40, 60))):
        root = tmp_path / str(k)
        (root / "annotations").mkdir(parents=True)
        upright = np.zeros((60, 40), np.uint8)
        upright[5:25, 8:30] = 255
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = Image.fromarray(upright).transpose(Image.ROTATE_90).convert("RGB")
        noted = np.asarray(stored.convert("L")) if (w, h) == (60, 40) else upright
        seg = rle.encode(np.asfortranarray(noted > 127).astype(np.uint8, order="F"))
        seg["counts"] = seg["counts"].decode()
        (root / "train2017").mkdir()
        stored.save(root / "train2017" / "a.jpg", exif=exif, quality=98)
        common = dict(
            images=[dict(id=1, width=w, height=h, file_name="a.jpg", license=1)],
            licenses=[dict(id=1, name="CC")],
        )
        (root / "annotations" / "captions_train2017.json").write_text(
            json.dumps(dict(common, annotations=[dict(id=1, image_id=1, caption="a man")]))
        )
        (root / "annotations" / "instances_train2017.json").write_text(
            json.dumps(
                dict(
                    common,
                    categories=[dict(id=1, name="person")],
                    annotations=[
                        dict(
                            id=1,
                            image_id=1,
                            category_id=1,
                            iscrowd=0,
                            segmentation=seg,
                            area=440,
                            bbox=[0, 0, 1, 1],
                        )
                    ],
                )
            )
        )
        s = PersonDataset(build_manifest(root, "train", faces="none"), 40, crop="people")[0]
        assert ((s["pixels"].mean(0) > 0).float() - s["mask"][0]).abs().mean() < 0.02 and s[
            "mask"
        ].mean() > 0.2


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_picture_that_fits_both_ways_is_counted(root, orientation):
    "As stored unless asked for; who has not chosen is told that the other way has the annotation's size too."
    path, im = victim(root)
    upright = Image.open(path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose({2: 0, 3: 3, 4: 1}[orientation])
    stored.save(path, exif=exif)
    for exif, seen in (("stored", stored), ("upright", upright)):
        manifest = build_manifest(root, "val", exif=exif, faces="none")
        warnings = load_manifest(manifest)[1]["warnings"]
        assert len(warnings) == (exif == "stored")
        for warning in warnings:
            assert warning.startswith("1 picture(s) fit their annotation as stored and as EXIF")
            assert path.name in warning
        found = {s["image_id"]: s["pixels"] for s in PersonDataset(manifest, 64)}[im["id"]]
        want = torch.tensor(np.asarray(seen)).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(found, want, atol=1e-6)


def test_a_picture_of_another_size_is_refused(root):
    path, _ = victim(root)
    Image.open(path).resize((32, 32)).save(path)
    with pytest.raises(ValueError, match="is 32 x 32, its annotation says 64 x 64"):
        build_manifest(root, "val")


def test_reading_is_bounded(tmp_path, monkeypatch):
    "A bomb is refused from its header: nothing of it is decoded."
    (tmp_path / "bomb.png").write_bytes(bomb())
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: 1 / 0)
    with pytest.raises(ImageError, match="far too many pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_mangled_bytes_give_a_picture_or_a_sentence(kind, tmp_path):
    "Whatever a file holds: RGB of the right size, or a ImageError that names it."
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    b = io.BytesIO()
    path = tmp_path / "a"
    refused = 0
    Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(
        b, kind, **(dict(exif=exif) if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {})
    )
    whole = b.getvalue()
    for k in range(150):
        bad = bytearray(whole)
        for i in rng.integers(0, min(len(bad), (60, 400, len(bad))[k % 3]), rng.integers(1, 6)):
            bad[i] = rng.integers(256)
        path.write_bytes(bytes(bad[: rng.integers(1, len(bad) + 1)] if k % 5 == 0 else bad))
        try:
            im = read_image(path)
            assert im.mode == "RGB" and min(im.size) > 0
        except ImageError as e:
            refused += 1
            assert str(path) in str(e) and e.reason
    assert refused > 10
