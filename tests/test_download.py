"Fetching annotations and pictures from a server that behaves well, badly, or not at all; everything on the loopback address."

import contextlib
import errno
import http.server
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, in_process
from PIL import Image


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *a):
        pass

    def do_GET(self):
        s = self.server
        first = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        s.asked.append((self.path, first))
        mood = s.moods.get(self.path, s.mood)
        if isinstance(mood, list):
            mood = mood.pop(0) if mood else None
        if s.holds and len(s.asked) > max(s.holds, 0):
            s.go.wait(60)
        if s.dead and len(s.asked) > s.dead:
            self.close_connection = True
            return self.connection.close()
        path = s.folder / self.path.lstrip("/")
        if isinstance(mood, int) or not path.is_file():
            return self.send_error(mood or 404)
        body = dict(
            html=b"<!DOCTYPE html><p>Please log in", empty=b"", bomb=b"\x89PNG\r\n\x1a\n"
        ).get(mood, path.read_bytes())
        if mood == "short":
            body = body[: len(body) // 2]
        if mood == "no range":
            first = 0
        if first > len(body) or (first == len(body) and first):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if s.heeds and self.headers.get("If-Range") not in (None, *s.tags):
            first = 0
        self.send_response(206 if first else 200)
        [self.send_header(k, v) for k, v in zip(("ETag", "Last-Modified"), s.tags) if v]
        self.send_header("Content-Length", str(len(body) - first))
        if first:
            self.send_header(
                "Content-Range",
                f"bytes {first if mood != 'wrong range' else 0}-{len(body) - 1}/{len(body)}",
            )
        self.end_headers()
        sent = body[first:]
        if mood == "dies":
            self.close_connection = True
            sent = sent[: len(sent) // 2]
        self.wfile.write(sent)


@pytest.fixture
def served(world, tmp_path):
    "(server, COCO root with annotations only)"
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.folder, s.moods, s.mood, s.asked, s.dead, s.tags, s.heeds, s.holds, s.go = (
        Path(world),
        {},
        None,
        [],
        0,
        (),
        True,
        0,
        threading.Event(),
    )
    s.url = f"http://127.0.0.1:{s.server_port}"
    threading.Thread(target=s.serve_forever, daemon=True).start()
    root = tmp_path / "coco"
    shutil.copytree(Path(world) / "annotations", root / "annotations")
    yield s, root
    s.go.set()
    s.shutdown()
    s.server_close()


def download(s, root, split="val", **kw):
    from masked_ldm.data.download import download_images
    from masked_ldm.data.filtering import FilterRule

    return download_images(
        root,
        split,
        FilterRule(0.0),
        **dict(dict(mirror=s.url, retries=2, wait=0.01, timeout=5), **kw),
    )


def names(root, split="val"):
    return sorted(p.name for p in (Path(root) / f"{split}2017").glob("*.png"))


def same(s, root, split="val"):
    return all(
        (root / f"{split}2017" / n).read_bytes() == (s.folder / f"{split}2017" / n).read_bytes()
        for n in names(root, split)
    )


def leftovers(root):
    return [p.name for p in Path(root).rglob("*.part*")]


def test_only_what_the_rule_keeps_comes_and_comes_once(served):
    from masked_ldm.data.download import download_images
    from masked_ldm.data.filtering import FilterRule, select_images

    s, root = served
    rule = FilterRule(0.2)
    want = {r["file_name"] for r in select_images(root, "val", rule)[0]}
    how = dict(mirror=s.url, retries=0)
    r = download_images(root, "val", rule, **how)
    assert (
        set(names(root)) == want
        and 0 < len(want) < 12
        and r["fetched"] == len(want) == len(s.asked)
        and not r["failed"]
        and same(s, root)
        and not leftovers(root)
    )
    s.asked.clear()
    r = download_images(root, "val", rule, **how)
    assert (r["fetched"], r["there"], r["bytes"], s.asked) == (0, len(want), 0, [])
    r = download_images(root, "val", FilterRule(0.0), **how)
    assert r["there"] == len(want) and r["fetched"] == r["wanted"] - len(want)
    assert json.loads((root / "download-val.json").read_text()) == r


@pytest.mark.parametrize(
    "mood, wrong, asked",
    [
        (404, "the server says 404", 1),
        (403, "the server says 403", 1),
        (503, "the server says 503", 3),
        ("html", "is a web page", 3),
        ("short", "truncated or damaged", 3),
        ("empty", "is empty", 3),
        ("bomb", "", 3),
        ("dies", "the connection broke off", 3),
    ],
)
def test_a_bad_picture_is_named_and_the_rest_comes(mood, wrong, asked, served):
    s, root = served
    name = sorted(p.name for p in (s.folder / "val2017").glob("*.png"))[4]
    s.moods[f"/val2017/{name}"] = mood
    r = download(s, root)
    assert (
        [f["file_name"] for f in r["failed"]] == [name]
        and wrong in r["failed"][0]["wrong"]
        and r["fetched"] == r["wanted"] - 1
        and name not in names(root)
        and same(s, root)
    )
    assert len([p for p, _ in s.asked if p.endswith(name)]) == asked
    s.moods.clear()
    r = download(s, root)
    assert (r["fetched"], r["failed"]) == (1, []) and same(s, root) and not leftovers(root)


@pytest.mark.parametrize(
    "moods", [[503], [429, 500], ["dies"], ["dies", "dies"], ["short"], ["html", "dies"], ["empty"]]
)
def test_what_passes_is_waited_out(moods, served):
    s, root = served
    for p in (s.folder / "val2017").glob("*.png"):
        s.moods[f"/val2017/{p.name}"] = list(moods)
    r = download(s, root)
    assert not r["failed"] and r["fetched"] == r["wanted"] and same(s, root) and not leftovers(root)


def test_retry_after_is_obeyed(served, monkeypatch):
    from masked_ldm.data import download as d

    s, root = served
    waited = []
    again = d._TryAgain("busy", 7)
    monkeypatch.setattr(d, "_attempt", lambda *a: (_ for _ in ()).throw(again))

    class Stop(threading.Event):
        def wait(self, timeout):
            waited.append(timeout)

    with pytest.raises(d.FetchError, match="could not be fetched: busy"):
        d.fetch(s.url, root / "x", retries=2, wait=0.01, stop=Stop())
    assert waited == [7, 7]


@pytest.fixture
def half(served):
    "(server, its address of a big file, that file, where the first half of it lies)"
    from masked_ldm.data.download import FetchError, fetch

    s, root = served
    whole = s.folder / "big.bin"

    def fetch_half(tags=()):
        whole.write_bytes(random.Random(0).randbytes(300_000))
        s.moods["/big.bin"], s.tags = "dies", tags
        with pytest.raises(FetchError, match="the connection broke off"):
            fetch(s.url + "/big.bin", root / "big.bin", retries=0, timeout=5)
        s.moods.clear()
        s.asked.clear()
        return s, s.url + "/big.bin", whole, root / "big.bin"

    return fetch_half


@pytest.mark.parametrize("tags", [(), ('"a"', "")])
def test_a_part_is_gone_on_with(tags, half):
    from masked_ldm.data.download import fetch

    s, url, whole, to = half(tags)
    have = to.with_name("big.bin.part").stat().st_size
    assert 0 < have < 300_000 and not to.exists()
    assert fetch(url, to) == 300_000 - have
    assert s.asked == [("/big.bin", have)] and to.read_bytes() == whole.read_bytes()
    assert not leftovers(to.parent)


@pytest.mark.parametrize(
    "tags, later",
    [
        (('"a"', ""), ('"b"', "")),
        (("", "Tue, 03 Jun 2025 10:00:00 GMT"), ("", "Wed, 04 Jun 2025 10:00:00 GMT")),
        (('W/"a"', "Tue, 03 Jun 2025 10:00:00 GMT"), ('W/"a"', "Wed, 04 Jun 2025 10:00:00 GMT")),
        (None, ('"b"', "")),
    ],
)
@pytest.mark.parametrize("heeds", [True, False])
def test_a_part_of_another_file_is_not_gone_on_with(tags, later, heeds, half):
    "The file at the server is replaced by one of the same length after the first half came; `heeds`: does the server look at If-Range?"
    from masked_ldm.data.download import fetch

    s, url, whole, to = half(tags or ())
    whole.write_bytes(random.Random(1).randbytes(300_000))
    s.tags, s.heeds = later, heeds
    fetch(url, to, retries=1, wait=0.01)
    assert to.read_bytes() == whole.read_bytes() and not leftovers(to.parent)
    assert s.asked[0][1] > 0 and len(s.asked) == (1 if heeds and tags else 2)


@pytest.mark.parametrize("url", ["http://[bad", "http://", "ftp://x/y", "nowhere", "http://a b:x/"])
def test_an_address_that_is_none_fails_by_name(url, served):
    "Also in an annotation: the other pictures come."
    from masked_ldm.data.download import FetchError, fetch

    s, root = served
    with pytest.raises(FetchError) as e:
        fetch(url, root / "x", retries=0, wait=0.01)
    assert str(e.value).startswith(f"{url} could not be fetched: ")
    p = root / "annotations" / "instances_val2017.json"
    d = json.loads(p.read_text())
    for im in d["images"]:
        im["coco_url"] = f"{s.url}/val2017/{im['file_name']}"
    bad = d["images"][2]
    bad["coco_url"] = url
    p.write_text(json.dumps(d))
    r = download(s, root, mirror=None, retries=0)
    assert (
        [f["file_name"] for f in r["failed"]] == [bad["file_name"]]
        and r["failed"][0]["url"] == url
        and r["fetched"] == r["wanted"] - 1
    )


@pytest.mark.parametrize(
    "mood, length, asked",
    [
        ("no range", 1000, [1000]),
        ("wrong range", 1000, [1000, 0]),
        (None, 400_000, [400_000, 0]),
        (None, 1000, [1000, 0]),
    ],
    ids=["no range", "another part", "longer than the file", "of another file"],
)
def test_a_part_that_does_not_fit_is_thrown_away(mood, length, asked, half):
    from masked_ldm.data.download import fetch

    s, url, whole, to = half()
    to.with_name("big.bin.part").write_bytes(b"x" * length)
    s.moods["/big.bin"] = [mood] if mood else None

    def check(part):
        if part.read_bytes() != whole.read_bytes():
            raise ValueError("is another file")

    fetch(url, to, check, wait=0.01)
    assert to.read_bytes() == whole.read_bytes() and [a for _, a in s.asked] == asked


def test_a_picture_of_another_size_is_refused(served, world):
    s, root = served
    name = names(world)[0]
    own = (s.folder / "val2017" / name).read_bytes()
    try:
        Image.new("RGB", (32, 64)).save(s.folder / "val2017" / name)
        r = download(s, root, retries=0)
    finally:
        (s.folder / "val2017" / name).write_bytes(own)
    assert [f["file_name"] for f in r["failed"]] == [
        name
    ] and "is 32 x 64, its annotation says 64 x 64" in r["failed"][0]["wrong"]


def test_a_server_that_dies_midway_ends_it_and_nothing_is_lost(served):
    s, root = served
    s.dead = 5
    r = download(s, root, workers=1, give_up=3, retries=0)
    assert (
        r["fetched"] == 5
        and len(r["failed"]) == r["wanted"] - 5
        and sum(f["wrong"] == "was not tried" for f in r["failed"]) >= 1
        and len(s.asked) <= 5 + 3 + 3
    )
    s.dead = 0
    r = download(s, root)
    assert (r["there"], r["failed"]) == (5, []) and same(s, root)


def test_no_other_download_at_the_same_time(served):
    from masked_ldm.files import lock_folder

    s, root = served
    lock = lock_folder(root)
    with pytest.raises(OSError, match="is in use by another process"):
        download(s, root)
    lock.release()
    assert not download(s, root)["failed"]


def zip_notes(s, **more):
    with zipfile.ZipFile(s.folder / "notes.zip", "w") as z:
        for p in (s.folder / "annotations").iterdir():
            z.write(p, f"annotations/{p.name}")
        for name, text in more.items():
            z.writestr(name, text)
    return s.url + "/notes.zip"


def cli(*args):
    from masked_ldm.data.command import main

    return in_process(main, *args)


def cli_val(s, root, *args):
    "Annotations and validation pictures into a root."
    place = (root, "--url", zip_notes(s), "--mirror", s.url, "--split", "val")
    return cli("download", *place, "--retries", 1, "--wait", 0.01, *args)


def test_two_at_once_from_nothing(served, tmp_path):
    "The second ends with a sentence while the first is still at the annotations; the first is whole."
    from masked_ldm.data.download import download_annotations

    s, _ = served
    root, url = tmp_path / "new", zip_notes(s)
    s.holds = -1
    with ThreadPoolExecutor() as pool:
        one = pool.submit(download_annotations, root, ("val",), url)
        end = time.time() + 60
        while not s.asked:
            assert time.time() < end
            time.sleep(0.02)
        with pytest.raises(OSError, match="is in use by another process"):
            download_annotations(root, ("val",), url)
        s.go.set()
        assert len(one.result()) == 6
    assert [a for a, _ in s.asked].count("/notes.zip") == 1 and not leftovers(root)


def test_damaged_annotations_say_what_to_remove(served, tmp_path):
    "Download leaves what is there, so the file to be removed is named; without it, download mends the root."
    s, _ = served
    root = tmp_path / "new"
    few = ("--min_area", 0, "--limit", 1)
    code, text = cli_val(s, root, *few)
    assert code == 0, text
    bad = root / "annotations" / "instances_val2017.json"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    code, text = cli_val(s, root, *few)
    assert code == 1 and f"remove it (rm {bad}) and fetch it again" in text, text
    bad.unlink()
    code, text = cli_val(s, root, *few)
    assert code == 0 and bad.read_bytes() == whole, text


def test_a_full_disk_is_said(served, monkeypatch):
    import masked_ldm.data.download as d

    class Full(io.BytesIO):
        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

    s, root = served
    monkeypatch.setattr(d, "open", lambda path, mode: Full(), raising=False)
    with pytest.raises(OSError, match="the disk that holds .* is full"):
        download(s, root)
    assert not names(root)


def test_command_line_from_nothing(served, tmp_path):
    "Annotations from the zip, pictures, a second time nothing, then one that is missing: exit code 1 and its name."
    s, _ = served
    root = tmp_path / "new"
    zip_notes(s)
    code, text = cli_val(s, root, "--min_area", 0.1)
    assert code == 0 and "annotations: captions_train2017.json" in text, text
    assert "0 failed" in text
    s.asked.clear()
    code, text = cli_val(s, root, "--min_area", 0.1)
    assert code == 0 and not s.asked and "annotations:" not in text, text
    gone = names(root)[0]
    (root / "val2017" / gone).unlink()
    s.moods[f"/val2017/{gone}"] = 404
    code, text = cli_val(s, root, "--min_area", 0.1)
    assert code == 1 and f"{gone}: the server says 404" in text, text


def test_annotations_that_are_there_stay(served, tmp_path):
    from masked_ldm.data.download import download_annotations

    s, _ = served
    root = tmp_path / "new"
    own = root / "annotations" / "instances_val2017.json"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    url = zip_notes(s, **{"../../evil.json": "{}"})
    assert own.name not in download_annotations(root, ("val",), url, wait=0.01)
    assert own.read_text() == "{}" and not list(tmp_path.rglob("evil*"))
    left = {p.name for p in own.parent.iterdir()}
    assert "captions_val2017.json" in left and "annotations_trainval2017.zip" not in left


@pytest.mark.parametrize(
    "what, said",
    [
        ("html", "is no whole zip archive"),
        ("other", "has none of COCO's annotation files"),
        ("half", "is no whole zip archive"),
        (404, "the server says 404"),
    ],
)
def test_annotations_that_are_none(what, said, served, tmp_path):
    s, _ = served
    z = s.folder / "odd.zip"
    with zipfile.ZipFile(z, "w") as f:
        f.writestr("readme.txt", "x" * 5000)
    if what == "half":
        z.write_bytes(z.read_bytes()[:2000])
    s.moods["/odd.zip"] = what if what in ("html", 404) else None
    code, text = cli(
        "download", tmp_path / "new", "--url", s.url + "/odd.zip", "--retries", 1, "--wait", 0.01
    )
    last = text.strip().splitlines()[-1]
    assert code == 1 and last.startswith("masked-ldm-data download: ") and said in last, text


def test_a_damaged_archive_is_never_a_traceback(served):
    from masked_ldm.data.download import _check_zip

    s, root = served
    zip_notes(s)
    whole = (s.folder / "notes.zip").read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        bad = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(9):
            bad[rng.randrange(max(0, len(bad) - 500), len(bad))] ^= 1 << rng.randrange(8)
        (root / "bad.zip").write_bytes(bad)
        with contextlib.suppress(ValueError):
            _check_zip(root / "bad.zip")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_and_gone_on_with(signum, code, served):
    s, root = served
    s.holds = 6
    args = [
        "download",
        str(root),
        "--mirror",
        s.url,
        "--split",
        "train",
        "--workers",
        "2",
        "--min_area",
        "0",
    ]
    p = subprocess.Popen(
        [sys.executable, "-m", "masked_ldm.data.command", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.time() + 120  # a shell in the background has it ignored
    while len(s.asked) < 8:
        assert time.time() < end and p.poll() is None
        time.sleep(0.02)  # both workers wait for pictures that the server holds back
    p.send_signal(signum)
    time.sleep(0.2)
    s.go.set()
    text = p.communicate(timeout=60)[0]
    assert p.returncode == code and "Traceback" not in text, text
    if signum == signal.SIGINT:
        assert "stopped; what is done stays" in text
    there = names(root, "train")
    assert there and same(s, root, "train")
    s.holds = 0
    s.asked.clear()
    r = download(s, root, "train")
    assert (
        not r["failed"]
        and same(s, root, "train")
        and not {p.split("/")[-1] for p, _ in s.asked} & set(there)
    )
