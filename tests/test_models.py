"Bases as they lie on disks: half precision, other models, damaged files."

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from masked_ldm import models
from masked_ldm.models import (
    BASES,
    decode_latents,
    load_base,
    load_branch,
    make_branch,
    to_unit_scale,
)
from masked_ldm.training.checkpoint import save_branch

TINY = Path(BASES["tiny"])


@pytest.fixture
def base(tmp_path):
    "A base's folder, to be spoilt."
    for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(TINY / part, tmp_path / "base" / part)
    shutil.copy(TINY / "model_index.json", tmp_path / "base")
    return tmp_path / "base"


def weights_of(part):
    return next(part.glob("*.safetensors"))


def test_half_precision_alone_is_read_and_a_relative_path_is_kept_whole(base, monkeypatch):
    for part in ("vae", "unet", "text_encoder"):
        file = weights_of(base / part)
        half = {name: weight.half() for name, weight in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    monkeypatch.chdir(base.parent)
    loaded = load_base("base")
    assert loaded.path == str(base) and loaded.unet.dtype == torch.float32


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(file, edit):
    weights = load_file(file)
    edit(weights, sorted(weights)[3])
    save_file(weights, file, {"format": "pt"})


def poison(weights, name):
    weights[name] = weights[name] * float("nan")


def write(file, value):
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


PARTS = dict.fromkeys(("vae", "unet", "text_encoder", "tokenizer", "scheduler"))
WITHOUT_UNET = {part: None for part in PARTS if part != "unet"}
SPOILT = {
    "vae cut": (lambda b: truncate(weights_of(b / "vae")), "vae of base .* is damaged"),
    "unet cut": (lambda b: truncate(weights_of(b / "unet")), "unet of base .* is damaged"),
    "text cut": (lambda b: truncate(weights_of(b / "text_encoder")), "text_encoder of base"),
    "nan": (lambda b: change(weights_of(b / "unet"), poison), "holds NaN or infinite weights"),
    "a weight gone": (lambda b: change(weights_of(b / "vae"), dict.pop), "damaged: it lacks"),
    "index cut": (lambda b: write(b / "model_index.json", "{"), "model_index.json is damaged"),
    "index a list": (lambda b: write(b / "model_index.json", []), "expected a dict"),
    "config cut": (lambda b: write(b / "unet" / "config.json", "{"), "config.json is damaged"),
    "inpainting": (
        lambda b: write(b / "unet" / "config.json", dict(in_channels=9)),
        "9 input channels",
    ),
    "scheduler cut": (
        lambda b: write(b / "scheduler" / "scheduler_config.json", "{"),
        "scheduler_config.json is damaged",
    ),
    "tokenizer cut": (
        lambda b: [write(file, "{") for file in (b / "tokenizer").glob("*.json")],
        "tokenizer of base .* is damaged",
    ),
    "SD3": (
        lambda b: write(
            b / "model_index.json", WITHOUT_UNET | dict(_class_name="StableDiffusion3Pipeline")
        ),
        "is a StableDiffusion3Pipeline without vae, unet",
    ),
    "SDXL's refiner": (
        lambda b: write(b / "model_index.json", PARTS | dict(text_encoder=[None, None])),
        "without .*text_encoder",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_base_that_is_no_good_is_named(base, how):
    spoil, said = SPOILT[how]
    spoil(base)
    with pytest.raises(ValueError, match=said) as error:
        load_base(base)
    assert str(base) in str(error.value)


FILES = {
    "junk": (b"abc", "is damaged"),
    "SDXL": ({"conditioner.embedders.0.x": (1,)}, "holds no Stable Diffusion 1.x, 2.x or XL"),
    "unet alone": ({models._FIRST: (4, 4, 3, 3)}, "with autoencoder and text encoder"),
    "inpainting": (
        {models._FIRST: (4, 9, 3, 3), "first_stage_model.x": (1,), "cond_stage_model.x": (1,)},
        "9 input channels",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_single_file_that_is_no_base_is_named(tmp_path, what):
    content, said = FILES[what]
    file = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file({name: torch.zeros(shape) for name, shape in content.items()}, file)
    with pytest.raises(ValueError, match=said):
        load_base(file)


def test_what_is_no_file_of_ours_is_not_opened(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="only .safetensors are read"):
        load_base(tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        load_base("/no/such/folder")


def test_offline_only_what_is_needed_is_advised(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as error:
        load_base("sd15")
    assert "--include unet/diffusion_pytorch_model.safetensors" in str(error.value)


def test_latents_are_shifted_and_scaled_as_the_pipelines_do():
    "SD3's and FLUX' autoencoders have a shift."
    vae = load_base("tiny").vae
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 8, 8)
    scaled = to_unit_scale(vae, latents)
    assert torch.allclose(scaled, (latents - 0.0609) * 1.5305)
    assert torch.allclose(decode_latents(vae, scaled), vae.decode(latents).sample, atol=1e-5)


def test_a_saved_branch_may_be_read_by_others(tmp_path):
    base = load_base("tiny")
    old = os.umask(0o022)
    try:
        save_branch(make_branch(base.unet, base.f), tmp_path / "branch")
    finally:
        os.umask(old)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "branch").iterdir()} == {
        "0o644"
    }
    change(weights_of(tmp_path / "branch"), poison)
    with pytest.raises(ValueError, match="holds NaN or infinite weights"):
        load_branch(tmp_path / "branch")
