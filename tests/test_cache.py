"The cache of latents and text: faults, processes, and a run that uses it."

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import train_by_two
from safetensors.torch import load, load_file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "(manifest, cache folder) of a small world."
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.latent_cache import build_cache
    from masked_ldm.data.manifest import build_manifest
    from masked_ldm.models import load_base
    from masked_ldm.toy.scenes import write_world

    tmp = tmp_path_factory.mktemp("cache")
    manifest = build_manifest(write_world(tmp / "world", 32, 4), "train")
    build_cache(PersonDataset(manifest, 64), load_base(), tmp / "latents", rows=8)
    return manifest, tmp / "latents"


BUILD = """
import sys
from masked_ldm.data.latent_cache import build_cache
from masked_ldm.data.dataset import PersonDataset
from masked_ldm.models import load_base
i, n = map(int, sys.argv[3].split("/"))
try: print(len(build_cache(PersonDataset(sys.argv[1], 64), load_base(), sys.argv[2], rows=8, shard=(i, n), workers=int(sys.argv[4]))))
except (OSError, ValueError) as e: raise SystemExit(f"refused: {e}")
"""


def build(manifest, folder, shard="0/1", workers=0, **kw):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(manifest), str(folder), shard, str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def again(manifest, folder, **how):
    "In this process."
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.latent_cache import build_cache
    from masked_ldm.models import load_base

    return build_cache(PersonDataset(manifest, 64), load_base(), folder, rows=8, **how)


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_jobs_at_once_give_the_same_bytes(made, tmp_path):
    "Three processes, one of them with data workers, into one folder."
    manifest, whole = made
    jobs = [build(manifest, tmp_path / "c", f"{i}/3", 2 * (i == 1)) for i in range(3)]
    said = [j.communicate()[0] for j in jobs]
    assert not any(j.returncode for j in jobs), said
    assert content(tmp_path / "c") == content(whole)


def test_killed_and_started_again(made, tmp_path):
    "SIGKILL after the first shard: what is whole stays, what is half written goes, the result is the same."
    manifest, whole = made
    folder = tmp_path / "c"
    job = build(manifest, folder)
    end = time.time() + 120
    while not list(folder.glob("0*.safetensors")) and time.time() < end:
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    left = folder / f".00002.safetensors.{platform.node()}-{job.pid}.tmp"
    left.write_bytes(b"half")
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("0*.safetensors")}
    said = []
    again(manifest, folder, say=said.append)
    assert not said and content(folder) == content(whole)
    assert all((folder / n).stat().st_mtime_ns == t for n, t in before.items())


def test_no_room(made, tmp_path, monkeypatch):
    "Not enough space is said before anything is encoded; a disk that fills up names the shard and leaves no rubbish."
    import shutil

    manifest, _ = made
    job = build(
        manifest,
        tmp_path / "c",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    said = job.communicate()[0]
    assert (
        job.returncode == 1
        and "refused: cache shard" in said
        and "00000.safetensors cannot be written" in said
        and "make room" in said
        and "Traceback" not in said
    ), said
    assert not list((tmp_path / "c").iterdir())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(OSError, match="GB left: name another cache_dir"):
        again(manifest, tmp_path / "e")


@pytest.mark.parametrize(
    "hurt",
    [
        lambda b: b[:-1],
        lambda b: b"",
        lambda b: b"\x80\x04." + b[3:],
        lambda b: b[:8] + b"X" + b[9:],
        lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:],
        lambda b: b.replace(b'"shard\\": 1', b'"shard\\": 2'),
    ],
    ids=["truncated", "empty", "pickle", "header", "bit", "renumbered"],
)
def test_hurt_shard_is_made_again(made, tmp_path, hurt):
    import shutil

    manifest, whole = made
    folder = tmp_path / "c"
    shutil.copytree(whole, folder)
    p = folder / "00001.safetensors"
    old = p.read_bytes()
    p.write_bytes(hurt(old))
    assert p.read_bytes() != old
    said = []
    assert list(again(manifest, folder, say=said.append)) == [p.name] and p.read_bytes() == old
    (sentence,) = said
    assert sentence.startswith(f"cache shard {p} ") and sentence.endswith("it is made again")


def test_another_version_crop_or_caption_is_made_again(made, tmp_path, monkeypatch):
    import shutil

    from masked_ldm.data import latent_cache as cache
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.models import load_base

    manifest, whole = made
    folder = tmp_path / "c"
    shutil.copytree(whole, folder)
    base, ds, said = load_base(), PersonDataset(manifest, 64), []

    def go():
        return cache.build_cache(ds, base, folder, rows=8, say=said.append)

    assert go() == {}
    ds.rows[9]["captions"][2] += "!"
    assert list(go()) == ["00001.safetensors"] and "other pictures or captions" in said[-1]
    monkeypatch.setattr(cache, "CACHE_VERSION", 99)
    assert len(go()) == 4 and "version was 1, is 99" in said[-1]
    ds.crop = "people"
    assert len(go()) == 4 and "crop was 'center', is 'people'" in said[-1] and go() == {}
    ds.rows[0]["faces"] = []
    assert list(go()) == ["00000.safetensors"]  # a crop that looks at faces
    ds.crop = "center"
    go()
    ds.rows[0]["faces"] = [1]
    assert go() == {}  # one that does not
    (folder / "00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00003.safetensors is missing"):
        cache.LatentCache(folder)


def test_missing_picture_is_named(made, tmp_path):
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.latent_cache import build_cache
    from masked_ldm.models import load_base

    ds = PersonDataset(made[0], 64)
    ds.rows[5]["file_name"] = "gone.png"
    with pytest.raises(OSError, match="gone.png cannot be read"):
        build_cache(ds, load_base(), tmp_path / "c", rows=8)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(made, context):
    "Also when the file is already open in the parent."
    from masked_ldm.data.dataset import PersonDataset, batch_keys, collate
    from masked_ldm.data.latent_cache import LatentCache

    ds = PersonDataset(made[0], 64, cache=LatentCache(made[1]))
    keys = list(batch_keys(len(ds), 4, 0, 0, 7))
    here = [collate([ds[k] for k in ks]) for ks in keys]
    there = list(
        torch.utils.data.DataLoader(
            ds,
            batch_sampler=keys,
            collate_fn=collate,
            num_workers=1,
            multiprocessing_context=context,
        )
    )
    assert len(here) == len(there) == 7
    for a, b in zip(here, there):
        assert (
            torch.equal(a.moments, b.moments)
            and torch.equal(a.text, b.text)
            and a.captions == b.captions
        )


def test_cached_run_is_the_run(tmp_path, quick, capsys):
    "Three steps with and without, empty prompts included; killed cache, resumed run."
    from masked_ldm.train import TrainConfig, train

    quick = {**quick, "cache_dir": str(tmp_path / "cache"), "val_pictures": 0}
    how = dict(T=400, proportion_empty_prompts=0.4)
    curves = {}
    for on in (False, True):
        given = dict(quick, out_dir=str(tmp_path / str(on)), max_steps=3)
        curves[on] = train(TrainConfig.make(**given, **how, cache_latents=on)).history
    for a, b in zip(*curves.values()):
        assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(
            a["grad_norm"] - b["grad_norm"]
        ) < 1e-3 * max(1, a["grad_norm"]), (a, b)
    (folder,) = (tmp_path / "cache").glob("*-latents-*")
    shard = folder / "00000.safetensors"
    b = shard.read_bytes()
    whole = load(b)
    shard.write_bytes(b[:-8])
    given = dict(quick, out_dir=str(tmp_path / "True"), max_steps=4, resume="latest")
    train(TrainConfig.make(**given, **how, cache_latents=True))
    text = capsys.readouterr().out
    assert "00000.safetensors is not a whole shard; it is made again" in text, text
    torch.testing.assert_close(load_file(shard), whole)


def test_two_processes_share_the_encoding(tmp_path, quick, monkeypatch):
    "Each makes its part, both read the whole; the curve is that of one process."
    from masked_ldm.train import TrainConfig, train

    quick = {**quick, "cache_dir": str(tmp_path / "cache")}
    one = train(
        TrainConfig.make(**{**quick, "val_pictures": 0, "max_steps": 2, "cache_latents": True})
    )
    two = {
        **quick,
        "val_pictures": 0,
        "max_steps": 2,
        "cache_latents": "true",
        "out_dir": str(tmp_path / "two"),
        "cache_dir": str(tmp_path / "other"),
    }
    code, text = train_by_two(two)
    assert code == 0, text
    assert json.loads((tmp_path / "two" / "data.json").read_text())["processes"] == 2
    rows = [
        json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    ]
    for a, b in zip(one.history, rows):
        assert abs(a["ldm"] - b["ldm"]) < 1e-4, (a, b)


@pytest.mark.parametrize("crop", ["center", "people"])
@pytest.mark.parametrize("size", [(97, 64), (64, 101), (130, 77)])
def test_mirrored_sample_is_the_mirrored_picture(crop, size):
    "A18, and what the cache relies on: flipping comes last, whatever the crop; every x becomes W - x."
    import numpy as np
    from PIL import Image

    from masked_ldm.data.dataset import transform

    rng = np.random.default_rng(0)
    w, h = size
    image = Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
    mask = np.zeros((1, h, w), np.uint8)
    mask[0, 5:40, 3:30] = 1
    face = [w / 2 - 9, h / 2 - 9, w / 2 + 3, h / 2 + 3]
    joints = torch.zeros(1, 17, 3)
    joints[0, :3] = torch.tensor([w / 2 - 3, h / 2 - 3, 2])  # nose and eyes
    a, b = (transform(image, mask, [face], joints, 48, flip, crop=crop) for flip in (False, True))
    assert torch.equal(a[0].flip(-1), b[0]) and torch.equal(a[1].flip(-1), b[1])
    torch.testing.assert_close(a[2][:, [0, 2]] + b[2][:, [2, 0]], torch.full((1, 2), 48.0))
    torch.testing.assert_close(a[3][0, :3, 0] + b[3][0, :3, 0], torch.full((3,), 48.0))


def test_a_second_pass_leaves_the_first_alone(made, tmp_path):
    "What a process that lives, or one of another machine, has half written stays; what a dead one left goes."
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    there = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    names = {
        w: tmp_path / f".00001.safetensors.{host}-{pid}.tmp"
        for w, host, pid in (
            ("dead", platform.node(), gone.pid),
            ("alive", platform.node(), there.pid),
            ("elsewhere", "node7", gone.pid),
        )
    }
    try:
        for p in names.values():
            p.write_bytes(b"half")
        again(made[0], tmp_path)
    finally:
        there.communicate(b"\n")
    assert {w for w, p in names.items() if p.exists()} == {"alive", "elsewhere"}


def test_cache_of_something_else_is_refused(made, tmp_path):
    "Another size, crop, split, order, or number of captions: at the door, also when it is put in later."
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.latent_cache import LatentCache
    from masked_ldm.data.manifest import build_manifest

    manifest, cache = made[0], LatentCache(made[1])
    for kw, said in (
        (dict(size=32), "size is 64, asked for is 32"),
        (dict(size=64, crop="people"), "crop is 'center', asked for is 'people'"),
    ):
        with pytest.raises(ValueError, match=said):
            PersonDataset(manifest, cache=cache, **kw)
        ds = PersonDataset(manifest, **kw)
        with pytest.raises(ValueError, match=said):
            ds.cache = cache
        assert ds.cache is None
    val = build_manifest(manifest.parent.parent, "val", tmp_path / "val")
    with pytest.raises(ValueError, match="pictures is 32, asked for is"):
        PersonDataset(val, 64, cache=cache)
    ds = PersonDataset(manifest, 64)
    ds.rows = ds.rows[::-1]  # as many
    with pytest.raises(ValueError, match="is of other pictures or captions"):
        ds.cache = cache
    ds = PersonDataset(manifest, 64)
    ds.rows[3]["captions"] = ds.rows[3]["captions"][:-1]
    with pytest.raises(ValueError, match="is of other pictures or captions"):
        ds.cache = cache
    assert PersonDataset(manifest, 64, cache=cache)[3]["moments"] is not None


def test_manifest_is_written_under_a_name_of_its_own(tmp_path, monkeypatch):
    "Two builds at once do not write into each other's files, and one that breaks off leaves the old manifest and no rubbish."
    from masked_ldm.data.manifest import build_manifest, load_manifest
    from masked_ldm.toy.scenes import write_world

    world = write_world(tmp_path / "world", 8, 4)
    out = tmp_path / "out"
    names, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: names.append(Path(a).name) or real(a, b))
    manifest = build_manifest(world, "train", out, faces="none")
    old = content(out)
    assert (
        set(old) == {"metadata.jsonl", "manifest.json"}
        and len(names) == 2
        and all(str(os.getpid()) in n for n in names)
    )

    def full(a, b):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        build_manifest(world, "train", out, faces="keypoints")
    assert content(out) == old and load_manifest(manifest)[0]
