"What is built and what other tools make of what we write."

import sys
import zipfile

import pytest
from conftest import ROOT, run


def test_wheel_holds_the_base(tmp_path):
    code, text = run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT
    )
    assert code == 0, text
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        f"masked_ldm/assets/tiny/{p}"
        for p in (
            "model_index.json",
            "card.json",
            "vae/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "tokenizer/tokenizer.json",
        )
    } <= set(names)
    assert (
        not any(n.startswith(("tests", "nbs", "runs")) for n in names)
        and wheel.stat().st_size < 36e6
    )


def test_imagefolder_opens_the_manifest(world, tmp_path):
    from datasets import load_dataset

    from masked_ldm.data.manifest import build_manifest, load_manifest

    path = build_manifest(world, "val")
    ds = load_dataset(
        "imagefolder", data_dir=str(path.parent), split="train", cache_dir=str(tmp_path)
    )
    rows, _ = load_manifest(path)
    assert (
        len(ds) == len(rows)
        and ds[0]["captions"] == rows[0]["captions"]
        and ds[0]["image"].size == (64, 64)
        and ds[0]["faces"] == rows[0]["faces"]
    )


def test_diffusers_opens_the_base():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "masked_ldm" / "assets" / "tiny")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a man in the park", num_inference_steps=2, height=64, width=64).images[0].size == (
        64,
        64,
    )


@pytest.mark.parametrize(
    "command",
    [
        "masked-ldm-data",
        "masked-ldm-train",
        "masked-ldm-eval",
        "masked-ldm-sample",
        "masked-ldm-study",
    ],
)
def test_commands_explain_themselves(command):
    import shutil

    code, text = run(shutil.which(command) or command, "--help")
    assert code == 0 and "usage" in text
