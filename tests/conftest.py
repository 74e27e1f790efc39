"Shared by the tests: where things are, and one small world."

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # here and in every child: two busy threads a process on few cores wait for each other, and everything takes ten times as long

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not {".ipynb_checkpoints", "runs", "_proc"} & set(p.parts)
)


def run(*args, **env):
    "A command in the repository's root: (exit code, everything it printed)."
    r = subprocess.run(
        [str(a) for a in args],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return r.returncode, r.stdout


def in_process(main, *args):
    "A command in this process, which starting Python and torch anew would make slow: (exit code, everything it printed)."
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main([str(a) for a in args])
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else print(e.code) or 1
    return code, out.getvalue()


def papermill(out, *parameters, notebook="nbs/05_train.ipynb"):
    "Run a notebook by papermill with `name, value` pairs."
    return run(
        sys.executable,
        "-m",
        "papermill",
        notebook,
        out,
        "--no-progress-bar",
        *(x for name, value in parameters for x in ("-p", name, value)),
    )


def by_two(*command, **env):
    "A Python program in two processes on the CPU: (exit code, everything printed). `accelerate launch --cpu --num_processes 2` would start one."
    return run(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        *command,
        **dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"),
        **env,
    )


def train_by_two(given):
    return by_two("-m", "masked_ldm.train", *(f"--{k}={v}" for k, v in given.items()))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    "A small built-in world on disk."
    from masked_ldm.toy.scenes import write_world

    return write_world(tmp_path_factory.mktemp("data") / "world", 64, 12)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    "Where runs keep the world they draw: drawn once for all tests."
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def short(cache):
    "Settings of a run that draws and says little."
    return dict(
        cache_dir=cache,
        sample_interval=100,
        sample_steps=1,
        log_steps=1,
        report_to="none",
    )


@pytest.fixture
def quick(short, tmp_path):
    "Settings of a short run."
    return short | dict(
        out_dir=str(tmp_path / "run"),
        world_pictures=48,
        size=32,  # in less time; half of the faces are then too small for the face loss
        val_pictures=4,
        max_steps=6,
        batch_size=4,
        checkpointing_steps=3,
    )
