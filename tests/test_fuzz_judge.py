"Hostile input at the doors of judging, drawing and voting: one sentence that names what is wrong, and no traceback."

import json
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_evaluate import make_run

DOORS = dict(eval="masked_ldm.evaluate", sample="masked_ldm.sample", study="masked_ldm.study.app")


def refused(door, arguments, capsys):
    "Call a command that has to refuse: what it says. Anything but a sentence is an error here."
    from importlib import import_module

    with pytest.raises(SystemExit) as stop:
        import_module(DOORS[door]).main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    said = stop.value.code if isinstance(stop.value.code, str) else printed.err
    assert stop.value.code not in (0, None), printed.out
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"masked-ldm-{door}: ") and "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A run that could be judged."
    return make_run(tmp_path_factory.mktemp("good") / "run")


NOT_COUNTS = ("nan", "inf", "-inf", "1e999", "ten", "", "1.5", "-1", "0x10", "None", "True", "1e30")
NOT_SCALES = ("nan", "inf", "-inf", "1e999", "three", "", "-1", "1e30", "3,0")
FLAGS = {
    "eval": {
        "n": (*NOT_COUNTS, "0", "1"),
        "reference": ("0", "1", "nan"),
        "seed": (*NOT_COUNTS, "9007199254740993", "4294967296"),
        "sample_steps": ("0", "5000", "-3", "nan"),
        "guidance_scale": NOT_SCALES,
        "sample_scheduler": ("euler", "", "DDIM"),
        "protocol": ("slow", "", "Quick"),
        "size": ("0", "7", "8", "63", "-64", "100", "1e9", "nan"),
        "inception": ("nowhere.pth", ".", ""),
        "data_root": ("nowhere", "setup.py", "masked_ldm", ""),
        "out": ("", "setup.py", "setup.py/x"),
        "guidance": ("3",),
        "runs": ("a,b",),
    },
    "sample": {
        "strength": ("nan", "inf", "1e30", "-11", "", "full"),
        "seed": ("-1", "nan", "4294967296", "1.5"),
        "sample_steps": ("0", "5000"),
        "guidance_scale": ("nan", "1e30", "-1"),
        "size": ("7", "60", "1e9"),
        "prompt": ("\udcff", "a \ud800 surrogate"),
        "out": ("grid.gif", "grid", "nowhere/grid.png", "", "masked_ldm/.png/"),
    },
    "study": {
        "n": ("0", "-2", "nan", "1e30"),
        "seed": ("-1", "4294967296"),
        "port": ("0", "70000", "nan", "http"),
        "questions": ("nose", ""),
        "host": ("",),
    },
}
CASES = [
    (door, flag, value)
    for door, of_door in FLAGS.items()
    for flag in of_door
    for value in of_door[flag]
]


@pytest.mark.parametrize("door, flag, value", CASES, ids=[f"{d}-{f}={v!r}" for d, f, v in CASES])
def test_a_flag_that_cannot_be(good, tmp_path, capsys, door, flag, value):
    out = [] if flag in ("out", "folder") or door != "eval" else ["--out", tmp_path / "out"]
    said = refused(door, [good, *out, f"--{flag}={value}"], capsys)
    assert flag.split("_")[0] in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("door", DOORS)
def test_a_door_without_a_run(door, capsys):
    assert "runs" in refused(door, [], capsys)
    for nobody in (
        "nowhere",
        "no/where",
        "",
        ".",
        "setup.py",
        "a" * 300,
        "line\\nbreak",
        "\\udcff",
    ):
        assert "config.json" in refused(door, [nobody], capsys)


def in_config(**changes):
    def damage(run):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | changes))

    return damage


def bytes_of(name, content):
    def damage(run):
        path = run / name
        kept = path.read_bytes() if path.is_file() else b""
        path.write_bytes(content(kept) if callable(content) else content)

    return damage


WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"


def in_weights(change):
    def damage(run):
        weights = load_file(run / WEIGHTS)
        name = next(name for name, w in weights.items() if w.dim() == 4)
        change(weights, name)
        save_file(weights, run / WEIGHTS)

    return damage


def removed(name):
    return lambda run: (run / name).unlink()


def another_branch(run):
    from diffusers import ControlNetModel

    blocks = dict(down_block_types=("DownBlock2D",) * 2, layers_per_block=1, norm_num_groups=8)
    other = ControlNetModel(block_out_channels=(16, 32), cross_attention_dim=64, **blocks)
    other.save_pretrained(run / "controlnet")


DAMAGED_RUNS = {  # what was done: (damage, what the sentence names)
    "no configuration": (removed("config.json"), "config.json"),
    "empty configuration": (bytes_of("config.json", b""), "config.json is damaged"),
    "truncated configuration": (
        bytes_of("config.json", lambda b: b[:-9]),
        "config.json is damaged",
    ),
    "a list": (bytes_of("config.json", b"[]"), "config.json holds a list"),
    "binary configuration": (bytes_of("config.json", b"\xff\xfe\x00"), "config.json is damaged"),
    "deep configuration": (bytes_of("config.json", b"[" * 99999), "config.json is damaged"),
    "no base": (in_config(base=None), "names no base"),
    "a number as base": (in_config(base=15), "names no base"),
    "a base that is nowhere": (in_config(base="no-where"), "no-where"),
    "an empty base": (in_config(base=""), "base"),
    "size as words": (in_config(size="big"), "size"),
    "size of no base": (in_config(size=7), "size"),
    "NaN guidance": (in_config(guidance_scale=float("nan")), "guidance_scale"),
    "infinite guidance": (in_config(guidance_scale=float("inf")), "guidance_scale"),
    "no steps": (in_config(sample_steps=0), "sample_steps"),
    "unknown sampler": (in_config(sample_scheduler="euler"), "sample_scheduler"),
    "a list of precisions": (in_config(mixed_precision=["bf16"]), "mixed_precision"),
    "no weights": (removed(WEIGHTS), "controlnet"),
    "no description of weights": (removed("controlnet/config.json"), "controlnet"),
    "damaged description": (bytes_of("controlnet/config.json", b"{"), "controlnet"),
    "other description": (bytes_of("controlnet/config.json", b"{}"), "controlnet"),
    "empty weights": (bytes_of(WEIGHTS, b""), "controlnet"),
    "truncated weights": (bytes_of(WEIGHTS, lambda b: b[: len(b) // 2]), "controlnet"),
    "a pickle as weights": (bytes_of(WEIGHTS, pickle.dumps([1])), "controlnet"),
    "a web page as weights": (bytes_of(WEIGHTS, b"<html>" * 99), "controlnet"),
    "NaN weights": (in_weights(lambda w, k: w[k].fill_(torch.nan)), "NaN"),
    "infinite weights": (in_weights(lambda w, k: w[k].fill_(torch.inf)), "NaN"),
    "weights of another shape": (in_weights(lambda w, k: w.update({k: w[k][:1]})), "controlnet"),
    "weights missing": (in_weights(lambda w, k: w.pop(k)), "controlnet"),
    "another base's branch": (another_branch, "is not of base tiny"),
    "truncated data.json": (bytes_of("data.json", b'{"val": '), "data.json is damaged"),
    "data.json is a list": (bytes_of("data.json", b"[]"), "data.json holds a list"),
    "data.json has no paths": (
        lambda run: (in_config(data_root="coco")(run), bytes_of("data.json", b'{"val": 3}')(run)),
        "names no 'val'",
    ),
    "data.json names what is gone": (
        lambda run: (
            in_config(data_root="coco")(run),
            bytes_of("data.json", b'{"val": "gone.jsonl", "train": "gone.jsonl"}')(run),
        ),
        "gone.jsonl is missing",
    ),
}


@pytest.mark.parametrize("what", DAMAGED_RUNS)
def test_a_damaged_run(tmp_path, capsys, what):
    damage, named = DAMAGED_RUNS[what]
    run = make_run(tmp_path / "run")
    damage(run)
    for door in ["eval"] if "data.json" in what else ["sample"]:
        out = dict(eval=tmp_path / "out", sample=tmp_path / "grid.png")[door]
        assert named in refused(door, [run, "--out", out], capsys)


def picture_folder(path):
    "A set of two models and two prompts."
    (path / "pictures").mkdir(parents=True)
    about = dict(models=dict(a="x", b="x"), prompts=["one", "two"], seed=0, settings={})
    (path / "set.json").write_text(json.dumps(about))
    for k in range(2):
        for i in range(2):
            Image.new("RGB", (64, 64)).save(path / "pictures" / f"{k}_{i:05d}.png")
    return path


def in_set(**changes):
    def damage(folder):
        about = json.loads((folder / "set.json").read_text())
        (folder / "set.json").write_text(json.dumps(about | changes))

    return damage


PICTURE = "pictures/1_00001.png"
DAMAGED_SETS = {
    "truncated set.json": (bytes_of("set.json", lambda b: b[:-9]), "set.json is damaged"),
    "empty set.json": (bytes_of("set.json", b""), "set.json is damaged"),
    "set.json is a list": (bytes_of("set.json", b"[]"), "set.json holds a list"),
    "set.json is binary": (bytes_of("set.json", b"\xff\xfe\x00"), "set.json is damaged"),
    "no prompts": (in_set(prompts=[]), "does not describe"),
    "prompts are numbers": (in_set(prompts=[1, 2]), "does not describe"),
    "models are a list": (in_set(models=["a", "b"]), "does not describe"),
    "models are missing": (in_set(models=None), "does not describe"),
    "one model": (in_set(models={"a": "x"}), "a vote needs two"),
    "a prompt more": (in_set(prompts=["one", "two", "three"]), "00002.png is missing"),
    "a picture is missing": (removed(PICTURE), "1_00001.png is missing"),
    "a picture is empty": (bytes_of(PICTURE, b""), "1_00001.png is empty"),
    "a picture is truncated": (bytes_of(PICTURE, lambda b: b[:40]), "1_00001.png"),
    "a picture is text": (bytes_of(PICTURE, b"hello"), "1_00001.png is not"),
    "a picture is a web page": (bytes_of(PICTURE, b"<html>"), "1_00001.png is a web page"),
    "votes are no votes": (bytes_of("votes.sqlite", b"hello" * 99), "votes.sqlite cannot be used"),
    "votes are a folder": (lambda f: (f / "votes.sqlite").mkdir(), "votes.sqlite cannot be used"),
}


@pytest.mark.parametrize("what", DAMAGED_SETS)
def test_a_damaged_set(tmp_path, capsys, what):
    damage, named = DAMAGED_SETS[what]
    folder = picture_folder(tmp_path / "set")
    damage(folder)
    assert named in refused("study", [folder, "--results"], capsys)


def test_votes_of_another_set(tmp_path, capsys):
    from masked_ldm.study.app import main

    folder = picture_folder(tmp_path / "set")
    main([str(folder), "--results"])
    in_set(seed=1)(folder)
    assert "belongs to another set" in refused("study", [folder, "--results"], capsys)


def test_a_run_in_a_folder_of_other_bytes(tmp_path):
    "Names that are no UTF-8, or hold spaces and line breaks, reach tables and files."
    import os

    from masked_ldm.files import read_json, write_json
    from masked_ldm.sample import open_runs

    for name in (b"run \xff", b"line\nbreak", "\u4eba".encode()):
        path = make_run(tmp_path / os.fsdecode(name))
        (shown,) = open_runs([path])
        assert shown == os.fsdecode(name).replace(" ", "_").replace("\n", "_")
        note = write_json(tmp_path / "note.json", {shown: str(path)})
        assert read_json(note) == {shown: str(path)}


def test_a_study_of_the_base_alone(tmp_path, capsys):
    for runs in (["base"], ["base", "base"]):
        said = refused("study", [*runs, "--folder", tmp_path / "set"], capsys)
        assert "a run folder beside the base" in said


def test_what_a_browser_may_send(tmp_path):
    "Every request is answered below 500, and none of these is a vote."
    pytest.importorskip("starlette", reason="the study extra is not installed")
    from starlette.testclient import TestClient

    from masked_ldm.study.app import Study, create_app

    study = Study(picture_folder(tmp_path / "set"))
    browser = TestClient(create_app(study), base_url="http://127.0.0.1")
    page = browser.get("/api/next").json()["page"]
    for path in ("/picture/%ff", "/picture/%00", "/picture/" + "a" * 5000, "/results?key=%ff%00"):
        assert browser.get(path).status_code in (403, 404)
    for cookie in (
        "voter=",
        "voter=.",
        "voter=\xff.\xff",
        "voter=" + "a" * 9000,
        "\x01=;;=",
        "voter",
    ):
        assert (
            browser.get("/api/next", headers={"cookie": cookie.encode("latin-1")}).status_code < 500
        )
    votes = [b"", b"null", b"3", b'"x"', b"[]", b"{}", b"\xff\xfe", b"[" * 900, b'{"page": NaN}']
    votes += [
        json.dumps({"page": p, "choice": c}).encode()
        for p in (page, None, 1, [], {}, "\ud800", page.upper())
        for c in ("left ", "", None, 1, [], {}, "\ud800", True)
    ]
    for vote in votes:
        sent = browser.post("/api/vote", content=vote, headers={"content-type": "application/json"})
        assert 400 <= sent.status_code < 500, vote
    assert browser.post("/api/vote", content=votes[0]).status_code == 400
    assert browser.put("/api/vote").status_code == 405
    assert not study.votes.all()
