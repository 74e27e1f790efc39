"Other families of bases: what can be trained beside each trains, resumes, draws, is judged and opens elsewhere."

import json
import shutil

import pytest
import torch
from conftest import in_process
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
from safetensors.torch import load_file

from masked_ldm import evaluate
from masked_ldm.families import FAMILIES
from masked_ldm.models import known_family, load_base, set_precision
from masked_ldm.sample import MaskedLDMPipeline, sample
from masked_ldm.toy.bases import write_small_base
from masked_ldm.train import TrainConfig, train
from masked_ldm.training.config import ConfigError
from masked_ldm.training.hub import model_card
from masked_ldm.training.trainable import WEIGHTS, check_family, make_trainable

BASES = ("sd2", "sdxl", "sd3")
CELLS = [(base, kind) for base in BASES[:2] for kind in WEIGHTS] + [("sd3", "lora")]
each_cell = pytest.mark.parametrize(("name", "kind"), CELLS, ids=["-".join(cell) for cell in CELLS])
each_base = pytest.mark.parametrize("name", BASES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "kind of base -> its folder, written once."
    folder = tmp_path_factory.mktemp("bases")
    return {name: write_small_base(folder / name, name) for name in BASES}


@pytest.fixture(scope="module")
def settings(short, world):
    return short | dict(
        data_root=str(world),
        min_area=0.0,
        val_pictures=2,
        max_steps=2,
        batch_size=2,
        T=600,
        learning_rate=1e-3,
        lr_warmup_steps=0,
        checkpointing_steps=1,
        proportion_empty_prompts=0.5,
    )


@pytest.fixture(scope="module")
def finished(settings, bases, tmp_path_factory):
    "(base, kind) -> a run of two steps, made once."
    made = {}

    def run(name, kind):
        if (name, kind) not in made:
            out = tmp_path_factory.mktemp("run") / f"{name}-{kind}"
            own = dict(base=str(bases[name]), trainable=kind, out_dir=str(out))
            made[name, kind] = train(TrainConfig.make(**settings, **own))
        return made[name, kind]

    return run


def weights(run, kind):
    return load_file(run.path / kind / WEIGHTS[kind])


@each_cell
def test_trains_and_is_judged(finished, name, kind):
    run = finished(name, kind)
    assert all(norm > 0 for norm in run.norms.values()) and set(run.norms) >= {"ldm", "lpips"}
    assert run.metrics["one_step"]["person"] and len(run.grids) == 2
    assert {k for k in WEIGHTS if (run.path / k).exists()} == {kind}
    card = (run.path / "README.md").read_text(encoding="utf-8")
    assert f"tags: [{kind}, masked-ldm]" in card


@each_cell
def test_resumes_to_the_bit_from_a_cache(finished, settings, bases, name, kind, tmp_path):
    own = dict(settings, base=str(bases[name]), trainable=kind, val_pictures=0, cache_latents=True)
    whole = train(TrainConfig.make(**own, out_dir=str(tmp_path / "whole")))
    half = dict(own, out_dir=str(tmp_path / "half"))
    train(TrainConfig.make(**{**half, "max_steps": 1}))
    rest = train(TrainConfig.make(**half, resume="latest"))
    want, got, uncached = (weights(run, kind) for run in (whole, rest, finished(name, kind)))
    assert want and all(torch.equal(got[key], value) for key, value in want.items())
    for key, value in want.items():  # encoded in other batches
        torch.testing.assert_close(uncached[key], value, atol=2e-3, rtol=0)


@each_cell
def test_draws_as_diffusers_does(finished, bases, name, kind, tmp_path):
    run = finished(name, kind)
    ours = MaskedLDMPipeline.from_run(run.path)
    base = load_base(bases[name])
    family, loaded = base.family, {}
    without = dict(text_encoder_3=None, tokenizer_3=None) if name == "sd3" else {}
    if kind == "controlnet" and name == "sdxl":
        branch = ControlNetModel.from_pretrained(run.path / kind)
        theirs = StableDiffusionXLControlNetPipeline.from_pretrained(bases[name], controlnet=branch)
        loaded = dict(image=torch.zeros(1, 3, 64, 64))
    elif kind == "unet":
        unet = type(base.unet).from_pretrained(run.path / kind)
        theirs = family.pipeline.from_pretrained(bases[name], unet=unet)
    elif kind == "lora":
        theirs = family.pipeline.from_pretrained(bases[name], **without)
        theirs.load_lora_weights(run.path / kind)
    else:
        pytest.skip("Stable Diffusion 2's branch opens as that of 1.5 does")
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = type(ours.scheduler).from_config(ours.scheduler.config)
    how = dict(num_inference_steps=2, guidance_scale=3.0, height=64, width=64, output_type="np")
    drawn = [
        pipeline("a man", generator=torch.Generator().manual_seed(0), **how, **more).images
        for pipeline, more in ((ours, {}), (theirs, loaded))
    ]
    torch.testing.assert_close(*map(torch.from_numpy, drawn), atol=1e-4, rtol=0)
    copied = tmp_path / "copy"
    ours.save_pretrained(copied)
    again = MaskedLDMPipeline.from_run(copied)
    same = [sample(pipeline, ["a man"], steps=1, scheduler="dpm")[0] for pipeline in (ours, again)]
    assert same[0].tobytes() == same[1].tobytes()


@each_cell
def test_is_evaluated(finished, name, kind, tmp_path):
    how = ["--n", "4", "--reference", "4", "--sample_steps", "1", "--sample_scheduler", "dpm"]
    run = finished(name, kind)
    code, said = in_process(evaluate.main, run.path, *how, "--out", tmp_path / "judged")
    assert code == 0, said
    report = json.loads((tmp_path / "judged" / "evaluation.json").read_text(encoding="utf-8"))
    assert set(report["models"]) == {"base", "real", run.path.name}


@each_base
def test_an_untrained_lora_draws_what_its_base_draws_and_strength_0_too(finished, name):
    run = finished(name, "lora")
    how = dict(steps=2, scheduler="unipc")
    alone = MaskedLDMPipeline.from_pretrained(load_base(run.config.base).path)
    silent = MaskedLDMPipeline.from_run(run.path, strength=0.0)
    pictures = [sample(pipeline, ["a man"], **how)[0] for pipeline in (alone, silent)]
    assert pictures[0].tobytes() == pictures[1].tobytes()


REFUSED = {
    "branch": (dict(trainable="controlnet"), "trainable controlnet cannot be with base .*sd3, a"),
    "unet": (dict(trainable="unet"), "there it is lora"),
    "snr": (dict(trainable="lora", snr_gamma=5.0), "snr_gamma 5 is of a diffusion, and base"),
    "steps": (dict(trainable="lora", x0_steps=2), "x0_steps 2 is of a diffusion"),
    "ddim": (dict(trainable="lora", sample_scheduler="ddim"), "it must be dpm or unipc"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_flow_does_not_know_is_refused_before_anything_is_loaded(
    bases, settings, what, tmp_path
):
    given, said = REFUSED[what]
    out = tmp_path / "run"
    config = TrainConfig.make(**settings, **given, base=str(bases["sd3"]), out_dir=str(out))
    with pytest.raises(ConfigError, match=said):
        train(config)
    assert not out.exists()


def test_a_flow_is_not_drawn_by_ddim(finished):
    pipeline = MaskedLDMPipeline.from_run(finished("sd3", "lora").path)
    with pytest.raises(ValueError, match="ddim draws from a diffusion, not from a flow"):
        sample(pipeline, ["a man"], scheduler="ddim")


def test_a_named_base_is_known_before_it_is_fetched():
    assert {known_family(name) for name in ("sdxl", "sd3")} == set(FAMILIES[:2])
    assert known_family("somebody/model") is None
    with pytest.raises(ConfigError, match="trainable unet cannot be with base sd3"):
        config = TrainConfig(trainable="unet", base="sd3")
        check_family(config, known_family("sd3"))


def test_beside_float16_an_autoencoder_computes_in_float32(bases):
    "Also where a pipeline is asked for float16: that of Stable Diffusion XL overflows in it."
    pipeline = MaskedLDMPipeline.from_pretrained(bases["sdxl"], torch_dtype=torch.float16)
    seen = []
    pipeline.vae.decoder.conv_in.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    latents = torch.randn(1, 4, 16, 16, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        pipeline.vae.decode(latents)
    assert seen == [torch.float32] and pipeline.unet.dtype == torch.float16


def test_noise_of_another_kind_is_refused(bases, tmp_path):
    spoilt = tmp_path / "edm"
    shutil.copytree(bases["sdxl"], spoilt)
    scheduler = spoilt / "scheduler" / "scheduler_config.json"
    told = json.loads(scheduler.read_text(encoding="utf-8"))
    scheduler.write_text(json.dumps(told | dict(_class_name="EDMEulerScheduler")), encoding="utf-8")
    with pytest.raises(ValueError, match="EDMEulerScheduler, whose noise is of another kind"):
        load_base(spoilt)
    scheduler.write_text(json.dumps(told), encoding="utf-8")
    vae = spoilt / "vae" / "config.json"
    told = json.loads(vae.read_text(encoding="utf-8"))
    vae.write_text(json.dumps(told | dict(latents_mean=[1.0] * 4)), encoding="utf-8")
    with pytest.raises(ValueError, match="latents_mean, a shift of each channel"):
        load_base(spoilt)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_caption_is_what_the_base_has_it_to_be(bases, tmp_path, zeros):
    folder = tmp_path / "base"
    shutil.copytree(bases["sdxl"], folder)
    index = folder / "model_index.json"
    told = json.loads(index.read_text(encoding="utf-8"))
    told["force_zeros_for_empty_prompt"] = zeros
    index.write_text(json.dumps(told), encoding="utf-8")
    base = load_base(folder)
    assert bool(base.embed([""]).any()) is not zeros and base.embed(["a man"]).any()
    pipeline = MaskedLDMPipeline.from_parts(base)
    assert pipeline.config.force_zeros_for_empty_prompt is zeros
    assert pipeline.base.zeros_for_empty is zeros


def test_a_table_of_positions_keeps_its_digits_and_goes_along(bases):
    base = load_base(bases["sd3"])
    config = TrainConfig(trainable="lora", base="sd3", mixed_precision="bf16")
    lora = make_trainable(config, base)
    set_precision(base, "bf16", torch.device("cuda"))  # where weights are halved; they stay here
    assert base.unet.dtype == lora.network.dtype == torch.bfloat16
    assert base.unet.pos_embed.pos_embed.dtype == torch.float32
    x_t, text_emb = torch.randn(2, 16, 16, 16), base.embed(["a man", "a woman"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        of_both = [
            base.predict(network, x_t, torch.tensor([20, 900]), text_emb)
            for network in (base.unet, lora.network)
        ]
    assert torch.equal(*of_both)
    pipeline = MaskedLDMPipeline.from_parts(base, lora).to("meta")
    for network in (pipeline.base_unet, lora.network, pipeline.denoiser):
        assert {buffer.device.type for buffer in network.buffers()} == {"meta"}


def test_a_card_names_its_own_base_and_files():
    said = {
        name: model_card(
            TrainConfig(trainable="lora", base=name, preset=f"{name}-lora"),
            "run",
            1,
            "0" * 64,
            "",
            dict(versions={}, hardware="", commit=""),
        )
        for name in ("sdxl", "sd3")
    }
    assert "base_model: stabilityai/stable-diffusion-xl-base-1.0" in said["sdxl"]
    assert "base_model: stabilityai/stable-diffusion-3-medium-diffusers" in said["sd3"]
    assert ["kohya" in card for card in said.values()] == [True, False]


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_what_the_hub_lacks_is_listed_whole(name, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    family = known_family(name)
    with pytest.raises(FileNotFoundError) as e:
        load_base(name)
    for part in family.parts:
        assert part in str(e.value) and f"{part}/" in str(e.value)
