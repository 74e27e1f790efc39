"float16 with a scaler: what a card without bfloat16 trains in. Here a CPU imitates the card."

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import masked_ldm.train
from masked_ldm.device import choose_precision
from masked_ldm.face_loss import FaceLoss
from masked_ldm.masked_lpips import MaskedLPIPS
from masked_ldm.models import load_base, make_branch, never_in_float16, set_precision
from masked_ldm.sample import MaskedLDMPipeline, sample
from masked_ldm.settings import ConfigError
from masked_ldm.train import TrainConfig, train
from masked_ldm.training import processes
from masked_ldm.training.networks import load_network

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("has_bf16", "best"), [(True, "bf16"), (False, "fp16")])
def test_the_best_that_a_card_has(monkeypatch, has_bf16, best):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert choose_precision("auto", CUDA) == best
    assert [choose_precision(asked, CUDA) for asked in ("no", "fp16")] == ["no", "fp16"]
    if has_bf16:
        assert choose_precision("bf16", CUDA) == "bf16"
    else:
        with pytest.raises(ConfigError, match="bf16: Tesla T4 does not .* say fp16, or auto"):
            choose_precision("bf16", CUDA)


def test_a_cpu_is_told_so_before_anything_is_loaded(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="mixed_precision fp16 needs a GPU"):
        train(TrainConfig.make(mixed_precision="fp16", out_dir=str(out)))
    assert not out.exists()


def half():
    return torch.autocast("cpu", torch.float16)


def test_an_autoencoder_keeps_its_range():
    base = load_base("tiny")
    base.vae.decoder.conv_in.weight.data *= 1e5  # what follows leaves float16
    latents = torch.randn(2, 4, 16, 16)
    want = base.decode(latents)
    with half():
        assert not base.vae.decode(latents).sample.isfinite().all()
        torch.testing.assert_close(base.decode(latents), want)
        moments = base.moments(torch.rand(2, 3, 64, 64))
        assert moments.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), never_in_float16("cpu"):  # which has the range
        assert base.vae.decode(latents).sample.dtype == torch.bfloat16


class FakeCard:
    "A device that says it is a card; weights stay where they are."

    type = "cuda"


def test_a_pipeline_of_diffusers_decodes_in_range_too(monkeypatch):
    base = load_base("tiny")
    monkeypatch.setattr("masked_ldm.models.never_in_float16", lambda kind: never_in_float16("cpu"))
    set_precision(base, "fp16", FakeCard())
    assert base.unet.dtype == base.text_encoder.dtype == torch.float16
    assert base.vae.dtype == torch.float32
    with half():
        decoded = base.vae.decode(torch.randn(1, 4, 16, 16).half()).sample
    assert decoded.dtype == torch.float32
    on_cpu = load_base("tiny")
    set_precision(on_cpu, "fp16")
    assert on_cpu.unet.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    picture = sample(MaskedLDMPipeline.from_parts(on_cpu), ["a man"], steps=1, scheduler="dpm")[0]
    assert picture.size == (64, 64)


@pytest.mark.parametrize("factor", [0.0, 1.0, 1e6])
def test_losses_and_their_gradients_are_finite(factor):
    "Where features are zero, and where they are large."
    people, faces = MaskedLPIPS(load_network("perceptual")), FaceLoss(load_network("face"))
    target = torch.rand(1, 3, 64, 64) * 2 - 1
    pred = (factor * torch.rand(1, 3, 64, 64)).requires_grad_()
    boxes = torch.tensor([[0, 16.0, 16, 48, 48]])
    with half(), never_in_float16("cpu"):
        loss = people(pred, target, torch.ones(1, 1, 64, 64)) + faces(pred, target, boxes)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and pred.grad.isfinite().all()


@pytest.fixture
def card(monkeypatch):
    "Train in float16 on this CPU: accelerate would refuse to."

    def make(own, init_scale, config, folder):
        accelerator = own(config, folder)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale, growth_interval=3)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        return accelerator

    def pretend(init_scale=2.0**10):
        own = processes.make_accelerator
        monkeypatch.setattr(masked_ldm.train, "make_accelerator", partial(make, own, init_scale))

    return pretend


@pytest.fixture
def settings(short):
    return short | dict(
        world_pictures=16,
        val_pictures=0,
        size=32,  # a processor computes float16 slowly
        max_steps=4,
        batch_size=2,
        T=600,
        balance=0.5,
        learning_rate=1e-3,
        lr_warmup_steps=0,
        checkpointing_steps=2,
    )


def branch(run):
    return load_file(run.path / "controlnet" / "diffusion_pytorch_model.safetensors")


def state(run):
    newest = sorted((run.path / "checkpoints").glob("step_*"))[-1]
    return json.loads((newest / "state.json").read_text(encoding="utf-8"))


def test_trains_nearly_as_float32_does_and_resumes_to_the_bit(card, settings, tmp_path):
    wide = train(TrainConfig.make(**settings, out_dir=str(tmp_path / "wide")))
    card()
    whole = train(TrainConfig.make(**settings, out_dir=str(tmp_path / "whole")))
    half_way = dict(settings, out_dir=str(tmp_path / "half"))
    train(TrainConfig.make(**{**half_way, "max_steps": 2}))
    rest = train(TrainConfig.make(**half_way, resume="latest"))
    want, got = branch(whole), branch(rest)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert state(whole)["scaler"] == state(rest)["scaler"]
    assert state(whole)["scaler"]["scale"] == 2**11  # it grew after three steps, two of them before
    assert state(wide)["scaler"] is None
    assert all(any(row[term] for row in whole.history) for term in ("lpips", "face", "ldm"))
    for row, other in zip(whole.history, wide.history, strict=True):
        assert row["loss"] != other["loss"]
        assert row["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
        if "gradient_ratio" in other:  # balance sees gradients of one scale
            assert row["gradient_ratio"] == pytest.approx(other["gradient_ratio"], rel=0.1)


def test_a_scale_that_is_too_large_falls_and_the_steps_are_counted(card, settings, tmp_path):
    card(2.0**28)
    given = dict(settings, max_steps=14, balance=0.0, T=0, checkpointing_steps=14)
    run = train(TrainConfig.make(**given, out_dir=str(tmp_path / "run")))
    end = state(run)
    assert 5 < end["skipped"] < 14
    growths = (14 - end["skipped"]) // 3
    assert end["scaler"]["scale"] <= 2.0 ** (28 - end["skipped"] + growths)
    assert run.history[-1]["loss"] > 0
    fresh = make_branch(load_base("tiny").unet, 4).state_dict()
    moved = [name for name, value in branch(run).items() if not torch.equal(value, fresh[name])]
    assert moved and all(value.isfinite().all() for value in branch(run).values())
