"Shards: several processes, a web server of this machine, and what can go wrong on the way."

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "(PersonDataset, folder with seven uneven shards)"
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.manifest import build_manifest
    from masked_ldm.data.tar_shards import write_shards
    from masked_ldm.toy.scenes import write_world

    tmp = tmp_path_factory.mktemp("stream")
    ds = PersonDataset(build_manifest(write_world(tmp / "world", 40, 4), "train"), 64)
    write_shards(ds, tmp / "shards", 6)
    return ds, tmp / "shards"


@pytest.fixture
def server(data):
    "(URL of the shards, what was asked for, faults: {path: what to do instead of handing it out})"
    asked, faults = Counter(), {}

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            asked[self.path] += 1
            fault = faults.get(self.path)
            if not fault or not fault(self):
                super().do_GET()

    s = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=data[1]))
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}", asked, faults
    s.shutdown()
    s.server_close()


NODE = """
import json, sys
from torch.utils.data import DataLoader
from masked_ldm.data.dataset import collate
from masked_ldm.data.tar_shards import StreamDataset
if __name__ == "__main__":
    out = {}
    for epoch in range(2):
        ds = StreamDataset(sys.argv[1], 64, epoch=epoch); loader = DataLoader(ds, 4, collate_fn=collate, num_workers=2, multiprocessing_context=sys.argv[2])
        out[epoch] = [i for b in loader for i in b.image_ids]; out["node"] = list(ds.node)
    print(json.dumps(out))
"""


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_two_nodes_of_two_workers(data, server, tmp_path, context):
    "Each node a process that torch's launcher would have started, each with two workers, over the web server: every picture once, in both epochs, in another order."
    ds, _ = data
    script = tmp_path / "node.py"
    script.write_text(NODE)
    jobs = [
        subprocess.Popen(
            [sys.executable, str(script), f"{server[0]}/index.json", context],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RANK": str(r), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for r in range(2)
    ]
    said = [j.communicate() for j in jobs]
    assert not any(j.returncode for j in jobs), said
    got = [json.loads(o) for o, _ in said]
    want = Counter(r["image_id"] for r in ds.rows)
    assert [g["node"] for g in got] == [[0, 2], [1, 2]]
    for e in "01":
        assert Counter(got[0][e] + got[1][e]) == want and abs(len(got[0][e]) - len(got[1][e])) <= 1
    assert got[0]["0"] != got[0]["1"]


def test_same_bytes_whoever_writes(data, tmp_path):
    code = "import sys; from masked_ldm.data.dataset import PersonDataset; from masked_ldm.data.tar_shards import write_shards; i = int(sys.argv[3]); write_shards(PersonDataset(sys.argv[1], 64), sys.argv[2], 6, (i, 3))"
    ds, shards = data
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(ds.folder / "metadata.jsonl"), str(tmp_path), str(i)]
        )
        for i in range(3)
    ]
    assert not any(j.wait() for j in jobs)
    from masked_ldm.data.tar_shards import index_shards

    index_shards(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in shards.iterdir()
    }


@pytest.mark.parametrize("workers", [0, 1, 5, 9])
def test_more_workers_than_shards(data, workers):
    from masked_ldm.data.dataset import collate
    from masked_ldm.data.tar_shards import StreamDataset

    ds, shards = data
    d = StreamDataset(shards, 64, epoch=1)
    assert len(d.index["shards"]) == 7
    ids = [
        i
        for b in torch.utils.data.DataLoader(d, 3, collate_fn=collate, num_workers=workers)
        for i in b.image_ids
    ]
    assert Counter(ids) == Counter(r["image_id"] for r in ds.rows)
    n = d.steps(2, workers)
    assert n <= sum(
        1
        for _ in torch.utils.data.DataLoader(
            d, 2, collate_fn=collate, num_workers=workers, drop_last=True
        )
    )


def refuse(code):
    def f(h):
        h.send_error(code)
        return True

    return f


def half(h):
    "The length of the whole, the first half of the bytes, and then nothing."
    body = open(h.translate_path(h.path), "rb").read()
    h.send_response(200)
    h.send_header("Content-Length", str(len(body)))
    h.end_headers()
    h.wfile.write(body[: len(body) // 2])
    h.close_connection = True
    return True


def page(h):
    h.send_response(200)
    h.send_header("Content-Length", "6")
    h.end_headers()
    h.wfile.write(b"<html>")
    return True


@pytest.mark.parametrize(
    "fault, said, asked_for",
    [
        (refuse(404), "the server says 404 Not Found", 1),
        (refuse(403), "403 Forbidden", 1),
        (refuse(503), "the server says 503", 3),
        (half, "IncompleteRead", 3),
        (page, "it has 6 of", 3),
    ],
    ids=["404", "403", "503", "half", "page"],
)
def test_shard_that_does_not_come(data, server, monkeypatch, fault, said, asked_for):
    from masked_ldm.data import tar_shards as stream

    url, asked, faults = server
    monkeypatch.setattr(stream.time, "sleep", lambda s: None)
    faults["/00003.tar"] = fault
    with pytest.raises(OSError) as e:
        list(stream.StreamDataset(f"{url}/index.json", 64))
    assert (
        f"shard {url}/00003.tar cannot be read: " in str(e.value)
        and said in str(e.value)
        and "\n" not in str(e.value)
        and asked["/00003.tar"] == asked_for
    ), str(e.value)


def test_server_that_stumbles_is_asked_again(data, server, monkeypatch):
    from masked_ldm.data import tar_shards as stream

    url, asked, faults = server
    monkeypatch.setattr(stream.time, "sleep", lambda s: None)
    faults.update(
        {
            f"/{k:05d}.tar": lambda h, f=f: asked[h.path] < 3 and f(h)
            for k, f in enumerate((refuse(503), half, page))
        }
    )
    ids = [s["image_id"] for s in stream.StreamDataset(f"{url}/index.json", 64)]
    assert Counter(ids) == Counter(r["image_id"] for r in data[0].rows) and asked["/00001.tar"] == 3


def test_nobody_there(monkeypatch):
    from masked_ldm.data import tar_shards as stream

    monkeypatch.setattr(stream.time, "sleep", lambda s: None)
    with pytest.raises(
        OSError, match="index http://127.0.0.1:9/index.json cannot be read: .*refused"
    ):
        stream.StreamDataset("http://127.0.0.1:9/index.json", 64)


def test_broken_on_disk(data, tmp_path):
    "A flipped bit, a truncated file, one that is gone: one sentence, also out of a data worker."
    import shutil

    from masked_ldm.data.dataset import collate
    from masked_ldm.data.tar_shards import StreamDataset, index_shards

    for name, hurt, said in (
        (
            "flip",
            lambda b: b[:700] + bytes([b[700] ^ 1]) + b[701:],
            "its bytes are not those that were written",
        ),
        ("cut", lambda b: b[: len(b) // 2], "bytes"),
        ("gone", None, "there is no such file"),
    ):
        folder = tmp_path / name
        shutil.copytree(data[1], folder)
        p = folder / "00002.tar"
        p.write_bytes(hurt(p.read_bytes())) if hurt else p.unlink()
        for workers in (0, 2):
            with pytest.raises(OSError) as e:
                list(
                    torch.utils.data.DataLoader(
                        StreamDataset(folder, 64), 4, collate_fn=collate, num_workers=workers
                    )
                )
            assert f"shard {p} cannot be read" in str(e.value) and said in str(e.value)
        with pytest.raises(ValueError, match="is damaged: write it again|6 of 7 shards"):
            index_shards(folder)


def test_picture_that_cannot_be_used_does_not_get_in(data, tmp_path):
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.tar_shards import write_shards

    ds = PersonDataset(data[0].folder / "metadata.jsonl", 64)
    ds.rows[7]["file_name"] = "gone.png"
    with pytest.raises(OSError, match="gone.png is missing"):
        write_shards(ds, tmp_path / "s", 6)
    assert not (tmp_path / "s" / "index.json").exists()


def test_shards_open_in_datasets(data):
    "Hugging Face's reader takes the same files."
    datasets = pytest.importorskip("datasets")
    ds, shards = data
    got = list(
        datasets.load_dataset(
            "webdataset",
            data_files=[str(p) for p in sorted(shards.glob("*.tar"))],
            split="train",
            streaming=True,
        )
    )
    assert [g["json"]["image_id"] for g in got] == [r["image_id"] for r in ds.rows] and got[0][
        "png"
    ].size == (64, 64)


@pytest.mark.skipif(
    "MASKED_LDM_COCO" not in os.environ, reason="needs MASKED_LDM_COCO, a folder in COCO's layout"
)
def test_photographs_through_cache_and_shards(tmp_path):
    "JPEG files of any shape, cached with the crop that looks at people, packed, and streamed back as the samples they were."
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.latent_cache import LatentCache, build_cache
    from masked_ldm.data.manifest import build_manifest
    from masked_ldm.data.tar_shards import StreamDataset, write_shards
    from masked_ldm.models import load_base

    ds = PersonDataset(
        build_manifest(os.environ["MASKED_LDM_COCO"], "val", tmp_path / "list", faces="none"),
        64,
        crop="people",
    )
    base = load_base()
    build_cache(ds, base, tmp_path / "cache", rows=8)
    ds.cache = LatentCache(tmp_path / "cache")
    write_shards(ds, tmp_path / "shards", 8)
    got = {s["image_id"]: s for s in StreamDataset(tmp_path / "shards", 64, crop="people", epoch=2)}
    assert len(got) == len(ds)
    for i, r in enumerate(ds.rows):
        a, b = got[r["image_id"]], ds[(2, i)]
        assert a["caption"] == b["caption"] and all(
            torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k])
        )
        assert torch.allclose(a["moments"], base.moments(a["pixels"][None])[0], atol=1e-4)
    (tmp_path / "shards" / "00000.tar").unlink()
    with pytest.raises(ValueError, match="crop 'people'; asked for are 64 px, crop 'center'"):
        StreamDataset(tmp_path / "shards", 64)


@pytest.mark.parametrize(
    "name",
    [
        "pipe:touch RAN",
        "pipe:touch RAN #.tar",
        "../00000.tar",
        "/etc/hostname",
        "http://elsewhere/00000.tar",
        "file:///etc/hostname",
        "00000.tar\n",
        "",
        None,
        3,
    ],
)
@pytest.mark.parametrize("by", ["path", "server"])
def test_index_that_names_something_else(data, server, tmp_path, name, by):
    "An index from elsewhere can make a reader run no command and read no other file or server; it is refused before anything it names is opened."
    from masked_ldm.data.tar_shards import StreamDataset

    url, asked, faults = server
    index = json.loads((data[1] / "index.json").read_text())
    index["shards"][0]["name"] = (
        name.replace("RAN", str(tmp_path / "ran")) if isinstance(name, str) else name
    )
    body = json.dumps(index).encode()

    def hand_out(h):
        h.send_response(200)
        h.send_header("Content-Length", str(len(body)))
        h.end_headers()
        h.wfile.write(body)
        return True

    faults["/index.json"] = hand_out
    (tmp_path / "index.json").write_bytes(body)
    with pytest.raises(ValueError, match="names a shard"):
        list(StreamDataset(tmp_path if by == "path" else f"{url}/index.json", 64))
    assert not (tmp_path / "ran").exists() and set(asked) <= {"/index.json"}


@pytest.mark.parametrize(
    "where",
    [
        "pipe:touch RAN",
        "PIPE:touch RAN; cat http://x/index.json",
        "s3://bucket/index.json",
        "file:///index.json",
    ],
)
def test_no_command_and_no_other_protocol(data, tmp_path, where):
    from masked_ldm.data.tar_shards import fetch, read_shard

    where = where.replace("RAN", str(tmp_path / "ran"))
    entry = json.loads((data[1] / "index.json").read_text())["shards"][0]
    for f in (lambda: fetch(where, "index"), lambda: read_shard(where, dict(entry, name=where))):
        with pytest.raises(
            OSError, match="cannot be read: (only paths, http|there is no such file)"
        ):
            f()
    assert not (tmp_path / "ran").exists()


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("before", [3, 20])
def test_folder_that_held_another_set(data, tmp_path, before):
    "More shards before, or fewer: the folder is turned into the new set and nothing of the old one stays."
    from masked_ldm.data.tar_shards import write_shards

    ds, shards = data
    write_shards(ds, tmp_path, before)
    write_shards(ds, tmp_path, 6)
    assert content(tmp_path) == content(shards)


def test_index_ignores_what_was_there_before(data, tmp_path):
    "Also where a job of another set left shards beyond the last."
    import shutil

    from masked_ldm.data.tar_shards import index_shards, write_shards

    ds, shards = data
    write_shards(ds, tmp_path / "old", 3)
    shutil.copytree(shards, tmp_path / "new")
    n = len(list(shards.glob("*.tar")))
    for p in (tmp_path / "old").iterdir():
        if p.stem.isdigit() and int(p.stem) >= n:
            shutil.copy(p, tmp_path / "new")
    (tmp_path / "new" / "index.json").unlink()
    assert index_shards(tmp_path / "new").read_bytes() == (shards / "index.json").read_bytes()


def test_broken_off_and_gone_on_with(data, tmp_path, monkeypatch):
    "An index never speaks of shards that are being written anew; what is whole is not written twice; a picture that was replaced is."
    import shutil

    from masked_ldm.data import tar_shards as stream
    from masked_ldm.data.dataset import PersonDataset

    shards, root = data[1], tmp_path / "world"
    shutil.copytree(data[0].folder, root)
    ds = PersonDataset(root / "metadata.jsonl", 64)
    out = tmp_path / "s"
    stream.write_shards(ds, out, 20)
    packed, real = [], stream.tar_sample

    def stops(d, i):
        if i == 14:
            raise KeyboardInterrupt
        packed.append(i)
        return real(d, i)

    monkeypatch.setattr(stream, "tar_sample", stops)
    with pytest.raises(KeyboardInterrupt):
        stream.write_shards(ds, out, 6)
    assert not (out / "index.json").exists()
    with pytest.raises(OSError, match="there is no such file"):
        stream.StreamDataset(out, 64)
    packed.clear()
    monkeypatch.setattr(stream, "tar_sample", lambda d, i: packed.append(i) or real(d, i))
    stream.write_shards(ds, out, 6)
    whole = content(shards)
    counts = [s["pictures"] for s in json.loads(whole["index.json"])["shards"]]
    assert packed == list(range(sum(counts[:2]), len(ds))) and content(out) == whole
    packed.clear()
    stream.write_shards(ds, out, 6)
    assert not packed and content(out) == whole
    a, b = (root / ds.rows[i]["file_name"] for i in (0, 39))
    shutil.copy(b, a)
    stream.write_shards(ds, out, 6)
    assert packed == list(range(counts[0]))
    (out / "00004.tar").write_bytes(b"half")
    packed.clear()
    stream.write_shards(ds, out, 6)
    assert len(packed) == counts[4] and {s["image_id"] for s in stream.StreamDataset(out, 64)} == {
        r["image_id"] for r in ds.rows
    }


@pytest.mark.parametrize("format, kind", [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_links_to_names_without_an_extension(tmp_path, format, kind):
    "As in a folder of Hugging Face's cache: what a picture is, its bytes say."
    from PIL import Image

    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.manifest import build_manifest
    from masked_ldm.data.tar_shards import StreamDataset, read_index, read_shard, write_shards
    from masked_ldm.toy.scenes import write_world

    root = write_world(tmp_path / "world", 8, 4)
    (tmp_path / "blobs").mkdir()
    for p in (root / "train2017").glob("*.png"):
        blob = tmp_path / "blobs" / p.stem
        Image.open(p).convert("RGB").save(blob, format)
        p.unlink()
        p.symlink_to(blob)
    ds = PersonDataset(build_manifest(root, "train", faces="none"), 64)
    write_shards(ds, tmp_path / "s", 3)
    base, index = read_index(tmp_path / "s")
    assert all(kind in parts for e in index["shards"] for parts in read_shard(base, e))
    for a, i in zip(StreamDataset(tmp_path / "s", 64, epoch=None), range(len(ds))):
        assert torch.equal(a["pixels"], ds[i]["pixels"])


def test_set_that_does_not_fill_a_batch(data):
    from masked_ldm.data.tar_shards import StreamDataset

    d = StreamDataset(data[1], 64, node=(0, 2))
    assert d.steps(20) == 1
    with pytest.raises(
        ValueError,
        match=r"40 pictures shared by 2 node\(s\) of 3 worker\(s\) do not fill a batch of 8 each",
    ):
        d.steps(8, 3)
