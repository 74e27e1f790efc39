"Hostile input at every door of masked-ldm-data: a sentence and an exit code, or it is named in what is printed; never a traceback."

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from conftest import in_process

NAN, INF = math.nan, math.inf
VALUES = [None, True, -1, 0, 1.5, 1e308, NAN, -INF, 2**64, 10**400, "", "x", "\ud800", "a\nb", "\0"]
VALUES += [[], [[]], {}, ["x"], [None], [NAN] * 4, [1e308] * 51, [[0, 0, 1, 1]], {"size": [64, 64]}]
FIELDS = {  # file and list: fields
    ("instances", "images"): "id width height file_name license coco_url",
    ("instances", "categories"): "id name",
    ("instances", "licenses"): "id name",
    ("instances", "annotations"): (
        "id image_id category_id iscrowd segmentation bbox area face_box face_valid"
    ),
    ("captions", "annotations"): "id image_id caption",
    ("person_keypoints", "annotations"): "id keypoints",
}
PLACES = [(kind, where, field) for (kind, where), s in FIELDS.items() for field in s.split()]
TEXTS = ["", "x", "a\nb", "\0"]
FITS = dict(  # values that are what a field may be, or that say nothing
    license=[None, -1, 0, 2**64, 10**400, *TEXTS, "\ud800"],
    coco_url=[None, "x"],
    iscrowd=[None, True, 0],
    face_valid=[None, True, 0],
    bbox=[None],
    area=[None, 0, 1.5, 1e308, True],
    keypoints=[None],
    caption=[None, *TEXTS],
    name=["x"],
    id=[-1, 0, 2**64, 10**400],
    file_name=["x"],
)

OPTIONAL = ["license", "coco_url", "iscrowd", "face_valid", "face_box", "bbox", "area"]
OPTIONAL += ["keypoints", "caption", "segmentation"]  # nobody without a mask is kept


def data(*args):
    "Run a command line; return what it printed and whether it succeeded, and see that a failure is one sentence."
    from masked_ldm.data.command import main

    code, text = in_process(main, *args)
    text = text.encode(errors="backslashreplace").decode()
    assert code in (0, 1, 2) and "Traceback" not in text
    if code:
        last = text.strip().split("\n")[-1]
        assert last.startswith(("masked-ldm-data", "  ")) and len(last) > 25, text
    return code == 0, text


@pytest.fixture(scope="module")
def coco(world, tmp_path_factory):
    "A COCO root of val alone, and the content of its files."
    root = tmp_path_factory.mktemp("fuzz") / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").symlink_to(Path(world).resolve() / "val2017")
    kinds = ("instances", "captions", "person_keypoints")
    texts = {k: (Path(world) / "annotations" / f"{k}_val2017.json").read_text() for k in kinds}
    return root, texts


def build(root, texts, *args):
    for kind, text in texts.items():
        (root / "annotations" / f"{kind}_val2017.json").write_text(text)
    place = ("--split", "val", "--out", root / "out")
    return data("build", root, *place, "--min_area", 0, "--faces", "annotation", *args)


@pytest.mark.parametrize("kind, where, field", PLACES, ids=["-".join(p) for p in PLACES])
def test_a_field_of_any_value(kind, where, field, coco):
    "Refused, or listed as left out, or a value that the field may have."
    root, texts = coco
    for value in VALUES:
        content = json.loads(texts[kind])
        content[where][0][field] = value
        good, text = build(root, texts | {kind: json.dumps(content)})
        listed = "annotations with something wrong: 1\n" in text
        if where == "licenses" and field == "id" and isinstance(value, str):
            continue  # a licence that no picture has
        fits = any(
            value is v or (type(value) is type(v) and value == v) for v in FITS.get(field, ())
        )
        assert not good or listed or fits, (value, text)
        assert good or "_val2017.json" in text or "is missing" in text, (value, text)


@pytest.mark.parametrize("kind, where, field", PLACES, ids=["-".join(p) for p in PLACES])
def test_a_field_that_is_missing(kind, where, field, coco):
    root, texts = coco
    content = json.loads(texts[kind])
    content[where][0].pop(field, None)
    good, text = build(root, texts | {kind: json.dumps(content)})
    listed = "annotations with something wrong: 1\n" in text
    assert good == (field in OPTIONAL), text
    assert listed == (field == "segmentation"), text
    assert good or f"{kind}_val2017.json" in text, text


@pytest.mark.parametrize("kind", ["instances", "captions", "person_keypoints"])
def test_a_list_or_a_file_of_any_value(kind, coco):
    root, texts = coco
    for value in VALUES:
        assert not build(root, texts | {kind: json.dumps(value)})[0], value
        for where in ("images", "annotations", "categories"):
            content = json.loads(texts[kind])
            if (kind, where) not in FIELDS or value == []:
                continue
            for broken in (content | {where: value}, content | {where: [value]}):
                assert not build(root, texts | {kind: json.dumps(broken)})[0], (where, value)


BODIES = [b"", b"[]", b"null", b"7", b"{", b"\xff\xfe", b"\0" * 99, b"[" * 10**5, b"9" * 5000]
BODIES += [
    b"{}",
    b'{"version": 4}',
    b'{"version": "4", "sha256": null}',
    b"\xef\xbb\xbf",
    b"{}\n{}",
]


@pytest.fixture(scope="module")
def people(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "people"
    assert data("build", world, "--out", out, "--faces", "annotation")[0]
    return out


@pytest.mark.parametrize("command", ["check", "inspect", "cache"])
@pytest.mark.parametrize("name", ["manifest.json", "metadata.jsonl"])
def test_a_manifest_of_any_bytes(command, name, people, tmp_path):
    copy = Path(shutil.copytree(people, tmp_path / "people"))
    file = copy / "train" / name
    whole = file.read_bytes()
    bodies = [*BODIES, whole[:-9], whole + b"x", None, "folder"]
    for body in bodies[::4] if command == "cache" else bodies:
        file.unlink(missing_ok=True)
        if body == "folder":
            file.mkdir()
        elif body is not None:
            file.write_bytes(body)
        good, text = data(command, copy, *(["--cache_dir", tmp_path] if command == "cache" else []))
        assert not good, body
        assert any(said in text for said in (name, "metadata.jsonl", "a manifest of val only")), (
            text
        )


def _fill(picture, kind):
    picture.unlink()
    if kind == "folder":
        picture.mkdir()
    elif kind == "pipe":
        os.mkfifo(picture)
    elif kind == "loop":
        picture.symlink_to(picture)
    elif kind == "dangling":
        picture.symlink_to(picture.with_name("nothing"))
    elif kind is not None:
        picture.write_bytes(kind)


KINDS = [
    None,
    "folder",
    "pipe",
    "loop",
    "dangling",
    b"",
    b"<html>",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
]
KINDS += [b"\xff\xd8\xff\xe0" * 20, b"II*\0" + b"\xff" * 40, b"BM" + b"\xff" * 60, b"RIFF1234WEBP"]
KINDS += [b"P6 99999999 9999999 255\n", b"P5 8 8 65535\n", b"%!PS", b"\0" * 4096]


@pytest.mark.parametrize("faces", ["annotation", "mtcnn"])
def test_a_picture_of_any_kind(faces, world, people, tmp_path):
    root = Path(
        shutil.copytree(world, tmp_path / "coco", ignore=shutil.ignore_patterns("m*.json*"))
    )
    for kind, picture in zip(KINDS, sorted((root / "train2017").glob("*.png"))):
        _fill(picture, kind)
    assert not data("build", root, "--split", "train", "--faces", faces)[0]
    good, text = data("build", root, "--split", "train", "--faces", faces, "--max_bad", 1)
    assert good and f"pictures that cannot be used: {len(KINDS)}" in text, text
    out = tmp_path / "moved"
    assert data("build", world, "--out", out, "--faces", "none")[0]
    for split in ("train", "val"):
        rows = out / split / "metadata.jsonl"
        assert rows.is_file()


NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "x",
    "",
    " ",
    "0x10",
    "1,5",
    "\ud800",
    "--",
    "9" * 400,
]
FLAGS = dict(
    build="--min_area --min_person --min_faces --min_face --min_score --max_overlap --on_person --max_bad",
    faces="--min_area --min_face --min_score --shard --device",
    download="--workers --give_up --limit --retries --wait --timeout --min_area",
    inspect="--n --seed --side --columns",
    check="--full --most",
    calibrate="--train --val --area_rule",
    cache="--workers --shard --device --size --mixed_precision --crop --preset",
)


@pytest.mark.parametrize("command", FLAGS)
def test_a_flag_of_any_value(command, tmp_path):
    "None of these is a number, a share of the work, or a device."
    endless = "most give_up seed limit train val min_faces"  # may have any number of digits
    for flag in FLAGS[command].split():
        for value in NUMBERS[: -1 if flag.strip("-") in endless.split() else None]:
            good, text = data(command, tmp_path / "nowhere", f"{flag}={value}")
            assert not good and flag.strip("-") in text, (flag, value, text)
            assert "nowhere" not in text.strip().split("\n")[-1], (flag, value, text)


PATHS = [
    "",
    ".",
    "/",
    "/dev/null",
    "/dev/zero",
    "\ud800",
    "a\nb",
    "\0",
    "x" * 5000,
    "~",
    "http://x",
]


@pytest.mark.parametrize("command", FLAGS)
def test_a_place_of_any_name(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for path in [*PATHS, "file", "file/below"]:
        if command == "download":
            how = ("--url", "nowhere", "--retries", 0)
            if path in ("/", "."):
                continue
        else:
            how = ()
        assert not data(command, path, *how)[0], path


@pytest.mark.parametrize("command", ["build", "inspect", "faces"])
def test_output_that_cannot_be_written(command, world, people, tmp_path):
    (tmp_path / "file").write_text("")
    source = people if command == "inspect" else world
    for out in ("file", "file/below", "x" * 300, "a\0b", "\ud800"):
        good, text = data(command, source, "--out", tmp_path / out)
        assert not good, text


URLS = ["x", "file:///etc/passwd", "http://", "http://[", "http://127.0.0.1:99999/", "http://a b/"]
URLS += ["ftp://127.0.0.1/", "http://127.0.0.1:9/x", "http://\n/", "http://\ud800/", "\0"]


@pytest.mark.parametrize("url", URLS, ids=ascii)
def test_an_address_of_any_kind(url, world, tmp_path):
    how = ("--retries", 0, "--timeout", 2, "--split", "val")
    assert not data("download", tmp_path / "new", "--url", url, *how)[0]
    shutil.copytree(Path(world) / "annotations", tmp_path / "coco" / "annotations")
    assert not data("download", tmp_path / "coco", "--mirror", url, *how)[0]
