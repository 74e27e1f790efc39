"What Windows does otherwise, as far as it can be tried elsewhere: files in use, slashes, lines, Pythons."

import json
import ntpath
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from masked_ldm import files
from masked_ldm.data import manifest
from masked_ldm.files import put_in_place, write_json
from masked_ldm.toy.scenes import write_world
from masked_ldm.training import checkpoint
from masked_ldm.training.checkpoint import latest_checkpoint, save_checkpoint, verify


class InUse(PermissionError):
    winerror = 32


@pytest.fixture
def in_use(monkeypatch):
    "Renaming fails so many times, as if a scanner held the file open."
    replace, left = os.replace, []

    def refuse(times, matching=""):
        left[:] = [times]

        def try_(source, target):
            if left[0] and matching in str(source):
                left[0] -= 1
                raise InUse(13, "Permission denied", str(source))
            return replace(source, target)

        monkeypatch.setattr(os, "replace", try_)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: None)

    return refuse


def test_a_file_in_use_is_waited_for(tmp_path, in_use):
    in_use(3)
    write_json(tmp_path / "a.json", dict(a=1))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == dict(a=1)
    in_use(100)
    with pytest.raises(OSError, match=r"a\.json cannot be written: Permission denied"):
        write_json(tmp_path / "a.json", dict(a=2))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == dict(a=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_another_refusal_is_not_waited_for(tmp_path, monkeypatch):
    asked = []

    def refuse(source, target):
        asked.append(source)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        put_in_place(tmp_path / "a", tmp_path / "b")
    assert len(asked) == 1


class Branch:
    kind = "controlnet"

    def __init__(self, value):
        self.value = value

    def save_pretrained(self, folder):
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        weights = {"w": torch.full((2,), self.value)}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        write_json(folder / "config.json", {})


def optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])


def test_a_finished_branch_survives_a_rename_that_fails(tmp_path, in_use):
    checkpoint.save_branch(Branch(1.0), tmp_path / "controlnet")
    in_use(100, ".tmp-controlnet")  # the second rename of two
    with pytest.raises(OSError, match="controlnet could not be written"):
        checkpoint.save_branch(Branch(2.0), tmp_path / "controlnet")
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert kept["w"].tolist() == [1.0, 1.0]


def test_an_old_checkpoint_in_use_ends_no_run(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, Branch(step), optimizer(), dict(config={}), keep=2)
    replace = os.replace

    def held(source, target):
        if "step_000001" in str(source):
            raise InUse(13, "Permission denied", str(source))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    save_checkpoint(tmp_path, 3, Branch(3.0), optimizer(), dict(config={}), keep=2)
    for path in tmp_path.glob("step_*"):
        verify(path)  # the one that stayed is whole
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **how: None)  # half removed
    save_checkpoint(tmp_path, 4, Branch(4.0), optimizer(), dict(config={}), keep=1)
    assert [p.name for p in sorted(tmp_path.glob("step_*"))] == ["step_000004"]
    assert latest_checkpoint(tmp_path).name == "step_000004"


def test_a_manifest_has_slashes(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "relpath", lambda *way: ntpath.join("..", "..", "train2017"))
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(Path, "resolve", lambda self: Path("/same"))
    assert manifest._way(tmp_path / "train2017", tmp_path / "out" / "train") == "../../train2017"

    def other_disk(*way):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", other_disk)
    with pytest.raises(ValueError, match="must be on one disk"):
        manifest._way(tmp_path / "a", tmp_path / "b")


START = """
import multiprocessing, sys
from masked_ldm.train import TrainConfig, train

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    result = train(TrainConfig.make(
        out_dir=sys.argv[2], cache_dir=sys.argv[3], data_root=sys.argv[4], min_area=0.0,
        max_steps=2, batch_size=2, T=0, lambda1=0.0, lambda2=0.0, val_pictures=0, log_steps=1,
        dataloader_num_workers=2, report_to="none", sample_steps=1))
    print("losses", [row["loss"] for row in result.history])
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_data_workers_begin_in_other_ways(tmp_path, world, cache, method):
    "Windows and macOS spawn; Python 3.14 has a fork server on Linux."
    file = tmp_path / "start.py"
    file.write_text(START, encoding="utf-8")
    given = [method, tmp_path / "run", cache, world]
    done = subprocess.run(
        [sys.executable, file, *map(str, given)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "losses" in done.stdout


def test_a_world_drawn_by_one_process_needs_no_pool(tmp_path, monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", None)
    assert write_world(tmp_path / "world", 2, 1).is_dir()


def test_the_pythons_are_said_once():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = parser["DEFAULT"]
    pythons = cfg["pythons"].split()
    assert pythons[0] == cfg["min_python"]
    said = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"Python (3\.\d+) or later", said) == [cfg["min_python"]]
    target = f'target-version = "py{cfg["min_python"].replace(".", "")}"'
    assert target in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    workflows = ROOT / ".github/workflows"
    tests = (workflows / "test.yml").read_text(encoding="utf-8")
    assert "s/^pythons = //p' settings.ini" in tests and "python: ${{ fromJSON(" in tests
    pages = (workflows / "pages.yml").read_text(encoding="utf-8")
    assert re.findall(r'python-version: "(.*)"', pages)[0] in pythons


def test_workflows_call_what_make_knows():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        called = re.findall(r"run: make (\w+)", workflow.read_text(encoding="utf-8"))
        assert called and set(called) <= set(targets)
