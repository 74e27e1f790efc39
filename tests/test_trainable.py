"What is trained, a branch, a LoRA or the whole UNet: each trains, resumes, draws, is judged and opens elsewhere."

import json
import re

import pytest
import torch
from conftest import ROOT, by_two, in_process
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from masked_ldm.models import BASES, load_base
from masked_ldm.sample import MaskedLDMPipeline, load_models, open_runs, sample
from masked_ldm.train import TrainConfig, Trainer, train
from masked_ldm.training.checkpoint import load_checkpoint
from masked_ldm.training.config import ConfigError
from masked_ldm.training.memory_plan import plan
from masked_ldm.training.trainable import (
    WEIGHTS,
    Lora,
    add_lora,
    load_trainable,
    make_trainable,
)

KINDS = {
    "controlnet": dict(trainable="controlnet"),
    "lora": dict(trainable="lora", lora_rank=4, lora_alpha=6),
    "unet": dict(trainable="unet", use_ema=True, ema_decay=0.5),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def settings(short):
    return short | dict(
        world_pictures=16,
        val_pictures=4,
        max_steps=4,
        batch_size=2,
        T=600,
        learning_rate=1e-3,
        lr_warmup_steps=0,
        checkpointing_steps=2,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    "kind -> a run of four steps, made once."
    made = {}

    def run(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp(kind) / "run"
            made[kind] = train(TrainConfig.make(**settings, **KINDS[kind], out_dir=str(out)))
        return made[kind]

    return run


def weights(path, kind):
    return load_file(path / kind / WEIGHTS[kind])


def noise_of(unet):
    "What a UNet says to one input."
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([50]), text).sample


@each_kind
def test_trains_judges_and_writes_what_it_says(finished, kind):
    run = finished(kind)
    assert all(norm > 0 for norm in run.norms.values()) and set(run.norms) >= {"ldm", "lpips"}
    assert [row["step"] for row in run.history] == [1, 2, 3, 4]
    config = json.loads((run.path / "config.json").read_text())
    assert config["trainable"] == kind
    assert {k for k in WEIGHTS if (run.path / k).exists()} == {kind}
    assert run.metrics["one_step"]["person"] and len(run.grids) == 2
    card = (run.path / "README.md").read_text()
    assert f"tags: [{kind}, masked-ldm]" in card and f"`{kind}/" in card
    assert kind == "controlnet" or f"--trainable={kind}" in card


@each_kind
def test_resumes_to_the_bit(finished, settings, kind, tmp_path):
    want = weights(finished(kind).path, kind)
    given = dict(settings, **KINDS[kind], out_dir=str(tmp_path / "half"), val_pictures=0)
    train(TrainConfig.make(**{**given, "max_steps": 2}))
    rest = train(TrainConfig.make(**given, resume="latest"))
    got = weights(rest.path, kind)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())


@each_kind
def test_draws_as_it_was_trained(finished, kind):
    run = finished(kind)
    pipeline, base = MaskedLDMPipeline.from_run(run.path), MaskedLDMPipeline.from_pretrained("tiny")
    assert pipeline.strength == 1 and base.strength == 0
    assert torch.equal(noise_of(pipeline.base.unet), noise_of(base.unet))
    assert not torch.equal(noise_of(pipeline.unet), noise_of(base.unet))
    picture = sample(pipeline, ["A man smiles."], steps=1)[0]
    assert picture.size == (64, 64)
    if kind == "unet":
        with pytest.raises(ValueError, match="strength 0.5: the whole UNet was trained, so"):
            MaskedLDMPipeline.from_run(run.path, strength=0.5)
        with pytest.raises(ValueError, match="nothing beside the base to scale"):
            pipeline.strength = 0.5
    else:
        whole = noise_of(pipeline.unet)
        pipeline.strength = 0.5
        half = noise_of(pipeline.unet)
        pipeline.strength = 0
        none = noise_of(pipeline.unet)
        assert (none - noise_of(base.unet)).abs().max() < 1e-5
        assert 0 < (half - none).norm() < (whole - none).norm()
        assert MaskedLDMPipeline.from_run(run.path, strength=0.5).strength == 0.5


@each_kind
def test_a_saved_pipeline_is_read_again(finished, kind, tmp_path):
    pipeline = MaskedLDMPipeline.from_run(finished(kind).path)
    pipeline.save_pretrained(tmp_path / "copy")
    again = MaskedLDMPipeline.from_run(tmp_path / "copy")
    assert torch.equal(noise_of(again.unet), noise_of(pipeline.unet))


@each_kind
def test_commands_draw_and_judge(finished, kind, tmp_path, monkeypatch):
    from masked_ldm import evaluate, sample
    from masked_ldm.evaluation.report import paper_row

    run = finished(kind).path
    code, text = in_process(sample.main, run, "--sample_steps", 1, "--out", tmp_path / "grid.png")
    assert code == 0 and (tmp_path / "grid.png").is_file(), text
    if kind == "unet":
        code, text = in_process(sample.main, run, "--strength", 0.5, "--out", tmp_path / "g.png")
        assert code and "nothing beside the base to scale" in text and "Traceback" not in text
    quick = dict(n=4, sample_scheduler="dpm", sample_steps=1)
    monkeypatch.setitem(evaluate.PROTOCOLS, "quick", quick)
    out = tmp_path / "judged"
    code, text = in_process(evaluate.main, run, "--reference", 4, "--out", out)
    assert code == 0, text
    report = json.loads((out / "evaluation.json").read_text())
    assert report["runs"]["run"]["trainable"] == kind
    assert report["one_step"]["run minus base"]["noise"] and len(report["weights"]) == 2
    assert report["weights"]["base"] != report["weights"]["run"]
    of_the_paper = paper_row(dict(T=100, lambda1=0.1, lambda2=0.5, trainable=kind))
    assert (of_the_paper is None) == (kind != "controlnet")  # its rows are branches


def test_runs_of_each_kind_stand_beside_one_base(finished):
    "The base's weights are held once, and each model says what it says alone."
    paths = [finished(kind).path for kind in KINDS]
    models = load_models(open_runs(paths), device="cpu")
    base = models.pop("base")
    bare = load_base("tiny")
    assert torch.equal(noise_of(base.unet), noise_of(bare.unet))
    for model, path in zip(models.values(), paths, strict=True):
        assert model.base.unet is base.unet
        assert torch.equal(noise_of(model.unet), noise_of(MaskedLDMPipeline.from_run(path).unet))
    adapted = models[list(models)[1]].unet
    held = {id(weight) for weight in base.unet.parameters()}
    own = [weight for weight in adapted.parameters() if id(weight) not in held]
    assert len(held) + len(own) == len(list(adapted.parameters())) and sum(
        weight.numel() for weight in own
    ) == sum(weight.numel() for weight in load_file(paths[1] / "lora" / WEIGHTS["lora"]).values())


# opened elsewhere


def elsewhere():
    pipeline = StableDiffusionPipeline.from_pretrained(BASES["tiny"], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("file", [WEIGHTS["lora"], "kohya.safetensors"])
def test_a_lora_opens_in_diffusers(finished, file):
    run = finished("lora").path
    ours = noise_of(MaskedLDMPipeline.from_run(run).unet)
    pipeline = elsewhere()
    pipeline.load_lora_weights(str(run / "lora"), weight_name=file)
    assert (noise_of(pipeline.unet) - ours).abs().max() < 1e-5
    pipeline.unload_lora_weights()
    assert (noise_of(pipeline.unet) - ours).abs().max() > 1e-4


def test_a_unet_opens_in_diffusers(finished):
    run = finished("unet").path
    unet = UNet2DConditionModel.from_pretrained(run / "unet")
    assert torch.equal(noise_of(unet), noise_of(MaskedLDMPipeline.from_run(run).unet))


A1111 = (  # names that its converter knows, of the UNet's attention
    r"lora_unet_down_blocks_(\d+)_attentions_(\d+)_(.+)",
    r"lora_unet_mid_block_attentions_(\d+)_(.+)",
    r"lora_unet_up_blocks_(\d+)_attentions_(\d+)_(.+)",
)


def test_kohyas_names_are_those_that_comfyui_and_a1111_look_up(finished):
    "Both cut a name at its first dot and look the rest up among the UNet's modules, joined by _."
    tensors = load_file(finished("lora").path / "lora" / "kohya.safetensors")
    linear = {
        "lora_unet_" + name.replace(".", "_"): module
        for name, module in load_base("tiny").unet.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    parts = {}
    for name, value in tensors.items():
        layer, part = name.split(".", 1)
        parts.setdefault(layer, {})[part] = value
    assert len(parts) == 56
    for layer, of_layer in parts.items():
        assert of_layer.keys() == {"lora_down.weight", "lora_up.weight", "alpha"}
        assert any(re.fullmatch(known, layer) for known in A1111), layer
        down, up = of_layer["lora_down.weight"], of_layer["lora_up.weight"]
        assert (up @ down).shape == linear[layer].weight.shape
        assert of_layer["alpha"].item() == 6 and len(down) == 4


# memory, processes


def test_the_plan_counts_what_is_trained():
    planned = {
        kind: plan(TrainConfig.make(trainable=kind)).memory
        for kind in ("controlnet", "lora", "unet")
    }
    moments = {kind: memory["moments"] for kind, memory in planned.items()}
    assert moments["lora"] < 0.1 * moments["controlnet"] < 0.1 * moments["unet"]
    base = load_base("tiny").unet
    of_unet = sum(weight.nbytes for weight in base.parameters()) / 2**30
    assert moments["unet"] == pytest.approx(2 * of_unet)
    beside = planned["unet"]["weights"] - planned["lora"]["weights"]  # the base's UNet stays
    adapter = moments["lora"] / 2
    assert beside == pytest.approx(of_unet - adapter)
    assert sum(planned["lora"].values()) < sum(planned["unet"].values())
    rank = plan(TrainConfig.make(trainable="lora", lora_rank=64, T=0)).memory["moments"]
    assert rank == pytest.approx(4 * moments["lora"])


def test_lora_in_two_processes_is_lora_in_one(settings, tmp_path):
    from in_float64 import float64

    given = dict(settings, **KINDS["lora"], val_pictures=0, batch_size=4, max_steps=2)
    one, two = ({**given, "out_dir": str(tmp_path / name)} for name in ("one", "two"))
    with float64():
        train(TrainConfig.make(**one))
    code, text = by_two(ROOT / "tests" / "in_float64.py", json.dumps(two))
    assert code == 0, text
    got = [weights(tmp_path / name, "lora") for name in ("one", "two")]
    for name, value in got[0].items():
        assert value.dtype == torch.float64
        assert (got[1][name] - value).abs().max() < 1e-12 + 1e-9 * value.abs().max(), name


# what the parts promise


def test_a_lora_changes_nothing_at_first_and_nothing_of_its_base():
    base = load_base("tiny")
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    adapted = add_lora(base.unet, 4)
    assert torch.equal(noise_of(adapted), noise_of(base.unet))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained and all(".lora_" in name and ".attn" in name for name in trained)
    assert not any(weight.requires_grad for weight in base.unet.parameters())
    assert base.unet.state_dict().keys() == before.keys() and not base.unet.training
    again = add_lora(base.unet, 4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in adapted.state_dict().items())


def test_a_lora_beside_half_precision_stays_in_full():
    base = load_base("tiny", dtype=torch.bfloat16)
    assert {w.dtype for w in Lora(base, add_lora(base.unet, 4)).weights} == {torch.float32}


@pytest.mark.parametrize("kind", ["lora", "unet"])
@pytest.mark.parametrize(
    "more", [dict(gradient_checkpointing=True), dict(channels_last=True)], ids=str
)
def test_switches_that_change_nothing(settings, kind, more, tmp_path):
    from masked_ldm.data.dataset import collate
    from masked_ldm.training.step import StepDraw
    from masked_ldm.training.timesteps import sample_noise

    found = []
    for switches in ({}, more):
        given = dict(settings, trainable=kind, val_pictures=0, x0_steps=2, **switches)
        trainer = Trainer(TrainConfig.make(**given), tmp_path / str(len(found)))
        noise, posterior_noise, _ = sample_noise(0, 0, range(2), trainer.latent_shape)
        draw = StepDraw(noise, posterior_noise, torch.tensor([50, 400]))
        batch = collate([trainer.data.train[i] for i in range(2)])
        trainer.losses(batch, draw).total.backward()
        weights = trainer.trained.weights
        found.append(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]))
    assert (found[0] - found[1]).norm() < 2e-3 * found[0].norm()


def test_in_half_precision_the_trained_weights_stay_in_full(settings, tmp_path):
    small = dict(max_steps=1, batch_size=1, T=0, val_pictures=0, sample_prompts=["A man smiles."])
    given = settings | small | dict(trainable="lora", mixed_precision="bf16")
    run = train(TrainConfig.make(**given, out_dir=str(tmp_path / "run")))
    assert len(run.grids) == 2
    assert {value.dtype for value in weights(run.path, "lora").values()} == {torch.float32}
    pipeline = MaskedLDMPipeline.from_run(run.path)
    assert pipeline.trained.weights[0].dtype == torch.float32
    assert pipeline.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(trainable="all"), "trainable must be one of controlnet, lora, unet, not 'all'"),
        (dict(lora_rank=8), "lora_rank 8 needs trainable lora, not controlnet"),
        (dict(trainable="unet", lora_alpha=2.5), "lora_alpha 2.5 needs trainable lora, not unet"),
        (dict(trainable="lora", lora_rank=0), "lora_rank must be 1 to 1024, not 0"),
        (dict(trainable="lora", lora_alpha=0), "lora_alpha must be above 0, not 0.0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_a_sentence(given, said):
    with pytest.raises(ConfigError) as e:
        TrainConfig.make(**given)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_run_goes_on_with_what_it_trained(finished, settings):
    lora = finished("lora").path
    given = dict(settings, out_dir=str(lora), resume="latest")
    with pytest.raises(ConfigError, match="trainable was 'lora', is 'unet'"):
        train(TrainConfig.make(**given, trainable="unet"))
    base = load_base("tiny")
    checkpoint = lora / "checkpoints" / "step_000004"
    for config, error, said in (
        (dict(trainable="unet"), FileNotFoundError, "is missing: the run trained something else"),
        (dict(trainable="lora", lora_rank=8), ValueError, "weights of another base's LoRA"),
    ):
        trained = make_trainable(TrainConfig.make(**config), base)
        with pytest.raises(error, match=said):
            load_checkpoint(checkpoint, trained, torch.optim.AdamW(trained.weights))


def test_damaged_files_are_named(tmp_path):
    base = load_base("tiny")
    lora = Lora(base, add_lora(base.unet, 4))
    for kind, said in dict(lora="is missing", unet="UNet folder", controlnet="branch").items():
        with pytest.raises(FileNotFoundError, match=said):
            load_trainable(kind, tmp_path, base)
    lora.weights[0].data[0, 0] = torch.nan
    lora.save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / WEIGHTS["lora"]
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        load_trainable("lora", tmp_path, base)
    kohya = (tmp_path / "lora" / "kohya.safetensors").read_bytes()
    for content in (b"", b"<html>" * 99, file.read_bytes()[:999], kohya):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="LoRA .* is damaged") as e:
            load_trainable("lora", tmp_path, base)
        assert "\n" not in str(e.value)
