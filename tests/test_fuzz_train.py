"What masked-ldm-train is told, and what lies in a run's folder, may be anything: it is refused in one sentence, before anything is loaded, and nothing is lost."

import os
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import run
from safetensors.torch import save_file

from masked_ldm import train as module
from masked_ldm.files import file_sha256, read_json, write_json
from masked_ldm.training.checkpoint import load_checkpoint, save_branch, save_checkpoint
from masked_ldm.training.config import ConfigError, TrainConfig
from masked_ldm.training.run_folder import RunFolder

NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "",
    "one",
    "0x10",
    "1,5",
    "1e99",
    "[1]",
    "None",
    "--",
)
FLAGS = [
    *([f"--max_steps={v}"] for v in (*NUMBERS, "0", "2.5", "1e10")),
    *([f"--seed={v}"] for v in ("-1", str(2**53), "1e16", "1.5", "9" * 400, "nan", "")),
    *([f"--learning_rate={v}"] for v in ("nan", "inf", "0", "-1e-4", "1e300", "", "fast")),
    *([f"--T={v}"] for v in ("nan", "-1", "1001", "1e9", "T", "")),
    *([f"--lambda1={v}"] for v in ("nan", "-0.1", "1.1", "inf", "")),
    *([f"--size={v}"] for v in ("0", "-64", "31", "63", "1e8", "nan", "64.5")),
    *([f"--batch_size={v}"] for v in ("0", "-8", "1e30", "nan", "8x")),
    *([f"--dataloader_num_workers={v}"] for v in ("-1", "100000", "nan", "two")),
    *([f"--{name}=0"] for name in ("checkpointing_steps", "log_steps", "sample_interval")),
    *([f"--guidance_scale={v}"] for v in ("nan", "-1", "1e30")),
    *([f"--sample_steps={v}"] for v in ("0", "5000", "nan")),
    *([f"--ema_decay={v}"] for v in ("1", "-0.1", "nan")),
    *([f"--min_area={v}"] for v in ("1", "-0.1", "nan")),
    *([f"--proportion_empty_prompts={v}"] for v in ("1", "-0.1", "nan")),
    *([f"--use_ema={v}"] for v in ("yes", "1", "")),
    *([f"--mixed_precision={v}"] for v in ("fp16", "BF16", "")),
    *([f"--resume={v}"] for v in ("", "nowhere", "/", ".", "latest ", "\0", "é" * 300)),
    *([f"--data_root={v}"] for v in ("", "/nowhere", ".", "setup.py", "\0", "a\nb")),
    *([f"--base={v}"] for v in ("", "sd15")),
    ["--variant=as_published", "--gate=linear"],
    ["--batch_size=6", "--gradient_accumulation_steps=4"],
    ["--batch_size=1", "--stratified_t=True"],
    ["--validation_steps=5", "--val_pictures=0"],
    ["--push_to_hub=True"],
    ["--push_to_hub=True", "--hub_model_id=a/b/c"],
    ["--sample_prompts"],
    ["--sample_prompts=\udc80"],
    ["--preset=sd51"],
    ["--preset="],
    ["--lamda1=0.2"],
    ["--max_step=3"],
    ["3"],
    ["--T"],
    ["--report_to=mlflow"],
]
VALUES = [
    dict(max_steps=float("nan")),
    dict(max_steps=[3]),
    dict(max_steps={}),
    dict(max_steps=True),
    dict(max_steps=10**400),
    dict(seed=2**64),
    dict(T=b"3"),
    dict(lambda1="0.2\x00"),
    dict(sample_prompts=[]),
    dict(sample_prompts=[1]),
    dict(sample_prompts={"a": 1}),
    dict(data_root=3),
    dict(out_dir=["a"]),
    dict(out_dir=""),
    dict(preset=["tiny"]),
    dict(preset=3),
    {"T ": 3},
    {"": 3},
]


class Loaded(Exception):
    "The door was open."


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    def load(*args):
        raise Loaded

    monkeypatch.setattr(module, "load_networks", load)
    monkeypatch.chdir(tmp_path)


def refused(argv, capsys):
    "Run the command; what it said, in one sentence."
    with pytest.raises(SystemExit) as e:
        module.main(argv)
    said = capsys.readouterr().err
    said = said.strip().splitlines()[-1] if e.value.code == 2 else str(e.value.code)
    assert said.startswith("masked-ldm-train: ") and len(said.splitlines()) == 1, said
    assert len(said) < 1000, said
    return said


@pytest.mark.parametrize("argv", FLAGS, ids=lambda argv: repr(argv)[:60])
def test_flags(argv, capsys, tmp_path):
    said = refused(argv, capsys)
    name = argv[0].split("=")[0].lstrip("-").split("_")[0]
    assert name in said, said
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("given", VALUES, ids=repr)
def test_values(given):
    with pytest.raises(ConfigError) as e:
        TrainConfig.make(**given)
    assert len(str(e.value).splitlines()) == 1


class Branch:
    "As much of a branch as a checkpoint holds."

    weight = torch.zeros(64)

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
        file = Path(folder) / "diffusion_pytorch_model.safetensors"
        save_file({"weight": self.weight}, file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The folder of a run of six steps, without the run."
    folder = RunFolder(tmp_path_factory.mktemp("finished") / "run")
    config = TrainConfig.make(max_steps=6, checkpointing_steps=3, log_steps=1, report_to="none")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))])
    state = dict(config=asdict(config), data="ab12", skipped=0)
    for step in (3, 6):
        save_checkpoint(folder.checkpoints, step, Branch(), optimizer, state)
    folder.write("config", asdict(config))
    folder.write("data", dict(train="a", val="b"))
    folder.write("metrics", {})
    folder.write_rows([dict(step=step, loss=0.5) for step in range(1, 7)])
    save_branch(Branch(), folder.controlnet)
    return folder.path


def content(folder):
    "What a folder holds, but for locks."
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def each_checkpoint(name, change, sign=False):
    "Change a file of every checkpoint, and its hash as well if asked for."

    def damage(run):
        for path in sorted((run / "checkpoints").glob("step_*")):
            file = path / name
            new = change(file.read_bytes())
            file.unlink()
            if new is not None:
                file.write_bytes(new)
            if sign:
                hashes = read_json(path / "sha256.json")
                write_json(path / "sha256.json", hashes | {name: file_sha256(file)})

    return damage


def flip(body):
    return body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]


def removed(*names):
    def damage(run):
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def written(name, body):
    def damage(run):
        (run / name).write_bytes(body)

    return damage


def a_folder(name):
    def damage(run):
        (run / name).unlink()
        (run / name).mkdir()

    return damage


WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"
DAMAGED = {  # nothing whole is left: never begun anew
    **{
        f"{name} flipped": each_checkpoint(name, flip)
        for name in ("optimizer.safetensors", WEIGHTS)
    },
    **{
        f"{name} {how}": each_checkpoint(name, lambda body, new=new: new and new(body))
        for name in ("state.json", "sha256.json", "optimizer.safetensors")
        for how, new in dict(
            gone=None,
            empty=lambda body: b"",
            truncated=lambda body: body[: len(body) // 2],
            latin=lambda body: b"\xff\xfe" + body,
        ).items()
    },
    **{
        f"sha256.json {value}": each_checkpoint("sha256.json", lambda body, v=value: v.encode())
        for value in (
            "[]",
            "{}",
            "null",
            "3",
            '{"state.json": 3}',
            '{"..": "x"}',
            '{"\\u0000": "x"}',
        )
    },
    "state.json edited": each_checkpoint(
        "state.json", lambda body: body.replace(b'"step"', b'"stop"')
    ),
    "checkpoints gone": removed("checkpoints"),
    "all but the log gone": removed("checkpoints", "controlnet", "metrics.json"),
    "all but the branch gone": removed("checkpoints", "metrics.jsonl", "metrics.json"),
    "half a step": removed(*(f"checkpoints/step_00000{i}/controlnet" for i in (3, 6))),
    "config gone too": removed("checkpoints", "config.json"),
}
OTHER = {  # a damaged file beside the checkpoints is named, or was not needed
    "data.json list": (written("data.json", b"[]"), "data.json holds a list"),
    "data.json torn": (written("data.json", b'{"train'), "data.json is damaged"),
    "data.json latin": (written("data.json", b'{"train": "\xe9"}'), "data.json is damaged"),
    "config.json torn, nothing saved": (
        lambda run: (
            removed("checkpoints", "controlnet", "metrics.json")(run),
            written("config.json", b'{"T')(run),
        ),
        "config.json is damaged",
    ),
    "state.json of no run": (
        lambda run: each_checkpoint("state.json", lambda body: b'{"step": "x"}', sign=True)(run),
        "step is no int",
    ),
    "state.json newer": (
        lambda run: each_checkpoint("state.json", lambda body: b'{"schema": 9}', sign=True)(run),
        "newer masked_ldm",
    ),
    "checkpoints a file, nothing saved": (
        lambda run: (
            removed("checkpoints", "controlnet", "metrics.json", "metrics.jsonl")(run),
            written("checkpoints", b"")(run),
        ),
        "checkpoints cannot be written",
    ),
    "lock a folder": (lambda run: (run / ".lock").mkdir(), ".lock"),
    "tracker.json torn": (written("tracker.json", b"{"), "tracker.json is damaged"),
    "tracker.json list": (written("tracker.json", b"[3]"), "tracker.json holds a list"),
}
PASSED = {  # gone on with
    "untouched": lambda run: None,
    "one flipped": lambda run: written("checkpoints/step_000006/" + WEIGHTS, b"x")(run),
    "windows": each_checkpoint(
        "sha256.json", lambda body: body.replace(b"controlnet/", b"controlnet\\\\")
    ),
    "log words": written("metrics.jsonl", b'{"step": "x"}\n{"step": 1}\n[]\nnull\n{"step": tr'),
    "log latin": written("metrics.jsonl", b'\xff\xfe{"step": 1}\n{"step": 2}\n'),
    "log judged": written("metrics.jsonl", b'{"step": 1, "validation": 3}\n{"step": 2}\n'),
    "log gone": removed("metrics.jsonl"),
    "config gone": removed("config.json"),
    "half-written": lambda run: (run / "checkpoints" / ".tmp-step_000009").mkdir(),
    "stray": lambda run: (run / "checkpoints" / "checkpoint-foo").mkdir(),
}


@pytest.fixture
def damaged(finished, tmp_path):
    "A copy of the finished run, to be damaged: (folder, the command line that goes on with it)."
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    given = dict(max_steps=9, checkpointing_steps=3, log_steps=1, report_to="none", out_dir=run)
    return run, [f"--{k}={v}" for k, v in given.items()]


@pytest.mark.filterwarnings("ignore:passing over")
@pytest.mark.parametrize("how", [*DAMAGED, *OTHER])
def test_a_damaged_run_is_never_begun_anew(how, damaged, capsys):
    run, argv = damaged
    damage, said = OTHER.get(how) or (DAMAGED[how], "no checkpoint that is whole")
    damage(run)
    before = content(run)
    assert said in refused([*argv, "--resume=latest"], capsys)
    if how in DAMAGED:
        assert "already holds a run" in refused(argv, capsys)
    assert content(run) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", PASSED)
def test_what_does_not_matter_is_passed_over(how, damaged):
    run, argv = damaged
    PASSED[how](run)
    with pytest.raises(Loaded):
        module.main([*argv, "--resume=latest"])


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "already holds a run"),
        (["--resume=latest", "--learning_rate=0.1"], "learning_rate was 0.0003, is 0.1"),
        (["--resume=run"], "run is not a checkpoint folder"),
        (["--resume=run/checkpoints"], "checkpoints is not a checkpoint folder"),
        (["--resume=run/checkpoints/step_000004"], "is not a checkpoint folder"),
        (["--resume=other/checkpoints/step_000003"], "holds a run of its own"),
        (["--out_dir=run/config.json"], "cannot be written"),
        (["--out_dir=a\0b"], "out_dir"),
        (["--out_dir=" + "a" * 300], "out_dir"),
        (["--out_dir=/proc/run"], "cannot be written"),
        (["--cache_dir=run/config.json"], "cache_dir run/config.json cannot be written"),
        (["--cache_dir=/proc/cache"], "cache_dir /proc/cache cannot be written"),
    ],
    ids=repr,
)
def test_other_doors_of_a_finished_run(argv, said, damaged, tmp_path, capsys):
    folder, own = damaged
    shutil.copytree(folder, tmp_path / "other")
    before = content(folder)
    assert said in refused([*own, *argv], capsys)
    assert content(folder) == before


def test_killed_before_the_first_checkpoint(damaged):
    "Nothing was lost, so the same command line begins again."
    run, argv = damaged
    removed("controlnet", "metrics.json")(run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    RunFolder(run).write_rows([dict(step=1), dict(step=2)])
    with pytest.raises(Loaded):
        module.main([*argv, "--resume=latest"])


def test_a_number_that_is_not_finite_is_named(finished, tmp_path):
    class Spoilt(Branch):
        weight = torch.full((64,), torch.nan)

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))])
    path = save_checkpoint(tmp_path, 1, Spoilt(), optimizer, {})
    with pytest.raises(ValueError, match="model.safetensors holds a number that is not finite"):
        load_checkpoint(path, Spoilt(), optimizer)


def test_others_may_read_what_was_saved(finished):
    umask = os.umask(0)
    os.umask(umask)
    modes = {p.stat().st_mode & 0o777 for p in finished.rglob("*.safetensors")}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("name", ["metadata.jsonl", "manifest.json"])
@pytest.mark.parametrize("body", [None, b"", b"{", b"[]", b"\xff"], ids=repr)
def test_a_damaged_manifest_in_the_cache_is_built_again(name, body, world, tmp_path):
    from masked_ldm.data.manifest import load_manifest
    from masked_ldm.training.data import find_manifest

    config = TrainConfig.make(cache_dir=tmp_path, data_root=world, faces="annotation")
    path = find_manifest(config, world, "val")
    good = path.read_bytes()
    path.with_name(name).unlink()
    if body is not None:
        path.with_name(name).write_bytes(body)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert find_manifest(config, world, "val").read_bytes() == good
    load_manifest(path)


@pytest.mark.parametrize("name, value", [("LOCAL_RANK", "x"), ("WORLD_SIZE", "two")])
def test_an_environment_of_no_machine_is_a_sentence(name, value, tmp_path):
    code, text = run(
        *(sys.executable, "-m", "masked_ldm.train", "--out_dir", tmp_path / "run"),
        **{name: value},
    )
    last = text.strip().splitlines()[-1]
    assert code == 1 and last.startswith("masked-ldm-train: the processes of this run"), text
