"The blind vote in a real browser: nothing lost, nothing double, no name, nothing outside its folder."

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from PIL import Image, ImageDraw, PngImagePlugin

NAMES = ("secret-model-one", "secret-model-two")
EVIL = '<img src=x onerror=window.hacked=1><script>window.hacked=1</script> A man & a "dog"'
pytest.importorskip("starlette", reason="the study extra is not installed")


def picture_folder(path, n=20, kinds=NAMES):
    "A set as `picture_set` writes it; pictures that can be told apart, each with its model's name in its metadata."
    (path / "pictures").mkdir(parents=True)
    note = dict(
        models=dict.fromkeys(kinds, "x"),
        prompts=[EVIL] + [f"A person, number {i}, in the park." for i in range(1, n)],
        seed=0,
        settings={},
    )
    (path / "set.json").write_text(json.dumps(note), encoding="utf-8")
    for k, name in enumerate(kinds):
        for i in range(n):
            im = Image.new("RGB", (256, 256), (40 + 8 * i % 200, 90 + 100 * k, 150))
            d = ImageDraw.Draw(im)
            d.ellipse((70, 40, 186, 156), fill=(230, 190 - 40 * k, 150))
            d.rectangle((96, 156, 160, 240), fill=(60, 60, 120 + 60 * k))
            meta = PngImagePlugin.PngInfo()
            meta.add_text("model", name)
            im.save(path / "pictures" / f"{k}_{i:05d}.png", pnginfo=meta)
    return path


class Server:
    "masked-ldm-study as a process."

    def __init__(self, folder, port=None, *more):
        self.folder, self.more = folder, more
        if port is None:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}/"
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "masked_ldm.study.app",
                str(self.folder),
                "--port",
                str(self.port),
                *self.more,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = [self.process.stdout.readline() for _ in range(4)]
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(self.said)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def rows(self):
        with sqlite3.connect(self.folder / "votes.sqlite") as db:
            return db.execute("SELECT voter, pair, question, choice, a_was FROM votes").fetchall()

    def get(self, path, **headers):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        c.putrequest("GET", path, skip_host="Host" in headers)
        for k, v in headers.items():
            c.putheader(k, v)
        c.endheaders()
        r = c.getresponse()
        return r.status, r.read()


class Threaded(Server):
    "The same in a thread, for tests that need not kill it."

    def start(self):
        from masked_ldm.study import app as study

        app = study.create_app(study.Study(self.folder))
        self.server = study.uvicorn.Server(study.uvicorn.Config(app, log_level="warning"))
        listening = study._listen("127.0.0.1", self.port)
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def kill(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def server(tmp_path):
    s = Server(picture_folder(tmp_path / "study"))
    yield s
    s.kill()


@pytest.fixture
def threaded(tmp_path):
    s = Threaded(picture_folder(tmp_path / "study"))
    yield s
    s.kill()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    "A server that is only asked, never voted on."
    s = Threaded(picture_folder(tmp_path_factory.mktemp("asked") / "study", 2))
    yield s
    s.kill()


@pytest.fixture(scope="module")
def chromium():
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not path:
        pytest.skip("Chromium is not installed")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield b
        b.close()


def ready(page, done, total=20):
    "Wait until `done` votes are in and the pictures are there."
    page.wait_for_selector(f"#count:text-is('{done} of {total}')", timeout=15000)
    page.wait_for_selector("body:not(.wait)", timeout=15000)
    page.wait_for_timeout(30)


def shot(page, name):  # to look at, where a folder is named
    if folder := os.environ.get("MASKED_LDM_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_twenty_votes_survive_a_kill(server, chromium):
    heard = []
    context = chromium.new_context(viewport=dict(width=1280, height=800))
    page = context.new_page()
    page.on("response", lambda r: heard.append(f"{r.url} {r.headers}"))
    page.goto(server.url)
    ready(page, 0)
    shot(page, "study_desk")
    for i in range(7):
        page.keyboard.press(("ArrowLeft", "ArrowRight", "ArrowDown")[i % 3])
        ready(page, i + 1)
    for url in (
        "",
        "vote.js",
        "study.css",
        "api/next",
        *(page.get_attribute(f"#{side}", "src") for side in ("left", "right")),
    ):
        r = context.request.get(server.url + url)
        assert r.ok
        heard.append(f"{r.headers} {r.body()}")
    page.evaluate(
        "for (const key of 'abb') document.dispatchEvent(new KeyboardEvent('keydown', { key }))"
    )
    ready(page, 8)  # a nervous finger: three keys before the first is answered
    page.reload()
    ready(page, 8)
    other = context.new_page()
    other.goto(server.url)
    ready(other, 8)
    other.keyboard.press("1")
    ready(other, 9)
    page.keyboard.press("2")
    ready(page, 9)  # a second tab: that page was answered there
    before = server.rows()
    server.kill()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "kept here and sent again" in page.inner_text("#trouble")
    shot(page, "study_down")
    page.keyboard.press("ArrowLeft")
    server.start()
    ready(page, 10)
    assert page.is_hidden("#trouble") and page.evaluate("localStorage.length") == 0
    assert server.rows()[: len(before)] == before and len(server.rows()) == 10
    for i in range(10, 20):
        page.click(f"nav button[data-choice={('left', 'right', 'same')[i % 3]}]")
        page.wait_for_timeout(0) if i == 19 else ready(page, i + 1)
    page.wait_for_selector("#done:not([hidden])")
    shot(page, "study_done")
    page.set_viewport_size(dict(width=390, height=844))
    shot(page, "study_done_phone")
    page.set_viewport_size(dict(width=1280, height=800))
    rows = server.rows()
    assert len(rows) == 20 == len({r[:3] for r in rows}) and len({r[0] for r in rows}) == 1
    said = " ".join(heard) + page.content()
    assert page.evaluate("window.hacked === undefined") and len(heard) > 60
    for name in (*NAMES, str(server.folder), "pictures/", "_000", "votes.sqlite"):
        assert name not in said  # blind
    key = re.search(r"results: (\S+)", "".join(server.said))[1]
    page.goto(key)
    assert all(n in page.content() for n in NAMES) and "20 votes of 1 voter" in page.content()
    shot(page, "study_results")
    page.set_viewport_size(dict(width=390, height=844))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "study_results_phone")


def test_a_vote_outlives_its_page(server, chromium):
    "The server dies, the voter votes, closes the page, and comes back when it is up again."
    context = chromium.new_context(viewport=dict(width=390, height=844))
    page = context.new_page()
    page.goto(server.url)
    ready(page, 0)
    page.keyboard.press("ArrowLeft")
    ready(page, 1)
    server.kill()
    page.click("nav button[data-choice=right]")
    page.wait_for_selector("#trouble:not([hidden])")
    shot(page, "study_down_phone")
    assert "close this page" in page.inner_text("#trouble")
    page.close()
    server.start()
    assert len(server.rows()) == 1
    back = context.new_page()
    back.goto(server.url)
    ready(back, 2)
    assert len(server.rows()) == 2 and back.evaluate("localStorage.length") == 0
    back.reload()
    ready(back, 2)


def test_two_tabs_of_a_fresh_browser(threaded, chromium):
    "Both ask before either has a cookie, so there are two voters for a moment: a vote on the other's page is refused in words, and nothing is lost silently."
    context = chromium.new_context(viewport=dict(width=1280, height=800))
    page = context.new_page()
    page.goto(threaded.url)
    ready(page, 0)
    context.clear_cookies()
    other = context.new_page()
    other.goto(threaded.url)
    ready(other, 0)  # the cookie is now the second tab's
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#trouble:not([hidden])")
    assert (
        "was not counted" in page.inner_text("#trouble")
        and not threaded.rows()
        and page.evaluate("localStorage.length") == 0
    )
    shot(page, "study_two_tabs")
    ready(page, 0)
    page.keyboard.press("ArrowLeft")
    ready(page, 1)
    assert page.is_hidden("#trouble") and len(threaded.rows()) == 1


def test_on_a_phone(threaded, chromium):
    first = chromium.new_context(
        viewport=dict(width=390, height=844), has_touch=True, is_mobile=True, device_scale_factor=2
    )
    page = first.new_page()
    page.goto(threaded.url)
    ready(page, 0)
    shot(page, "study_phone")

    def box(s):
        return page.locator(s).bounding_box()

    a, b, nav = box("#left"), box("#right"), box("nav")
    assert (
        page.evaluate("document.documentElement.scrollWidth") <= 390
        and a["width"] > 250
        and b["y"] >= a["y"] + a["height"]
        and nav["y"] + nav["height"] <= 844
    )  # all in sight, no scrolling
    for i in range(3):
        page.tap("#right" if i % 2 else "#left")
        ready(page, i + 1)
    second = chromium.new_context().new_page()
    second.goto(threaded.url)
    ready(second, 0)  # another browser is another voter
    for i in range(2):
        second.keyboard.press("ArrowLeft")
        page.tap("nav button[data-choice=same]")
        ready(second, i + 1)
        ready(page, i + 4)
    rows = threaded.rows()
    assert sorted(sum(r[0] == v for r in rows) for v in {r[0] for r in rows}) == [2, 5]


def test_a_script_in_a_prompt_is_text(threaded, chromium):
    page = chromium.new_context().new_page()
    page.goto(threaded.url)
    shown = set()
    for i in range(20):
        ready(page, i)
        shown.add(page.inner_text("#prompt"))
        page.keyboard.press("ArrowDown")
    page.wait_for_selector("#done:not([hidden])")
    assert EVIL in shown and page.evaluate("window.hacked === undefined")


@pytest.mark.parametrize(
    "path",
    [
        "/../set.json",
        "/picture/../../set.json",
        "/picture/..%2f..%2fvotes.sqlite",
        "/picture/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/pictures/0_00000.png",
        "/votes.sqlite",
        "/picture/" + "0" * 32,
        "/picture/%00",
        "/study.css/../../set.json",
    ],
)
def test_nothing_outside_is_served(asked, path):
    status, body = asked.get(path)
    assert status == 404 and b"secret" not in body and b"root:" not in body


def test_results_need_the_key_and_the_host_is_checked(asked):
    assert asked.get("/results")[0] == 403
    assert asked.get("/votes.csv?key=x")[0] == 403
    assert asked.get("/", Host="evil.example")[0] == 400


def test_open_to_the_network(tmp_path):
    "The addresses that are printed are real ones, and only this computer's own names are answered to."
    from masked_ldm.study.app import own_addresses

    s = Server(
        picture_folder(tmp_path / "study", 3),
        None,
        "--host",
        "0.0.0.0",
        "--allow-host",
        "lab.example",
    )
    try:
        said = "".join(s.said)
        assert "0.0.0.0" not in said and "127.0.0.1" not in said
        assert "can vote" in said and socket.gethostname() in said
        assert all(a in said for a in own_addresses())
        for host in (
            f"127.0.0.1:{s.port}",
            "localhost",
            socket.gethostname(),
            f"lab.example:{s.port}",
        ):
            assert s.get("/", Host=host)[0] == 200, host
        for host in (
            "evil.example",
            f"evil.example:{s.port}",
            "192.0.2.77",
            "lab.example.evil.example",
            "",
        ):
            assert s.get("/", Host=host)[0] == 400, host
        for a in [a for a in own_addresses() if ":" not in a]:
            c = http.client.HTTPConnection(a, s.port, timeout=10)
            c.request("GET", "/")
            assert c.getresponse().status == 200  # by the address that is printed
    finally:
        s.kill()


def test_a_host_that_is_none_is_said_before_any_address(tmp_path, capsys):
    from masked_ldm.study import app

    folder = picture_folder(tmp_path / "study", 2)
    for host, port in (("banana.invalid", "8765"), ("a" * 99, "8765"), ("192.0.2.7", "80")):
        with pytest.raises(SystemExit, match=f"host {host}, port {port} cannot be served from"):
            app.main([str(folder), "--host", host, "--port", port])
    assert capsys.readouterr().out == ""


def test_without_the_extra_it_is_one_sentence(tmp_path, monkeypatch):
    from masked_ldm.study import app

    folder = picture_folder(tmp_path / "study", 2)
    monkeypatch.setattr(app, "_INSTALLED", False)
    with pytest.raises(SystemExit, match=r"^masked-ldm-study: the study page needs .*\[study\]"):
        app.main([str(folder)])
