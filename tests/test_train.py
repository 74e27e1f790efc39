"The run as users start it: papermill, the command line, Python."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, by_two, papermill, run, train_by_two
from safetensors.torch import load_file

WRONG = dict(
    T=([("T", 1200)], "T must be 0 to 1000, not 1200"),
    misspelt=([("lamda1", 0.2)], "unknown parameter 'lamda1'; did you mean 'lambda1'?"),
)  # the others: test_config.py


@pytest.mark.parametrize("name", WRONG)
def test_wrong_setting_is_one_sentence(name, tmp_path):
    given, said = WRONG[name]
    code, text = papermill(tmp_path / "o.ipynb", *given, ("out_dir", tmp_path / "run"))
    end = text[text.index("Exception encountered") :].strip().splitlines()
    assert code and len(end) == 2 and end[1].startswith(f"ConfigError: {said}"), text
    assert not (tmp_path / "run").exists()


def test_papermill_run(tmp_path, quick):
    code, text = papermill(tmp_path / "o.ipynb", *quick.items(), ("T", 400))
    assert code == 0, text
    out = tmp_path / "run"
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and json.loads(
        (out / "config.json").read_text()
    )["T"] == 400
    assert any(r["lpips"] and r["face"] and r["ldm"] for r in rows) and {
        "README.md",
        "controlnet",
        "samples",
        "metrics.json",
    } <= {p.name for p in out.iterdir()}
    norms = json.loads((out / "metrics.json").read_text())["gradient_norms"]
    assert all(v > 0 for v in norms.values())


def weights(path):
    return load_file(path / "controlnet" / "diffusion_pytorch_model.safetensors")


def test_resumed_is_never_stopped(tmp_path, whole):
    "A15: bit-equal, in the middle of an epoch too."
    from masked_ldm.train import TrainConfig, train
    from masked_ldm.training.config import ConfigError

    given, want = whole
    half = {**given, "out_dir": str(tmp_path / "half")}
    train(TrainConfig.make(**{**half, "max_steps": 3}))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(TrainConfig.make(**half))
    with pytest.raises(ConfigError, match="lambda1 was 0.2, is 0.3"):
        train(TrainConfig.make(**half, resume="latest", lambda1=0.3))
    with open(tmp_path / "half" / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 4, "lo')  # as a kill leaves it
    rest = train(TrainConfig.make(**half, resume="latest"))
    assert [r["step"] for r in rest.history] == list(range(1, 9))
    got = weights(rest.path)
    assert all(torch.equal(got[k], v) for k, v in want.items())


SWITCHES = dict(
    spread=dict(
        T=600,
        stratified_t=True,
        max_decoded=1,
        use_ema=True,
        ema_decay=0.5,
        gradient_accumulation_steps=2,
        log_steps=3,  # the checkpoint lies inside a window
    ),
    parts=dict(
        T=1000,
        decode_batch=1,
        channels_last=True,
        per_person=True,
        gate="cosine",
        lambda_warmup_steps=3,
        cache_latents=True,
        proportion_empty_prompts=0.5,
        gradient_checkpointing=True,
    ),
    terms=dict(
        size=64,
        T=800,
        balance=1.0,
        x0_steps=2,
        face_weight=4.0,
        hand_weight=2.0,
        background_weight=0.1,
        ldm_face_weight=8.0,
        snr_gamma=5.0,
        lambda3=0.1,
        batch_size=2,
    ),
    decoder=dict(
        T=700, lpips_net="decoder", lambda2=0.0, balance=0.5, cache_latents=True, batch_size=2
    ),
    latent=dict(
        T=700,
        lpips_net="latent",
        lpips_views=True,
        lambda2=0.0,
        balance=1.0,
        ldm_face_weight=8.0,
        cache_latents=True,
        batch_size=2,
    ),
    bf16=dict(  # a processor without units for it takes ten times as long
        T=1000,
        mixed_precision="bf16",
        decode_batch=1,
        crop="people",
        batch_size=2,
        max_steps=2,
        checkpointing_steps=1,
    ),
)


@pytest.mark.parametrize("name", SWITCHES)
def test_resumed_with_every_switch_is_never_stopped(name, tmp_path, quick):
    "A15 for all that a run can be told. (channels_last: fused AdamW takes for granted that moments come back in the weights' own order of memory.)"
    from masked_ldm.train import TrainConfig, train

    given = {**quick, "val_pictures": 0, "max_steps": 4, "checkpointing_steps": 2, **SWITCHES[name]}
    given["sample_prompts"] = ["A man."]
    whole = train(TrainConfig.make(**given))
    half = tmp_path / "half"
    shutil.copytree(whole.path, half)
    shutil.rmtree(half / "controlnet")
    shutil.rmtree(half / "checkpoints" / f"step_{given['max_steps']:06d}")
    rest = train(TrainConfig.make(**{**given, "out_dir": str(half)}, resume="latest"))
    a, b = weights(whole.path), weights(half)
    assert all(torch.equal(a[k], b[k]) for k in a)

    def same(rows):
        return [{k: v for k, v in r.items() if k != "images_per_second"} for r in rows]

    assert same(rest.history) == same(whole.history) and all(r["loss"] > 0 for r in rest.history)
    assert sum(r["steps"] for r in rest.history) == given["max_steps"]


def test_back_to_an_older_checkpoint(tmp_path, quick):
    "What came later is set aside, not in the way; other settings are gone on with only when asked for; a newer or stranger checkpoint is refused."
    from masked_ldm.train import TrainConfig, train
    from masked_ldm.training.config import ConfigError

    kw = {**quick, "val_pictures": 0, "checkpointing_steps": 2, "checkpoints_total_limit": 3}
    whole = train(TrainConfig.make(**kw))
    folder = whole.path / "checkpoints"
    (whole.path / "metrics.jsonl").open("a").write(
        '{"step": 7, "bands": {"0-50": {"n": 1}'
    )  # torn after an inner brace
    with pytest.raises(
        ConfigError, match="learning_rate was 0.0003, is 0.001.*resume_changed=True"
    ):
        train(TrainConfig.make(**kw, resume=str(folder / "step_000002"), learning_rate=1e-3))
    again = train(TrainConfig.make(**{**kw, "max_steps": 4}, resume=str(folder / "step_000002")))
    assert {"abandoned-step_000004", "abandoned-step_000006", "step_000004"} <= {
        p.name for p in folder.iterdir()
    } and [r["step"] for r in again.history] == [1, 2, 3, 4]
    other = train(
        TrainConfig.make(
            **{**kw, "max_steps": 5}, resume="latest", learning_rate=1e-3, resume_changed=True
        )
    )
    assert other.history[-1]["lr"] > 3e-4
    import hashlib

    state = folder / "step_000005" / "state.json"
    d = json.loads(state.read_text())
    d["schema"] = 99
    state.write_text(json.dumps(d))
    index = state.parent / "sha256.json"
    h = json.loads(index.read_text())
    h["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    index.write_text(json.dumps(h))
    with pytest.raises(ConfigError, match="newer masked_ldm"):
        train(TrainConfig.make(**kw, resume="latest", learning_rate=1e-3))


def curve(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_one(tmp_path, quick):
    "A14, as users start it. The first step is equal to seven digits; after it AdamW, which divides a gradient by its own size, carries on what float32 sums in another order."
    from masked_ldm.train import TrainConfig, train

    given = {**quick, "T": 400, "max_steps": 2, "val_pictures": 0}
    one = train(TrainConfig.make(**given)).history
    code, text = train_by_two({**given, "out_dir": tmp_path / "two"})
    assert code == 0, text
    assert json.loads((tmp_path / "two" / "data.json").read_text())["processes"] == 2
    two = curve(tmp_path / "two")
    assert len(one) == len(two) == 2
    for k, (a, b) in enumerate(zip(one, two)):
        assert abs(a["loss"] - b["loss"]) < (1e-5, 1e-4)[k > 0] and abs(
            a["grad_norm"] - b["grad_norm"]
        ) < (1e-5, 1e-3)[k > 0] * max(1, a["grad_norm"]), (k, a, b)


@pytest.mark.parametrize("latent", [False, True], ids=["pixels", "latents"])
def test_two_processes_are_one_with_every_switch(latent, tmp_path, quick):
    "A14 in float64, timesteps spread, decoding capped and dealt, weights averaged, steps in parts: the same curve and the same weights."
    from in_float64 import float64

    from masked_ldm.train import TrainConfig, train

    given = {
        **quick,
        "T": 800,
        "size": 64,
        "max_steps": 3,
        "val_pictures": 0,
        "stratified_t": True,
        "max_decoded": 2,
        "use_ema": True,
        "ema_decay": 0.5,
        "decode_batch": 1,
        "balance": 1.0,
        "x0_steps": 2,
        "face_weight": 3.0,
        "ldm_face_weight": 8.0,
        "lambda3": 0.1,
    }
    if latent:
        given |= dict(size=32, lpips_net="latent", lpips_views=True, lambda2=0.0, lambda3=0.0)
    with float64():
        one = train(TrainConfig.make(**given))
    two = {**given, "out_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 2}
    code, text = by_two(
        ROOT / "tests" / "in_float64.py",
        json.dumps(two),
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    assert code == 0, text
    a, b = weights(one.path), weights(tmp_path / "two")
    assert all(v.dtype == torch.float64 and (v - b[k]).abs().max() < 1e-9 for k, v in a.items()), (
        max((v - b[k]).abs().max() for k, v in a.items())
    )
    terms = ("ldm", "lpips") if latent else ("ldm", "lpips", "face", "pose")
    assert all(any(row[term] for row in one.history) for term in terms)
    for x, y in zip(one.history, curve(tmp_path / "two")):
        assert x["bands"] == y["bands"] and all(
            abs(x[k] - y[k]) < 2e-6
            for k in (*terms, "loss", "grad_norm", "gradient_ratio", "lambda_scale")
            if x[k] is not None
        ), (x, y)  # written to six digits


@pytest.mark.parametrize(
    "switches",
    [{}, dict(stratified_t=True), dict(stratified_t=True, max_decoded=3), dict(max_decoded=5)],
    ids=str,
)
def test_samples_are_dealt_evenly(switches):
    "Any number of processes, any number of parts: each sample once, and each decodes the same number, give or take one, in each part and in the whole step."
    from masked_ldm.training.config import TrainConfig
    from masked_ldm.training.timesteps import sample_assignment, step_timesteps

    config = TrainConfig.make(T=300, batch_size=16, **switches)
    for step in range(20):
        timesteps = step_timesteps(config, step, (4, 16, 16))
        decoded = timesteps.t < 300
        if timesteps.decode_weights is not None:
            decoded &= timesteps.decode_weights > 0
        for n in (1, 2, 4):
            for parts in (1, 2, 4):
                config.gradient_accumulation_steps = parts
                got = [sample_assignment(config, timesteps, r, n) for r in range(n)]
                assert all([len(p) for p in ps] == [16 // n // parts] * parts for ps in got)
                assert sorted(p for ps in got for part in ps for p in part) == list(range(16))
                each = torch.tensor([[int(decoded[part].sum()) for part in ps] for ps in got])
                assert (
                    each.sum() == decoded.sum()
                    and each.max() - each.min() <= 1
                    and each.sum(1).max() - each.sum(1).min() <= 1
                ), (n, parts, each)


def test_bf16_runs_on_a_cpu(quick):
    "As the sd15 presets train, with cached text of the same precision: losses near those of float32, nothing dead."
    from masked_ldm.train import TrainConfig, train

    a, b = (
        train(
            TrainConfig.make(
                **{
                    **quick,
                    "out_dir": quick["out_dir"] + p,
                    "val_pictures": 0,
                    "max_steps": 1,
                    "batch_size": 2,
                    "world_pictures": 8,
                    "sample_prompts": ["A man."],
                    "T": 1000,
                    "mixed_precision": p,
                    "cache_latents": p == "bf16",
                }
            )
        )
        for p in ("no", "bf16")
    )
    assert all(
        abs(x["loss"] - y["loss"]) < 0.02 * x["loss"] for x, y in zip(a.history, b.history)
    ) and all(b.norms.values()), (a.history, b.history)


def test_as_published_runs_and_is_dead(tmp_path, quick):
    from masked_ldm.train import TrainConfig, Trainer

    config = TrainConfig.make(**{**quick, "val_pictures": 0, "variant": "as_published"})
    norms = Trainer(config, tmp_path / "run").preflight()
    assert norms["lpips"] == norms["face"] == 0 and norms["ldm"] > 0


def test_each_person_once(tmp_path, quick):
    from masked_ldm.data.dataset import collate
    from masked_ldm.train import TrainConfig, Trainer
    from masked_ldm.training.step import StepDraw
    from masked_ldm.training.timesteps import sample_noise

    got = {}
    for each in (False, True):
        tr = Trainer(
            TrainConfig.make(**{**quick, "per_person": each, "T": 1000}), tmp_path / str(each)
        )
        pictures = tr.data.train
        counts = [len(r["people"]) for r in pictures.rows]
        i, k = counts.index(1), max(range(len(counts)), key=counts.__getitem__)
        noise, posterior_noise, _ = sample_noise(0, 0, range(2), tr.latent_shape)
        draw = StepDraw(noise, posterior_noise, torch.full((2,), 200))
        with torch.no_grad():
            got[each] = tr.losses(collate([pictures[i], pictures[k]]), draw).values["lpips"]
    assert (
        counts[k] > 1
        and abs(got[True][0] - got[False][0]) < 1e-6
        and abs(got[True][1] - got[False][1]) > 1e-5
    )  # one person: the same; several: not


def test_not_finite_is_skipped_counted_and_ends(tmp_path, quick):
    from masked_ldm.data.dataset import collate
    from masked_ldm.train import TrainConfig, Trainer

    tr = Trainer(TrainConfig.make(**quick), tmp_path / "run")
    b = collate([tr.data.train[i] for i in range(4)])
    branch = tr.trained.branch
    before = {n: p.clone() for n, p in branch.named_parameters()}
    b.pixels[0, 0, 0, 0] = float("nan")
    for _ in range(4):
        assert tr.step([(range(4), b)]) == []
    with pytest.raises(FloatingPointError, match="5 steps in a row"):
        tr.step([(range(4), b)])
    assert (
        tr.skipped == 5
        and all(torch.equal(p, before[n]) for n, p in branch.named_parameters())
        and (tmp_path / "run" / "checkpoints" / "step_000005").is_dir()
    )


def test_without_judges(tmp_path, quick):
    from masked_ldm.train import TrainConfig, train

    r = train(TrainConfig.make(**{**quick, "val_pictures": 0, "max_steps": 1}))
    assert r.metrics is None and "not judged" in (r.path / "README.md").read_text()


@pytest.mark.parametrize(
    "given, said",
    [
        (["--min_area", ".99"], "is left after filtering"),
        (["--batch_size", "5000"], "batch_size 5000 is more than the"),
        (["--base", "nbs", "--data_root", "WORLD"], "lacks model_index.json"),
    ],
)
def test_command_line_says_it_in_one_sentence(given, said, quick, world):
    from masked_ldm.train import main

    own = [str(world) if word == "WORLD" else word for word in given]
    with pytest.raises(SystemExit) as e:
        main([*map(str, flags(quick)), *own])
    text = str(e.value)
    assert text.startswith("masked-ldm-train: ") and said in text and "\n" not in text


def test_missing_weights_are_listed_at_once(tmp_path, world):
    code, text = run(
        sys.executable,
        "-m",
        "masked_ldm.train",
        "--preset",
        "sd15",
        "--data_root",
        world,
        "--out_dir",
        tmp_path / "run",
        HF_HUB_OFFLINE="1",
        HF_HOME=tmp_path,
        TORCH_HOME=tmp_path,
        https_proxy="http://127.0.0.1:9",
        http_proxy="http://127.0.0.1:9",
        HTTPS_PROXY="http://127.0.0.1:9",
    )
    last = text.strip().splitlines()[-1]
    assert code and all(
        s in last
        for s in (
            "5 network(s) of this run cannot be loaded",
            "stable-diffusion-v1-5",
            "vgg16-397923af.pth",
            "vggface2",
            "alexnet",
            "casia-webface",
        )
    ), text


def start(*flags):
    "A run in a process of its own."
    return subprocess.Popen(
        [sys.executable, "-m", "masked_ldm.train", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def flags(given):
    return [x for k, v in given.items() for x in (f"--{k}", v)]


def steps_done(folder):
    log = folder / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run of eight steps that nobody disturbs: (its settings, its weights)."
    from masked_ldm.train import TrainConfig, train

    tmp = tmp_path_factory.mktemp("whole")
    given = dict(
        cache_dir=str(tmp / "cache"),
        world_pictures=24,
        val_pictures=0,
        max_steps=8,
        batch_size=2,
        sample_interval=100,
        sample_steps=1,
        checkpointing_steps=2,
        log_steps=1,
        report_to="none",
    )
    return given, weights(train(TrainConfig.make(**given, out_dir=str(tmp / "run"))).path)


@pytest.mark.parametrize("signum, workers", [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_asked_to_stop(signum, workers, whole, tmp_path, capsys):
    "The whole process group is told, as schedulers and terminals do: the state is saved, the exit status is the shell's, and going on ends where an undisturbed run ends."
    given, want = whole
    given = {
        **given,
        "out_dir": tmp_path / "run",
        "checkpointing_steps": 100,
        "dataloader_num_workers": workers,
    }
    p = start(*flags(given))
    wait_for(lambda: steps_done(tmp_path / "run") >= 2)
    os.killpg(p.pid, signum)
    text = p.communicate(timeout=120)[0]
    assert p.returncode == 128 + signum, text
    last = text.strip().splitlines()[-1]
    assert (
        "Traceback" not in text
        and f"stopped by {signum.name} after step" in last
        and "resume=latest" in last
    ), text
    from masked_ldm.train import TrainConfig, train

    train(
        TrainConfig.make(
            **{**given, "dataloader_num_workers": 0, "out_dir": str(given["out_dir"])},
            resume="latest",
        )
    )
    assert "going on from step_" in capsys.readouterr().out
    got = weights(tmp_path / "run")
    assert all(torch.equal(got[k], v) for k, v in want.items())


def test_interrupted_papermill_can_go_on(whole, tmp_path):
    given, want = whole
    given = {**given, "out_dir": tmp_path / "run", "checkpointing_steps": 100}
    p = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "papermill",
            "nbs/05_train.ipynb",
            tmp_path / "o.ipynb",
            "--no-progress-bar",
            *(x for k, v in given.items() for x in ("-p", k, str(v))),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: steps_done(tmp_path / "run") >= 2)
    p.send_signal(signal.SIGINT)
    text = p.communicate(timeout=120)[0]  # its own exit status varies
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")), text
    code, text = papermill(tmp_path / "o2.ipynb", *given.items(), ("resume", "latest"))
    assert code == 0, text
    got = weights(tmp_path / "run")
    assert all(torch.equal(got[k], v) for k, v in want.items())


def test_gate_and_warm_up_reach_the_run(tmp_path, quick):
    from masked_ldm.train import TrainConfig, Trainer, train

    rows = train(
        TrainConfig.make(
            **{**quick, "max_steps": 4, "T": 1000, "lambda_warmup_steps": 3, "gate": "cosine"}
        )
    ).history
    assert (
        rows[0]["lpips"] is None
        and rows[0]["face"] is None
        and all(r["lpips"] and r["face"] for r in rows[1:])
    )  # the lambdas start at 0, the preflight looks at them full
    run = Trainer(TrainConfig.make(**quick, T=500, gate="linear"), tmp_path)
    assert run.objective.gate(torch.tensor([0, 250, 500])).tolist() == [1, 0.5, 0]


def test_out_of_memory_says_what_fits_and_loses_nothing(tmp_path, whole, monkeypatch):
    from masked_ldm import train as module
    from masked_ldm.settings import is_user_error

    given, want = whole
    half = {**given, "out_dir": str(tmp_path / "half"), "checkpointing_steps": 100}
    losses = module.Trainer.losses

    def full(self, *a, **kw):
        if self.step_done == 2:
            raise torch.OutOfMemoryError  # it may say nothing
        return losses(self, *a, **kw)

    monkeypatch.setattr(module.Trainer, "losses", full)
    monkeypatch.setattr(module, "advice", lambda *a: "gradient_checkpointing=True")
    with pytest.raises(
        RuntimeError,
        match=r"out of memory in step 3 .OutOfMemoryError.; .*resume=latest and gradient_checkpointing=True",
    ) as e:
        module.train(module.TrainConfig.make(**half))
    assert is_user_error(e.value) and (tmp_path / "half" / "checkpoints" / "step_000002").is_dir()
    monkeypatch.setattr(module.Trainer, "losses", losses)
    got = weights(module.train(module.TrainConfig.make(**half, resume="latest")).path)
    assert all(torch.equal(got[k], v) for k, v in want.items())


def test_a_tracker_or_hub_that_fails_is_said_once(tmp_path, quick, monkeypatch, capsys):
    import huggingface_hub
    from accelerate import Accelerator

    from masked_ldm.train import TrainConfig, train
    from masked_ldm.training.config import ConfigError

    def away(*a, **kw):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Accelerator, "log", away)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", away)
    done = train(
        TrainConfig.make(
            **{
                **quick,
                "report_to": "tensorboard",
                "push_to_hub": True,
                "hub_model_id": "me/mine",
                "val_pictures": 0,
                "max_steps": 2,
            }
        )
    )
    said = capsys.readouterr().out
    assert (
        said.count("no route to host") == 2
        and "tensorboard failed, the run goes on without it" in said
        and "the upload to the Hub failed" in said
        and (done.path / "controlnet").is_dir()
    )
    with pytest.raises(ConfigError, match="push_to_hub needs hub_model_id"):
        TrainConfig.make(push_to_hub=True)
    monkeypatch.setattr("masked_ldm.training.logging.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package trackio"):
        train(
            TrainConfig.make(
                **{**quick, "out_dir": str(tmp_path / "other"), "report_to": "trackio"}
            )
        )


def test_a_resumed_run_goes_on_in_the_same_curve_of_its_tracker(tmp_path, quick, monkeypatch):
    from accelerate import Accelerator

    from masked_ldm.train import TrainConfig, train

    got = []
    monkeypatch.setattr("masked_ldm.train.check_tracker", lambda name: None)
    monkeypatch.setattr(
        Accelerator,
        "init_trackers",
        lambda self, name, config, init_kwargs: got.append(init_kwargs),
    )
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *a: [])
    given = {
        **quick,
        "report_to": "wandb",
        "val_pictures": 2,
        "max_steps": 1,
        "checkpointing_steps": 1,
    }
    train(TrainConfig.make(**given))
    before = json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8"))
    more = {**given, "max_steps": 2, "val_pictures": 0}
    train(TrainConfig.make(**more, resume="latest"))
    now = json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8"))
    assert now["val"] == before["val"] and now["val_info"] == before["val_info"]  # can be judged
    first, again = got
    assert first == again and first["wandb"]["resume"] == "allow"
    saved = json.loads((tmp_path / "run" / "tracker.json").read_text())
    assert saved == dict(id=first["wandb"]["id"])


def test_a_full_disk_while_a_grid_is_written_is_named(tmp_path, quick, monkeypatch, capsys):
    from PIL import Image

    from masked_ldm.train import TrainConfig, Trainer

    tr = Trainer(TrainConfig.make(**{**quick, "val_pictures": 0}), tmp_path / "run")

    def full(self, path, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    for _ in range(2):
        tr.draw_grid()
    assert not tr.grids
    said = capsys.readouterr().out.strip().splitlines()
    assert (
        said[-1]
        == f"the sample grid failed, the run goes on without it: OSError: {tmp_path / 'run' / 'samples' / 'step_000000.png'} cannot be written (No space left on device)"
        and sum("sample grid" in row for row in said) == 1
    )


def test_the_upload_holds_what_is_needed(tmp_path, monkeypatch):
    import huggingface_hub

    from masked_ldm.training.hub import push_to_hub

    got = {}
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo, exist_ok: got.update(repo=repo)
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, **kw: got.update(kw) or "https://hf.co/me/mine",
    )
    assert (
        push_to_hub(tmp_path, "me/mine") == "https://hf.co/me/mine"
        and got["repo_id"] == "me/mine"
        and "controlnet/*" in got["allow_patterns"]
        and "README.md" in got["allow_patterns"]
        and not any("checkpoint" in p for p in got["allow_patterns"])
    )


def test_averaged_weights_go_on_and_the_best_stays(tmp_path, quick):
    from masked_ldm.train import TrainConfig, train

    kw = {
        **quick,
        "max_steps": 4,
        "val_pictures": 2,
        "use_ema": True,
        "ema_decay": 0.5,
        "validation_steps": 2,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
    }
    whole = train(TrainConfig.make(**kw))
    half = tmp_path / "half"
    shutil.copytree(whole.path, half)
    shutil.rmtree(half / "controlnet")
    shutil.rmtree(half / "checkpoints" / "step_000004")
    kw["out_dir"] = str(half)
    rest = train(TrainConfig.make(**kw, resume="latest"))  # 3: after a judgement, before the next
    a, b = weights(whole.path), weights(rest.path)
    assert all(torch.equal(a[k], b[k]) for k in a)  # the average went on too
    last = load_file(
        sorted((whole.path / "checkpoints").iterdir())[-1]
        / "controlnet"
        / "diffusion_pytorch_model.safetensors"
    )
    assert any(
        not torch.equal(a[k], last[k]) for k in a
    )  # saved: the average; kept to go on: the weights
    scores = {r["step"]: r["validation"]["score"] for r in whole.history if "validation" in r}
    assert sorted(scores) == [2, 4]
    best = min(scores, key=scores.get)
    assert json.loads((whole.path / "metrics.json").read_text())["best"]["step"] == best and {
        p.name for p in (whole.path / "checkpoints").iterdir()
    } == {f"step_{best:06d}", "step_000003", "step_000004"}
    assert [r for r in rest.history if "validation" in r] == [
        r for r in whole.history if "validation" in r
    ] and "averaged with a decay that rose to 0.3077" in (whole.path / "README.md").read_text()


def test_accelerates_environment_changes_nothing(tmp_path, monkeypatch, capsys):
    from masked_ldm.training.config import TrainConfig
    from masked_ldm.training.processes import make_accelerator

    for name, value in dict(
        GRADIENT_ACCUMULATION_STEPS="4",
        MIXED_PRECISION="fp16",
        DYNAMO_BACKEND="INDUCTOR",
        DYNAMO_USE_FULLGRAPH="true",
        FP8_BACKEND="TE",
        USE_PARALLELISM_CONFIG="true",
        DOWNCAST_BF16="true",
        GRADIENT_CLIPPING="0.1",
    ).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    accelerator = make_accelerator(TrainConfig.make(report_to="none"), tmp_path)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.mixed_precision == accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert os.environ["ACCELERATE_FP8_BACKEND"] == "TE"
    said = capsys.readouterr().out
    assert "not followed" in said and "ACCELERATE_DYNAMO_BACKEND=INDUCTOR" in said


def test_one_folder_one_run(tmp_path, quick):
    from masked_ldm.training.run_folder import RunFolder

    folder = RunFolder(tmp_path / "run")
    folder.lock()
    try:
        code, text = run(
            sys.executable,
            "-m",
            "masked_ldm.train",
            *(f"--{k}={v}" for k, v in quick.items()),
            OMP_NUM_THREADS="1",
        )
    finally:
        folder.unlock()
    assert (
        code == 1
        and text.strip().splitlines()[-1]
        == f"masked-ldm-train: run folder {tmp_path / 'run'} is in use by another process"
    ), text


def test_a_dead_data_worker_is_said_in_one_sentence(whole, tmp_path):
    "B20: the news arrive by a signal, wherever the run is."
    given, _ = whole
    given = {
        **given,
        "out_dir": tmp_path / "run",
        "max_steps": 400,
        "sample_interval": 10**6,
        "dataloader_num_workers": 1,
    }
    p = start(*flags(given))
    wait_for(lambda: steps_done(tmp_path / "run") >= 2)
    children = [
        int(c) for c in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text("utf-8").split()
    ]
    assert children
    os.kill(children[-1], signal.SIGKILL)
    text = p.communicate(timeout=120)[0]
    last = text.strip().splitlines()[-1]
    assert (
        p.returncode == 1
        and last.startswith("masked-ldm-train: a data worker died")
        and "resume=latest" in last
    ), text


def test_a_full_disk_is_named_and_the_state_saved(tmp_path, quick, monkeypatch):
    import builtins

    from masked_ldm import train as module

    written, really_open = [], open

    class Full:
        "A file on a disk that is full from the third line on."

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, text):
            written.append(text)
            if len(written) == 3:
                raise OSError(28, "No space left on device")
            self.file.write(text)

    def open_full(path, mode="r", **kw):
        file = really_open(path, mode, **kw)
        return Full(file) if mode == "a" and str(path).endswith("metrics.jsonl") else file

    monkeypatch.setattr(builtins, "open", open_full)
    with pytest.raises(
        OSError,
        match="metrics.jsonl cannot be written .No space left on device.; the state is saved in .*step_000003",
    ):
        module.train(
            module.TrainConfig.make(**{**quick, "val_pictures": 0, "checkpointing_steps": 100})
        )
    assert (tmp_path / "run" / "checkpoints" / "step_000003").is_dir()
