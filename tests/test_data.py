"Annotations that cannot be right, rules that leave nothing, manifests that no longer fit, and what the command line says of each."

import copy
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import in_process, run


def cli(*args):
    from masked_ldm.data.command import main

    return in_process(main, *args)


def train(*args):
    from masked_ldm.train import main

    return in_process(main, *args)


def last(text):
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def files(world):
    return {
        k: json.loads((Path(world) / "annotations" / f"{k}_val2017.json").read_text())
        for k in ("instances", "captions", "person_keypoints")
    }


@pytest.fixture
def spoil(world, files, tmp_path):
    "A COCO root whose val annotations were changed; its pictures are the world's."

    def make(change, kind="instances", raw=None):
        root = tmp_path / "coco"
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        for s in ("train", "val"):
            if not (root / f"{s}2017").exists():
                (root / f"{s}2017").symlink_to(Path(world).resolve() / f"{s}2017")
        for k, d in files.items():
            shutil.copy(Path(world) / "annotations" / f"{k}_train2017.json", root / "annotations")
            d = copy.deepcopy(d)
            if k == kind and change:
                change(d)
            path = root / "annotations" / f"{k}_val2017.json"
            path.write_bytes(
                raw(json.dumps(d).encode()) if k == kind and raw else json.dumps(d).encode()
            )
        return root

    return make


def first(d):
    return d["annotations"][0]


UPDATED = [  # file, list, number in it, fields that are changed, what is said
    ("instances", "categories", 0, dict(name=None), "has the name None, expected a text"),
    ("instances", "annotations", 0, dict(image_id=424242), "image_id that is not there"),
    ("captions", "annotations", 0, dict(image_id=424242), "the first is caption"),
    ("person_keypoints", "annotations", 0, dict(id=424242), "1 annotation(s) have a id that is"),
    ("instances", "annotations", 0, dict(category_id=99), "category_id that is not there"),
    ("instances", "annotations", 0, dict(id=[1]), "has the id [1]"),
    ("instances", "annotations", 0, dict(iscrowd="0"), "has the iscrowd '0', expected 0 or 1"),
    ("instances", "annotations", 0, dict(iscrowd=2), "has the iscrowd 2, expected 0 or 1"),
    ("instances", "annotations", 0, dict(face_valid="no"), "has the face_valid 'no'"),
    ("captions", "annotations", 3, dict(caption=["a man"]), "has the caption ['a man'], expected"),
    ("captions", "annotations", 3, dict(caption=7), "has the caption 7, expected a text"),
    ("captions", "annotations", 3, dict(caption="\ud800"), "has the caption '\\ud800', expected"),
    ("instances", "images", 2, dict(height=None), "has the height None, expected a whole number"),
    ("instances", "images", 2, dict(width=-4), "has the width -4, expected a whole number of 1"),
    ("instances", "images", 2, dict(width="64"), "has the width '64'"),
    ("instances", "images", 2, dict(width=2**16), "has the width 65536"),
    ("instances", "images", 2, dict(width=65535, height=65535), "has more than 89,478,485 pixels"),
    ("instances", "images", 2, dict(file_name="../../x.png"), "expected the name of a file inside"),
    ("instances", "images", 2, dict(file_name="a/../x.png"), "expected the name of a file inside"),
    ("instances", "images", 2, dict(file_name="/etc/passwd"), "expected the name of a file inside"),
    ("instances", "images", 2, dict(file_name="a\nb.png"), "has the file_name 'a\\nb.png'"),
    ("instances", "images", 2, dict(license=[1]), "the license [1], expected a whole number"),
    ("instances", "images", 2, dict(coco_url=5), "has the coco_url 5, expected a text"),
    ("instances", "images", 0, dict(id=1.5), "has the id 1.5"),
]
CHANGED = [  # file, change, what is said
    ("instances", lambda d: d["images"].append(d["images"][3]), "1 image id(s) occur more than"),
    ("instances", lambda d: d["annotations"].append(first(d)), "annotation id(s) occur more than"),
    ("captions", lambda d: d["annotations"].append(first(d)), "1 caption id(s) occur more than"),
    ("instances", lambda d: d["annotations"].insert(1, "x"), "annotation number 1 has no 'id'"),
    ("instances", lambda d: first(d).pop("id"), "annotation number 0 has no 'id'"),
    ("instances", lambda d: d.pop("images"), "has no list 'images'"),
    ("captions", lambda d: d.pop("annotations"), "has no list 'annotations'"),
    ("instances", lambda d: d.update(licenses=5), "has no list 'licenses'"),
    (
        "instances",
        lambda d: [c.update(name="persom") for c in d["categories"] if c["name"] == "person"],
        "has no category 'person'; is 'persom' a typing error?",
    ),
    (
        "instances",
        lambda d: d.update(categories=[dict(id=1, name="zebra")]),
        "has no category 'person'; it has zebra",
    ),
    (
        "instances",
        lambda d: d["categories"].append(dict(d["categories"][0], name="zebra")),
        "1 category id(s) occur more than once",
    ),
    (
        "instances",
        lambda d: d["images"].append(dict(d["images"][0], id=-7, file_name="x.png")),
        "image -7 has the id -7, expected a whole number of 0",
    ),
    (
        "instances",
        lambda d: d["images"][3].update(file_name=d["images"][1]["file_name"]),
        "have the same file_name",
    ),
]


def _update(records, number, fields):
    return lambda d: d[records][number].update(fields)


CHANGED += [(kind, _update(*what), said) for kind, *what, said in UPDATED]


@pytest.mark.parametrize("kind, change, said", CHANGED, ids=[c[-1] for c in CHANGED])
def test_annotations_that_cannot_be_are_refused(kind, change, said, spoil):
    "B14: file and id are named."
    from masked_ldm.data.filtering import select_images

    with pytest.raises(ValueError) as e:
        select_images(spoil(change, kind), "val")
    assert said in str(e.value) and f"{kind}_val2017.json" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["instances", "captions", "person_keypoints"])
@pytest.mark.parametrize(
    "raw, said",
    [
        (lambda b: b[: len(b) // 2], "is damaged"),
        (lambda b: b"", "is damaged"),
        (lambda b: b"[]", "holds a list, expected a dict"),
        (lambda b: b"\xff\xd8\xff\xe0" * 99, "is damaged"),
        (lambda b: b"[" * 100_000, "is damaged"),
        (lambda b: b"<html>", "is damaged"),
        (lambda b: b'{"images": ' + b"9" * 5000 + b"}", "is damaged"),
    ],
    ids=["cut off", "empty", "list", "binary", "nested", "web page", "endless number"],
)
def test_files_that_are_no_annotations(kind, raw, said, spoil):
    code, text = cli("build", spoil(None, kind, raw), "--split", "val", "--faces", "none")
    assert code == 1 and last(text).startswith("masked-ldm-data build: "), text
    assert f"{kind}_val2017.json {said}" in last(text) and "Traceback" not in text, text


def test_a_byte_order_mark_is_passed_over(spoil):
    from masked_ldm.data.filtering import select_images

    root = spoil(None, "instances", lambda b: b"\xef\xbb\xbf" + b)
    assert select_images(root, "val")[0]


NAN, INF = float("nan"), float("inf")
BAD_MASKS = dict(
    size_number=dict(size=480, counts=[81]),
    size_text=dict(size="ab", counts=[81]),
    endless=[[0, 0, 10**400, 0, 9, 9]],
    endless_too=[[0, 0, 10**400, 0.5, 9, 9]],
    nan=[[0, 0, NAN, 0, 9, 9]],
    huge=[[0, 0, 1e9, 0, 9, 9]],
    infinite=[[0, INF, 9, 0, 9, 9]],
    four=[[0, 0, 9, 9]],
    odd=[[0, 0, 9, 0, 9, 9, 1]],
    empty=[],
    text=[["a", 0, 9, 0, 9, 9]],
    none=None,
    number=7,
    size=dict(size=[9, 9], counts=[81]),
    long=dict(size=[64, 64], counts=[2**32, 4096 - 2**32]),
    endless_run=dict(size=[64, 64], counts="o" * 10**6),
    short=dict(size=[64, 64], counts=[5, 5]),
    broken=dict(size=[64, 64], counts="P"),
    outside=[[-90, -90, -50, -90, -50, -50]],
)


@pytest.mark.parametrize("what", BAD_MASKS)
def test_a_mask_that_cannot_be_is_skipped_and_named(what, spoil, files):
    "B13: the picture's other people stay, the annotation is named with its file."
    from masked_ldm.data.filtering import FilterRule, select_images

    counts = Counter(a["image_id"] for a in files["instances"]["annotations"])
    image = next(i for i, n in counts.items() if n >= 2)
    ids = [a["id"] for a in files["instances"]["annotations"] if a["image_id"] == image]
    root = spoil(
        lambda d: [
            a.update(segmentation=BAD_MASKS[what]) for a in d["annotations"] if a["id"] == ids[0]
        ]
    )
    rows, report = select_images(root, "val", FilterRule(0.0))
    assert [(b["file"], b["annotation"]) for b in report["bad_annotations"]] == [
        ("instances_val2017.json", ids[0])
    ] and report["bad_annotations"][0]["wrong"]
    (row,) = (r for r in rows if r["image_id"] == image)
    assert [p["id"] for p in row["people"]] == sorted(ids[1:]) and len(rows) + sum(
        report["dropped"].values()
    ) == report["pictures"]


ODD = dict(
    bbox_nan=(dict(bbox=[NAN] * 4), "bbox that is not"),
    bbox_endless=(dict(bbox=[10**400, 0, 1, 1]), "bbox that is not"),
    joints_few=(dict(keypoints=[1, 2, 2]), "keypoints that are not 17"),
    joints_far=(dict(keypoints=[1e200, 2, 2] * 17), "keypoints that are not 17"),
    joints_seen_7=(dict(keypoints=[1, 2, 7] * 17), "keypoints that are not 17"),
    area_more=(dict(area=1e6), "area that is no"),
    bbox_negative=(dict(bbox=[0, 0, -3, 4]), "bbox that is not"),
    area_nan=(dict(area=NAN), "area that is no"),
    area_negative=(dict(area=-5), "area that is no"),
    area_text=(dict(area="9"), "area that is no"),
    face_nan=(dict(face_valid=True, face_box=[NAN] * 4), "face_box that is not"),
    face_outside=(dict(face_valid=True, face_box=[500, 500, 9, 9]), "face_box outside the picture"),
    face_empty=(dict(face_valid=True, face_box=[3, 3, 0, 9]), "face_box that is not"),
)


@pytest.mark.parametrize("what", ODD)
def test_what_is_replaced_or_left_out_is_named(what, spoil, files):
    "The person stays; what could not be used of its annotation is listed, and in the manifest nothing of it is left."
    from masked_ldm.data.manifest import build_manifest, load_manifest

    change, said = ODD[what]
    k = first(files["instances"])["id"]
    plain = load_manifest(
        build_manifest(spoil(None), "val", spoil(None) / "plain", 0.0, "annotation")
    )[0]
    kind = "person_keypoints" if "keypoints" in change else "instances"
    root = spoil(lambda d: next(a for a in d["annotations"] if a["id"] == k).update(change), kind)
    rows, info = load_manifest(build_manifest(root, "val", root / "out", 0.0, "annotation"))
    (bad,) = info["bad_annotations"]
    assert (
        bad["annotation"] == k and bad["file"] == "instances_val2017.json" and said in bad["wrong"]
    )
    (p,) = (p for r in rows for p in r["people"] if p["id"] == k)
    assert (
        p["area"] > 0
        and min(p["bbox"]) >= 0
        and all(0 <= f["box"][0] < r["width"] for r in rows for f in r["faces"])
        and len(rows) == len(plain)
    )
    assert sum(len(r["faces"]) for r in plain) - info["face_boxes"] == (
        what.startswith("face") and bool(first(files["instances"]).get("face_valid"))
    )


def test_every_reason_is_counted(spoil):
    "Each picture is kept, or dropped under one reason."
    from masked_ldm.data.filtering import FilterRule, select_images

    def change(d):
        own = {}
        [own.setdefault(a["image_id"], []).append(a) for a in d["annotations"]]
        ids = sorted(own)
        d["annotations"] = [a for a in d["annotations"] if a["image_id"] != ids[0]]
        for a in own[ids[1]]:
            a["iscrowd"] = 1
        for a in own[ids[2]]:
            a["segmentation"] = []
        for a in own[ids[3]]:
            a.update(segmentation=[[0, 0, 3, 0, 3, 3, 0, 3]], area=9.0)
        d["images"] = [
            dict(im, license=9 if im["id"] == ids[4] else im["license"]) for im in d["images"]
        ]
        d["licenses"].append(dict(id=9, name="All rights reserved"))

    root = spoil(change)
    (root / "annotations" / "person_keypoints_val2017.json").unlink()
    captions = root / "annotations" / "captions_val2017.json"
    c = json.loads(captions.read_text())
    end = max(im["id"] for im in c["images"])
    c["annotations"] = [a for a in c["annotations"] if a["image_id"] != end]
    captions.write_text(json.dumps(c))
    licence = json.loads((root / "annotations" / "instances_val2017.json").read_text())["licenses"][
        0
    ]["name"]
    rows, report = select_images(root, "val", FilterRule(0.01, licenses=(licence,)))
    assert (
        report["dropped"]
        == {
            "no person": 1,
            "only crowds": 1,
            "no usable mask": 1,
            "people below min_area": 1,
            "licence not allowed": 1,
            "no caption": 1,
        }
        and len(rows) == report["pictures"] - 6
    )


def test_a_hash_of_the_content_does_not_know_folders(world, tmp_path):
    "The manifest's content hash is that of all its rows with bare file names, wherever it lies."
    import hashlib

    from masked_ldm.data.manifest import build_manifest, load_manifest

    infos = []
    for out in (tmp_path / "a", tmp_path / "b" / "c"):
        path = build_manifest(world, "val", out)
        rows, info = load_manifest(path)
        infos.append(info)
        assert path.read_text() == "".join(json.dumps(r) + "\n" for r in rows)
        assert (
            info["content"]
            == hashlib.sha256(
                json.dumps([dict(r, file_name=Path(r["file_name"]).name) for r in rows]).encode()
            ).hexdigest()
        )
    assert infos[0]["content"] == infos[1]["content"] and infos[0]["sha256"] != infos[1]["sha256"]


def overlap(world, root):
    "The world with a validation picture in both splits."
    shutil.copytree(world, root)
    name = sorted(p.name for p in (root / "val2017").glob("*.png"))[0]
    shutil.copy(root / "val2017" / name, root / "train2017")
    for k in ("instances", "captions"):
        a, b = (
            json.loads((root / "annotations" / f"{k}_{s}2017.json").read_text())
            for s in ("train", "val")
        )
        (im,) = (i for i in b["images"] if i["file_name"] == name)
        a["images"].append(im)
        a["annotations"] += [
            dict(x, id=10**9 + j)
            for j, x in enumerate(b["annotations"])
            if x["image_id"] == im["id"]
        ]
        (root / "annotations" / f"{k}_train2017.json").write_text(json.dumps(a))
    return im["id"]


def test_a_picture_in_both_splits(world, tmp_path):
    "B14: refused when a manifest is built, by either split, and by a run; found in manifests that were made apart."
    root = tmp_path / "coco"
    i = overlap(world, root)
    for s in ("train", "val"):
        code, text = cli("build", root, "--split", s, "--out", tmp_path / "out")
        assert (
            code == 1
            and f"the first is image {i}: training and validation must not share pictures"
            in last(text)
        ), text
    code, text = train(
        "--data_root",
        root,
        "--out_dir",
        tmp_path / "run",
        "--cache_dir",
        tmp_path / "cache",
        "--max_steps",
        "1",
    )
    assert code == 1 and "must not share pictures" in last(text) and "Traceback" not in text, text
    for s, other in (
        ("train", "val"),
        ("val", "train"),
    ):  # each alone, where the other's captions are not there to compare with
        away = root / "annotations" / f"captions_{other}2017.json"
        away.rename(away.with_suffix(".away"))
        code, text = cli("build", root, "--split", s, "--out", tmp_path / "out")
        away.with_suffix(".away").rename(away)
        assert code == 0, text
    code, text = cli("check", tmp_path / "out")
    assert code == 1 and f"1 pictures are in train and in val, the first is image {i}" in text, text
    code, text = train(
        "--data_root", tmp_path / "out", "--out_dir", tmp_path / "run2", "--max_steps", "1"
    )
    assert code == 1 and "in train and in val" in last(text) and "Traceback" not in text, text


def test_smaller_than_a_batch_and_nothing_left(world, tmp_path):
    "B19: an error before the first step, through Python, masked-ldm-data and masked-ldm-train, on a COCO root and on manifests."
    from masked_ldm.data.manifest import build_manifest

    with pytest.raises(ValueError, match="is left after filtering"):
        build_manifest(world, "val", tmp_path / "none", min_area=1.0)
    assert not (tmp_path / "none" / "metadata.jsonl").exists()
    code, text = cli("build", world, "--out", tmp_path / "none", "--min_area", "1")
    assert (
        code == 1
        and "is left after filtering" in last(text)
        and "people below min_area" in last(text)
        and not list((tmp_path / "none").rglob("metadata.jsonl"))
    ), text
    code, text = cli("build", world, "--out", tmp_path / "people", "--min_faces", 1)
    assert (
        code == 0
        and f"train on it with: masked-ldm-train --data_root {tmp_path / 'people'}" in text
    ), text
    how = ("--out_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--max_steps", "1")
    for given, said in (
        (("--data_root", world, "--min_area", ".99"), "is left after filtering"),
        (("--data_root", world, "--batch_size", "500"), "batch_size 500 is more than the"),
        (
            ("--data_root", tmp_path / "people", "--batch_size", "500"),
            "batch_size 500 is more than the",
        ),
    ):
        code, text = train(*given, *how)
        assert code == 1 and said in last(text) and "Traceback" not in text, text


def test_a_run_on_manifests(world, tmp_path):
    "A run takes the pictures that the manifests list, and says so where one is missing."
    code, text = cli("build", world, "--out", tmp_path / "people", "--min_area", ".2")
    assert code == 0, text
    code, text = train(
        "--data_root",
        tmp_path / "people",
        "--out_dir",
        tmp_path / "run",
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        "--val_pictures",
        "0",
        "--sample_steps",
        "1",
        "--report_to",
        "none",
        "--cache_dir",
        tmp_path / "cache",
    )
    assert code == 0, text
    info = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (
        info["train"] == str((tmp_path / "people" / "train" / "metadata.jsonl").resolve())
        and info["train_info"]["rule"]["min_area"] == 0.2
        and not list((tmp_path / "cache").glob("*train*"))
    )
    shutil.rmtree(tmp_path / "people" / "val")
    code, text = train(
        "--data_root", tmp_path / "people", "--out_dir", tmp_path / "run2", "--max_steps", "1"
    )
    assert code == 1 and "has a manifest of train only" in last(text), text


@pytest.fixture
def people(world, tmp_path):
    "Manifests of a copy of the world."
    shutil.copytree(world, tmp_path / "coco")
    code, text = cli("build", tmp_path / "coco", "--out", tmp_path / "people")
    assert code == 0, text
    return tmp_path / "people"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:700]), "truncated or damaged"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_text("<html>"), "is a web page"),
        (lambda p: __import__("PIL.Image").Image.new("RGB", (8, 9)).save(p), "its annotation says"),
    ],
)
def test_check_names_the_picture(change, said, people):
    code, text = cli("check", people)
    assert code == 0, text
    pic = sorted((people.parent / "coco" / "train2017").glob("*.png"))[1]
    change(pic)
    code, text = cli("check", people)
    assert code == 1 and pic.name in text and said in text and "Traceback" not in text, text


def test_check_of_a_manifest_that_was_edited(people):
    m = people / "val" / "metadata.jsonl"
    m.write_text(m.read_text().replace("man", "men", 1))
    code, text = cli("check", people)
    assert code == 1 and "is not what manifest.json describes" in last(text), text
    m.unlink()
    code, text = cli("check", people)
    assert code == 1 and f"{m} is missing" in last(text), text
    shutil.rmtree(people / "val")
    code, text = cli("check", people)
    assert code == 1 and "has a manifest of train only" in last(text), text
    assert cli("check", people / "train")[0] == 0  # it alone
    for body, said in (
        ("[]", "manifest.json holds a list, expected a dict"),
        ("null", "manifest.json holds a NoneType, expected a dict"),
        ('{"version": 4}', "manifest.json does not describe a manifest"),
        ("{", "manifest.json is damaged"),
    ):
        (people / "train" / "manifest.json").write_text(body)
        code, text = cli("check", people / "train")
        assert code == 1 and said in last(text) and "Traceback" not in text, text
        assert "build" in last(text), text


def test_inspect_draws_and_counts(people, tmp_path):
    from PIL import Image

    code, text = cli(
        "inspect", people, "--out", tmp_path / "look", "--n", 6, "--columns", 3, "--side", 64
    )
    assert code == 0, text
    for s in ("train", "val"):
        assert (
            Image.open(tmp_path / "look" / f"contact-sheet-{s}.png").size == (3 * 68, 2 * 112)
            and (tmp_path / "look" / f"histograms-{s}.png").is_file()
        )
    assert all(
        w in text
        for w in (
            "licences:",
            "dropped",
            "people in a picture:",
            "faces in a picture:",
            "share of the picture",
        )
    )


def test_calibrate(world):
    code, text = cli("calibrate", world, "--train", 30, "--val", 6)
    assert code == 0 and "keeps 30 of" in text and "keeps 6 of" in text and "than wanted" in text, (
        text
    )
    code, text = cli("calibrate", world)
    assert code == 1 and "wanted 37470 pictures of split train, which has" in last(text), text


def test_calibration_counts_what_the_rule_keeps(tmp_path):
    "1,500 pictures of 640 x 480 whose shares lie between .045 and .05, closer together than a share rounded to six places tells apart."
    from masked_ldm.data.filtering import FilterRule, calibrate_min_area, select_images

    rng = np.random.default_rng(0)
    areas = rng.choice(
        np.arange(int(0.045 * 307200), int(0.05 * 307200)), 1500, replace=False
    ).tolist()
    images = [
        dict(id=k, width=640, height=480, file_name=f"{k}.jpg", license=1) for k in range(1500)
    ]
    anns = [
        dict(
            id=k,
            image_id=k,
            category_id=1,
            iscrowd=0,
            segmentation=dict(size=[480, 640], counts=[0, n, 307200 - n]),
            area=n,
            bbox=[0, 0, 9, 9],
        )
        for k, n in enumerate(areas)
    ]
    (tmp_path / "annotations").mkdir()
    for kind, d in (
        (
            "instances",
            dict(images=images, annotations=anns, categories=[dict(id=1, name="person")]),
        ),
        (
            "captions",
            dict(
                images=images,
                annotations=[dict(id=k, image_id=k, caption="a man") for k in range(1500)],
            ),
        ),
    ):
        (tmp_path / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(d))
    for n in (1, 28, 29, 30, 700, 1499, 1500):
        v = calibrate_min_area(tmp_path, dict(val=n))["val"]
        kept, _ = select_images(tmp_path, "val", FilterRule(v.min_area))
        assert v.kept == n == len(kept), v


def test_faces_by_shares_are_the_faces_at_once(people, tmp_path):
    "Many jobs, then build: the same bytes as build alone."
    root = people.parent / "coco"
    for k in range(3):
        code, text = cli(
            "faces", root, "--out", tmp_path / "jobs", "--split", "val", "--shard", f"{k}/3"
        )
        assert code == 0, text
    for out in ("jobs", "once"):
        code, text = cli(
            "build", root, "--out", tmp_path / out, "--split", "val", "--faces", "mtcnn"
        )
        assert code == 0, text
    assert (tmp_path / "jobs" / "val" / "metadata.jsonl").read_bytes() == (
        tmp_path / "once" / "val" / "metadata.jsonl"
    ).read_bytes()


def test_a_run_finds_the_cache_that_was_made(people, tmp_path):
    "Two shares; a run with the same settings encodes nothing."
    how = ("--size", "64", "--cache_dir", tmp_path / "cache")
    for k in (0, 1):
        code, text = cli("cache", people, *how, "--shard", f"{k}/2")
        assert code == 0, text
    code, text = train(
        "--data_root",
        people,
        *how,
        "--cache_latents",
        "True",
        "--out_dir",
        tmp_path / "run",
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        "--val_pictures",
        "0",
        "--sample_steps",
        "1",
        "--report_to",
        "none",
    )
    assert code == 0 and "are read from" in text and "were made" not in text, text


@pytest.mark.parametrize(
    "line, code, said",
    [
        ("", 2, "the following arguments are required"),
        ("bild", 2, "invalid choice"),
        ("build", 2, "required: root"),
        ("build X --min_area 2", 2, "min_area must be 0 to 1, not 2.0"),
        ("build X --min_area x", 2, "min_area must be a number, not 'x'"),
        ("build X --min_are .1", 2, "unrecognized arguments: --min_are"),
        ("build X --crowd maybe", 2, "crowd must be one of ignore, drop, not 'maybe'"),
        ("build X --need_caption maybe", 2, "must be True or False, not 'maybe'"),
        ("build X --split test", 2, "invalid choice"),
        ("download X --workers 0", 2, "workers must be 1 to 256, not 0"),
        ("download X --retries -1", 2, "retries must be 0 to 100, not -1"),
        ("download X --min_area -1", 2, "min_area must be 0 to 1, not -1.0"),
        ("download X --min_faces 1", 2, "--min_faces: another command has it"),
        ("calibrate X --train 0 --val 0", 2, "nothing to calibrate"),
        ("inspect X --n 0", 2, "n must be 1 to 400, not 0"),
        ("build X", 1, "nowhere is no folder"),
        ("check X", 1, "has no manifest"),
        ("inspect X", 1, "has no manifest"),
        ("calibrate X", 1, "instances_train2017.json is missing"),
        ("download WORLD --licenses zzz", 1, "licenses: 'zzz' is none of this data set's"),
        ("build WORLD --out FILE", 1, "afile"),
        ("faces X --shard 3/2", 2, "shard must be i/n"),
        ("faces X --min_score 2", 2, "min_score"),
        ("cache X", 1, "data_root"),
        ("cache X --size 63", 1, "size must be a multiple of 8"),
        ("shard X", 2, "invalid choice"),
        ("build X --max_bad 3", 2, "max_bad must be 0 to 1, not 3.0"),
        ("build X --faces mtcnn --device banana", 2, "device 'banana' is not there"),
        ("faces X --device cuda:99", 2, "device 'cuda:99' is not there"),
        ("cache X --device banana", 2, "device 'banana' is not there"),
    ],
)
def test_exit_codes_and_sentences(line, code, said, world, tmp_path):
    (tmp_path / "afile").write_text("")
    got, text = cli(
        *(
            dict(X=tmp_path / "nowhere", WORLD=world, FILE=tmp_path / "afile").get(w, w)
            for w in line.split()
        )
    )
    assert (
        got == code
        and said in last(text)
        and last(text).startswith("masked-ldm-data")
        and "Traceback" not in text
    ), text


@pytest.mark.parametrize(
    "command", ["download", "build", "faces", "inspect", "check", "calibrate", "cache"]
)
def test_help_tells_every_setting(command):
    "Every flag says what it is, and the rule's are those of Python."
    from dataclasses import fields

    from masked_ldm.data.command import make_parser
    from masked_ldm.data.filtering import FilterRule

    sub = make_parser()._subparsers._group_actions[0].choices[command]
    flags = {a.dest for a in sub._actions}
    assert all(a.help for a in sub._actions), [a.dest for a in sub._actions if not a.help]
    if command in ("build", "faces", "download"):
        assert {f.name for f in fields(FilterRule)} <= flags | (
            {"min_faces"} if command == "download" else set()
        )
    assert not any("None:" in a.help for a in sub._actions)  # Python's way to say it
    code, text = cli(command, "--help")
    assert code == 0 and "usage: masked-ldm-data " + command in text


def test_exit_code_of_a_process(tmp_path):
    "The same from outside."
    code, text = run(sys.executable, "-m", "masked_ldm.data.command", "check", tmp_path)
    assert code == 1 and "has no manifest" in last(text) and "Traceback" not in text, text


SLIVER, NOT_A_NUMBER, FAR = [1, 1, 2, 2], [0, 0, NAN, 0, 9, 9], [0, 0, 1e6, 0, 9, 9]


@pytest.mark.parametrize("bad", [SLIVER, NOT_A_NUMBER, FAR, [], "x", None])
def test_one_bad_polygon_is_left_out_and_its_person_stays(bad, spoil, files):
    from masked_ldm.data.filtering import FilterRule, select_images

    k = first(files["instances"])["id"]
    good = [2, 2, 50, 2, 50, 40, 2, 40]
    root = spoil(lambda d: first(d).update(segmentation=[good, bad]))
    rows, report = select_images(root, "val", FilterRule(0.0))
    (person,) = (p for row in rows for p in row["people"] if p["id"] == k)
    alone = select_images(spoil(lambda d: first(d).update(segmentation=[good])), "val")[0]
    assert person["segmentation"] in [p["segmentation"] for r in alone for p in r["people"]]
    (wrong,) = report["bad_annotations"]
    assert wrong["annotation"] == k and "polygon" in wrong["wrong"]
    assert "it is left out of the mask" in wrong["wrong"]


@pytest.mark.parametrize("forged", [[1000, 1000], [10**6, 10**6], [4], "ab", None, [-1, 64]])
def test_a_forged_rle_is_refused_before_c_code_sees_it(forged, world, tmp_path):
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.manifest import build_manifest

    dataset = PersonDataset(build_manifest(world, "val", tmp_path, faces="none"), 64)
    dataset.rows[0]["people"][0]["segmentation"]["size"] = forged
    with pytest.raises(ValueError, match="RLE of size"):
        dataset[0]


@pytest.mark.parametrize("out", ["people/val", "val2017", "link/val", "../elsewhere"])
def test_links_keep_their_names(out, world, tmp_path):
    "As DVC and the hub's cache store pictures: each is a link to a file that is named by its content."
    from masked_ldm.data.manifest import build_manifest, load_manifest

    root = tmp_path / "coco"
    shutil.copytree(Path(world) / "annotations", root / "annotations")
    for folder in ("val2017", "blobs"):
        (root / folder).mkdir()
    for number, picture in enumerate((Path(world) / "val2017").glob("*.png")):
        blob = shutil.copy(picture, root / "blobs" / f"{number:064x}")
        (root / "val2017" / picture.name).symlink_to(blob)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "far" / "away")
    (tmp_path / "alias").symlink_to(root)
    for place in (root, tmp_path / "alias"):
        manifest = build_manifest(place, "val", place / out, faces="none")
    names = [row["file_name"] for row in load_manifest(manifest)[0]]
    assert all(name.endswith(".png") and "blobs" not in name for name in names)
    assert out != "people/val" or all(name.startswith("../../val2017/") for name in names)
    assert out != "val2017" or not any("/" in name for name in names)
    assert all((manifest.parent / name).is_file() for name in names)


@pytest.mark.parametrize("name", ["12:30.png", "a..b.png", "\u00fcber \u4eba.png", "sub/a.png"])
def test_a_file_name_is_tested_by_its_parts(name, spoil):
    from masked_ldm.data.filtering import FilterRule, select_images

    root = spoil(lambda d: d["images"][0].update(file_name=name))
    assert name in {row["file_name"] for row in select_images(root, "val", FilterRule(0.0))[0]}


def test_faces_that_annotations_do_not_give_are_refused(spoil):
    def forget(d):
        for annotation in d["annotations"]:
            annotation.pop("face_box")
            annotation.pop("face_valid")

    root = spoil(forget)
    (root / "annotations" / "person_keypoints_val2017.json").unlink()
    for faces, file in (("annotation", "instances"), ("keypoints", "person_keypoints")):
        code, text = cli("build", root, "--split", "val", "--faces", faces, "--out", root / "out")
        assert code == 1 and f"faces='{faces}' needs a" in last(text), text
        assert f"annotations/{file}_val2017.json" in last(text)
    assert not (root / "out").exists()


def test_captions_that_are_cut_are_counted(spoil, files):
    image = first(files["captions"])["image_id"]
    for words, said in ((75, False), (76, True)):
        caption = "word " * words
        root = spoil(_update("annotations", 0, dict(caption=caption)), "captions")
        place = ("--split", "val", "--faces", "none", "--out", root / "out")
        code, text = cli("build", root, "--min_area", 0, *place)
        assert code == 0, text
        sentence = f"1 picture(s) have a caption of more than 77 tokens, the first is image {image}"
        assert (sentence in text) == said, text


@pytest.mark.parametrize(
    "given",
    [
        dict(min_area=NAN),
        dict(min_area="much"),
        dict(min_area=None, faces=7),
        dict(max_bad=INF),
        dict(min_face=1e30),
        dict(on_person=-1),
        dict(need_caption="maybe"),
        dict(licenses="4"),
    ],
    ids=str,
)
def test_settings_given_in_python_are_checked_too(given, world, tmp_path):
    from masked_ldm.data.manifest import build_manifest
    from masked_ldm.settings import ConfigError

    with pytest.raises(ConfigError, match="|".join(given)):
        build_manifest(world, "val", tmp_path / "out", **given)


@pytest.mark.parametrize(
    "given",
    [
        dict(size=0),
        dict(size="64"),
        dict(flip=NAN),
        dict(min_visible=2),
        dict(crop="x"),
        dict(seed=-1),
    ],
    ids=str,
)
def test_a_data_set_checks_what_it_is_told(given, world, tmp_path):
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.settings import ConfigError

    with pytest.raises(ConfigError, match=next(iter(given))):
        PersonDataset(tmp_path / "metadata.jsonl", **dict(dict(size=64), **given))


@pytest.mark.parametrize(
    "spoilt, said",
    [
        ("*-train-*/metadata.jsonl", "the run builds it again"),
        ("*-train-*/manifest.json", "the run builds it again"),
        ("world*/annotations/captions_train2017.json", "is damaged: it is drawn again"),
        ("world*/train2017/000000000003.png", "is damaged: it is drawn again"),
        ("world*/world.json", "is damaged: it is drawn again"),
    ],
)
def test_what_a_run_keeps_is_made_again_where_it_is_damaged(
    spoilt, said, tmp_path, capsys, recwarn
):
    from masked_ldm.training.config import TrainConfig
    from masked_ldm.training.data import load_data

    config = TrainConfig.make(cache_dir=str(tmp_path), world_pictures=12, val_pictures=4)
    before = load_data(config).train[2]["pixels"]
    (file,) = tmp_path.glob(spoilt)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    capsys.readouterr()
    assert (load_data(config).train[2]["pixels"] == before).all()
    told = " ".join(str(warning.message) for warning in recwarn)
    assert said in capsys.readouterr().out + told
    recwarn.clear()
    load_data(config)
    assert not capsys.readouterr().out and not list(recwarn)


@pytest.fixture
def photographs(tmp_path):
    "A COCO root of two pictures of 64 x 32, with two people in the first and one in the second."
    from PIL import Image

    root = tmp_path / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images = [dict(id=i, file_name=f"{i}.png", height=32, width=64, license=0) for i in (1, 2)]
    corners = {(11, 1): 2, (12, 1): 36, (21, 2): 20}  # (annotation, picture): left side
    people = [
        dict(
            id=id,
            image_id=image,
            category_id=1,
            segmentation=[[x, 2, x + 24, 2, x + 24, 30, x, 30]],
        )
        for (id, image), x in corners.items()
    ]
    said = [dict(id=i, image_id=i, caption="somebody") for i in (1, 2)]
    for image in images:
        Image.new("RGB", (64, 32)).save(root / "val2017" / image["file_name"])
    files = dict(
        instances=dict(annotations=people, categories=[dict(id=1, name="person")]),
        captions=dict(annotations=said),
    )
    for kind, content in files.items():
        text = json.dumps(dict(images=images) | content)
        (root / "annotations" / f"{kind}_val2017.json").write_text(text)
    return root


def hand_record(id, left=None, right=None, **other):
    "COCO-WholeBody's record of a person: a hand without a box is not valid, and its box all zero."
    sides = dict(lefthand=left, righthand=right)
    boxes = {f"{side}_box": box or [0.0] * 4 for side, box in sides.items()}
    valid = {f"{side}_valid": box is not None for side, box in sides.items()}
    return dict(id=id, face_valid=False) | boxes | valid | other


LABELLED = [hand_record(11, [4, 6, 8, 10], [20, 20, 4.5, 6]), hand_record(21, right=[38, 8, 6, 6])]


def with_hands(root, annotations=LABELLED, raw=None):
    "Build the manifest of `photographs` with a file of hands: (rows, info, path)."
    from masked_ldm.data.manifest import build_manifest, load_manifest

    file = root / "annotations" / "coco_wholebody_val_v1.0.json"
    file.write_text(json.dumps(dict(annotations=annotations)) if raw is None else raw)
    path = build_manifest(root, "val", root / "out", faces="none")
    return *load_manifest(path), path


def test_without_a_file_of_hands_a_manifest_is_what_it_was(photographs):
    "Byte for byte, by a hash from before there were hands; with the file, people's `hands` and their count are all that is new."
    from masked_ldm.data.manifest import build_manifest, load_manifest

    old, plain = load_manifest(
        build_manifest(photographs, "val", photographs / "out", faces="none")
    )
    assert plain["version"] == 4
    assert plain["sha256"] == "d79b8edcf34254577f9a8b255d7f33358a6bc102df07a43c80d59c75b74d462b"
    assert plain["content"] == "f790037933dfaf26cffbf14639f9f82e1cb0081a486e84d37000650ea2d233eb"
    assert "hand_boxes" not in plain
    rows, info, _ = with_hands(photographs)
    found = {p["id"]: p.pop("hands") for row in rows for p in row["people"]}
    assert found == {11: [[4, 6, 12, 16], [20, 20, 24.5, 26]], 12: [], 21: [[38, 8, 44, 14]]}
    assert rows == old and info.pop("hand_boxes") == 3
    hashes = ("sha256", "content")
    assert {k: v for k, v in info.items() if k not in hashes} == {
        k: v for k, v in plain.items() if k not in hashes
    }


def test_hands_follow_crop_resize_and_flip(photographs):
    "The square is the middle of 64 x 32, at 16 pixels: x becomes (x - 16) / 2, mirrored 16 less that."
    from masked_ldm.data.dataset import Batch, PersonDataset, collate

    *_, path = with_hands(photographs)
    plain = PersonDataset(path, 16, flip=0)
    mirrored = PersonDataset(path, 16, flip=1)
    batch = collate([plain[0], mirrored[(0, 0)], plain[1], mirrored[(0, 1)]])
    # of the first picture one hand is cropped away, and nothing is left of it
    wanted = [[0, 2, 10, 4.25, 13], [1, 11.75, 10, 14, 13], [2, 11, 4, 14, 7], [3, 2, 4, 5, 7]]
    np.testing.assert_allclose(batch.hands, wanted, atol=1e-5)
    some = batch[[3, 0]].to("cpu")
    np.testing.assert_allclose(some.hands, [[0, *wanted[3][1:]], [1, *wanted[0][1:]]], atol=1e-5)
    by_hand = {k: v for k, v in vars(batch).items() if k != "hands"}
    assert Batch(**by_hand)[[1, 2]].hands.shape == (0, 5)


def test_a_hand_that_is_cut_keeps_what_is_inside(photographs):
    from masked_ldm.data.dataset import PersonDataset, collate

    cut = [hand_record(11, [10, 4, 8, 8], [2, 4, 14, 8]), hand_record(12, [46, 4, 12, 8])]
    *_, path = with_hands(photographs, cut)
    batch = collate([PersonDataset(path, 32, flip=0)[i] for i in range(2)])
    np.testing.assert_allclose(batch.hands, [[0, 0, 4, 2, 12], [0, 30, 4, 32, 12]], atol=1e-5)


def test_both_losses_weigh_hands_by_their_boxes(photographs):
    "Inside the box and the person; without boxes and joints the mask of a person is flat."
    import torch

    from masked_ldm.data.dataset import PersonDataset, collate
    from masked_ldm.training.config import TrainConfig
    from masked_ldm.training.step import diffusion_weights, perceptual_mask

    *_, path = with_hands(photographs)
    batch = collate([PersonDataset(path, 32, flip=0)[1]])  # x less 16: person 4..28, hand 22..28
    batch.hands[0, 3] = 32  # and beyond the person
    config = TrainConfig.make(hand_weight=4.0, ldm_hand_weight=4.0)
    inside = torch.zeros(1, 1, 32, 32)
    inside[..., 8:14, 22:28] = 1
    assert torch.equal(perceptual_mask(config, batch), (batch.mask + 3 * inside) / 4)
    weights = diffusion_weights(config, batch, (32, 32))
    torch.testing.assert_close(weights / weights.min(), 1 + 3 * inside)


@pytest.mark.parametrize(
    "box, said",
    [
        (None, "lefthand_box that is not x, y, width, height; it is left out"),
        ([1, 2, 3], "lefthand_box that is not"),
        ([1, 2, 3, "4"], "lefthand_box that is not"),
        ([NAN] * 4, "lefthand_box that is not"),
        ([1, 2, INF, 4], "lefthand_box that is not"),
        ([1, 2, 10**400, 4], "lefthand_box that is not"),
        ([0.0] * 4, "lefthand_box that is not"),
        ([5, 5, 4, 0], "lefthand_box that is not"),
        ([64, 3, 4, 4], "lefthand_box outside the picture"),
        ({"x": 1}, "lefthand_box that is not"),
    ],
)
def test_a_hand_that_cannot_be_is_left_out_and_counted(box, said, photographs):
    "The person's other hand stays."
    bad = hand_record(11, right=[20, 20, 4, 6], lefthand_box=box, lefthand_valid=True)
    rows, info, _ = with_hands(photographs, [bad])
    assert rows[0]["people"][0]["hands"] == [[20, 20, 24, 26]] and info["hand_boxes"] == 1
    (found,) = info["bad_annotations"]
    assert found["file"] == "coco_wholebody_val_v1.0.json" and found["annotation"] == 11
    assert found["wrong"].startswith(said)


@pytest.mark.parametrize(
    "annotations, said",
    [
        (
            [hand_record(99)],
            "1 annotation(s) have a id that is not there, the first is annotation 99",
        ),
        ([hand_record(11), hand_record(11)], "annotation id(s) occur more than once"),
        ([dict(lefthand_valid=True)], "annotation number 0 has no 'id'"),
        (["x"], "annotation number 0 has no 'id'"),
        ([hand_record(11, lefthand_valid="no")], "annotation 11 has the lefthand_valid 'no'"),
        ([hand_record(11, righthand_valid=[1])], "annotation 11 has the righthand_valid [1]"),
        (None, "has no list 'annotations'"),
    ],
)
def test_a_file_of_hands_that_cannot_be_is_refused(annotations, said, photographs):
    with pytest.raises(ValueError) as e:
        with_hands(photographs, annotations)
    assert said in str(e.value) and "coco_wholebody_val_v1.0.json" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("raw", ["", "{", "<html>", "[" * 100_000])
def test_a_file_of_hands_that_is_no_json_is_refused(raw, photographs):
    with pytest.raises(ValueError, match=r"coco_wholebody_val_v1\.0\.json is damaged"):
        with_hands(photographs, raw=raw)


def test_hands_are_counted_where_a_manifest_is_summed_up(photographs):
    with_hands(photographs)
    code, text = cli("build", photographs, "--split", "val", "--faces", "none")
    assert code == 0 and "\nhands: 3 boxes\n" in text, text
