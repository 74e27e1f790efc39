"The face pass over processes, and faces in real photographs (MASKED_LDM_COCO)."

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import papermill

COCO_ROOT = os.environ.get("MASKED_LDM_COCO")
photographs = pytest.mark.skipif(not COCO_ROOT, reason="MASKED_LDM_COCO names no COCO root")

# ---- many processes, kills, corrupt chunks
PASS = """
import masked_ldm.data.face_pass as face_pass
from masked_ldm.data.manifest import build_manifest, run_face_pass

face_pass.CHUNK = 6
if {shard!r}:
    print(run_face_pass({root!r}, "train", {out!r}, {shard!r}, "cpu", min_face=16))
else:
    print(build_manifest({root!r}, "train", {out!r}, faces="mtcnn", min_face=16, device="cpu"))
"""


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    import masked_ldm.data.face_pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_ldm.data.face_pass, "CHUNK", 6)
        yield


def build(root, out, split="train", **rule):
    "In this process."
    from masked_ldm.data.manifest import build_manifest

    return build_manifest(
        root, split, out, faces="mtcnn", device="cpu", **dict(dict(min_face=16), **rule)
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A small world of pictures large enough for MTCNN."
    from masked_ldm.toy.scenes import write_world

    return write_world(tmp_path_factory.mktemp("drawn") / "world", 36, 2, size=128)


def start(root, out, shard=None):
    return subprocess.Popen(
        [sys.executable, "-c", PASS.format(root=str(root), out=str(out), shard=shard)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    "What they printed; all must succeed."
    said = [p.communicate(timeout=500)[0] for p in processes]
    assert not any(p.returncode for p in processes), said
    return said


def everything(out):
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
    "The folder of one undisturbed pass."
    out = tmp_path_factory.mktemp("pass") / "whole"
    build(drawn, out)
    return out


def test_the_pass_finds_faces(whole):
    info = json.loads((whole / "manifest.json").read_text())
    assert (
        info["faces"] == "mtcnn"
        and info["face_boxes"] > 5
        and len(list((whole / ".faces").iterdir())) == -(-info["kept"] // 6)
    )


def test_two_processes_give_the_same_bytes(drawn, whole):
    out = whole.parent / "split"
    finish(*(start(drawn, out, f"{i}/2") for i in range(2)))
    assert not (out / "manifest.json").exists()
    before = everything(out)
    build(drawn, out)
    after = everything(out)
    assert {k: after[k] for k in before} == before  # nothing was done twice
    assert after == everything(whole)


def test_killed_and_started_again_is_never_killed(drawn, whole):
    out = whole.parent / "killed"
    p = start(drawn, out)
    while p.poll() is None and not (out / ".faces" / "chunk-00001.json").exists():
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()
    made = {q: q.stat().st_mtime_ns for q in (out / ".faces").glob("chunk-*.json")}
    assert len(made) >= 2 and not (out / "manifest.json").exists()
    left_behind = out / ".faces" / f".chunk-00004.json.{platform.node()}-{p.pid}.tmp"
    left_behind.write_text("{half")  # what a kill between the two steps leaves
    build(drawn, out)
    assert all(q.stat().st_mtime_ns == t for q, t in made.items()), (
        "finished chunks were made again"
    )
    assert everything(out) == everything(whole)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b.replace(b'"score": 0.9', b'"score": 0.8', 1),
        lambda b: b"{}",
    ],
)
def test_a_corrupt_chunk_is_made_again_and_said_so(spoil, drawn, whole, capsys):
    out = whole.parent / "corrupt"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out)
    bad = max((out / ".faces").iterdir(), key=lambda p: p.read_bytes().count(b'"score": 0.9'))
    bad.write_bytes(spoil(bad.read_bytes()))
    build(drawn, out)
    assert f"{bad} is damaged: it is made again" in capsys.readouterr().out and everything(
        out
    ) == everything(whole)


def test_another_rule_makes_the_chunks_again(drawn, whole, capsys):
    from masked_ldm.data.manifest import load_manifest

    out = whole.parent / "rule"
    shutil.copytree(whole, out)
    strict = load_manifest(build(drawn, out, min_face=40))[1]
    assert (
        strict["face_rule"]["min_face"] == 40
        and strict["face_boxes"] < json.loads((whole / "manifest.json").read_text())["face_boxes"]
        and "of other pictures or settings: it is made again" in capsys.readouterr().out
    )


def test_shards_on_the_command_line(drawn, whole, tmp_path, capsys):
    from masked_ldm.data.command import main

    place = [str(drawn), "--split", "val", "--out", str(tmp_path / "two")]
    how = ["--min_face", "16", "--device", "cpu"]
    for i in (1, 0):
        main(["faces", *place, *how, "--shard", f"{i}/2"])
    assert "val, shard 0/2: found faces are in" in capsys.readouterr().out
    assert not (tmp_path / "two" / "val" / "manifest.json").exists()
    main(["build", *place, *how, "--faces", "mtcnn"])
    build(drawn, tmp_path / "one" / "val", "val")
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


def test_datasets_reads_past_the_chunks(drawn, tmp_path):
    "The chunks beside the pictures do not confuse Hugging Face's imagefolder."
    from datasets import load_dataset

    from masked_ldm.data.manifest import load_manifest

    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    path = build(root, None, "val")
    assert (path.parent / ".faces").is_dir()
    assert len(
        load_dataset(
            "imagefolder",
            data_dir=str(path.parent),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
    ) == len(load_manifest(path)[0])


# ---- photographs
@pytest.fixture(scope="module")
def shots():
    "(manifest rows with the file name, photographs) of both splits."
    from masked_ldm.data.filtering import FilterRule, select_images
    from masked_ldm.data.images import read_image

    rows, images = [], []
    for split in ("train", "val"):
        for r in select_images(COCO_ROOT, split, FilterRule(0.0))[0]:
            rows.append(r)
            images.append(
                read_image(
                    Path(COCO_ROOT) / f"{split}2017" / r["file_name"], (r["width"], r["height"])
                )
            )
    return rows, images


@photographs
def test_faces_alone_are_the_librarys(shots):
    "On a CPU: for each photograph exactly the faces that facenet-pytorch finds in it alone, whatever lies beside it."
    from facenet_pytorch import MTCNN

    from masked_ldm.data.faces import detect_faces

    net, n = MTCNN(keep_all=True, min_face_size=20), 0
    some = shots[1][:12]
    for im, (b, s), (c, t) in zip(some, detect_faces(some), detect_faces(some[::-1])[::-1]):
        assert torch.equal(b, c) and torch.equal(s, t)
        boxes, scores = net.detect(im)
        boxes = np.zeros((0, 4), np.float32) if boxes is None else boxes.astype(np.float32)
        boxes = boxes.clip(0, np.float32([im.width, im.height] * 2))
        keep = (np.array([v or 0 for v in scores[: len(boxes)]], float) >= 0.9) & (
            (boxes[:, 2:] - boxes[:, :2]).min(1, initial=9e9) >= 20
        )
        assert {tuple(v) for v in b.tolist()} == {tuple(v) for v in boxes[keep].tolist()}
        n += len(b)  # no two of them overlap by half
    print(f"{n} faces of 20 pixels in {len(some)} photographs")
    assert n > 5


@photographs
def test_batches_agree_with_single_photographs(shots):
    from masked_ldm.data.faces import detect_faces

    some = shots[1][:12]
    one, many = detect_faces(some), detect_faces(some, batch_size=16)
    gap = max(float((a - b).abs().max()) for (a, _), (b, _) in zip(one, many) if len(a))
    print(f"a batch moves boxes by at most {gap:.1e} pixels")
    assert [len(b) for b, _ in one] == [len(b) for b, _ in many] and gap < 1e-2


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    "What the experiment counts on the photographs: the report of faces_found.ipynb."
    tmp = tmp_path_factory.mktemp("faces_found")
    code, text = papermill(
        tmp / "o.ipynb",
        ("coco_root", COCO_ROOT),
        ("out", tmp / "report.json"),
        notebook="nbs/experiments/faces_found.ipynb",
    )
    assert code == 0, text
    return json.loads((tmp / "report.json").read_text())


@photographs
def test_precision_against_keypoints(counted):
    "Two ways to a face that know nothing of each other: pixels and marked joints."
    on_people = counted["agreement"]["on a person"]
    assert on_people["precision"] >= 0.9
    assert on_people["recall"] >= 0.4
    assert on_people["iou"] >= 0.6
    assert on_people["right"] + on_people["wrong"] >= 20
    assert counted["agreement"]["anywhere"]["precision"] <= on_people["precision"]


@photographs
def test_the_people_crop_keeps_more_faces(counted):
    people, center = counted["crops"]["people"], counted["crops"]["center"]
    assert people["faces"] > center["faces"]
    assert people["people"] > center["people"]


@photographs
def test_full_check_of_the_photographs(tmp_path):
    from masked_ldm.data.manifest import build_manifest, load_manifest

    for split in ("train", "val"):
        assert (
            load_manifest(
                build_manifest(COCO_ROOT, split, tmp_path / split, faces="keypoints", verify="full")
            )[1]["quarantined"]
            == []
        )
