"LPIPS on latents: what its networks refuse, views, the judge, and the making of a student."

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from masked_ldm.latent_features import (
    LatentFeatures,
    PublishedLatentVGG,
    agreement,
    distances_and_gradients,
    load_latent_features,
    load_published,
    through_decoder,
    vae_sha256,
)
from masked_ldm.masked_lpips import MaskedLPIPS, flip_and_shift
from masked_ldm.models import BASES, load_base
from masked_ldm.settings import ConfigError, is_user_error, make_settings
from masked_ldm.toy.networks import random_tapnet
from masked_ldm.toy.scenes import write_world
from masked_ldm.training.config import TrainConfig
from masked_ldm.training.distillation import (
    Distillation,
    DistilSettings,
    Teacher,
    distil,
    spoilt,
)
from masked_ldm.training.networks import load_networks, people_judge

SHIPPED = Path(BASES["tiny"]) / "latent"
ONES = torch.ones(2, 1, 32, 32)


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


@pytest.fixture(scope="module")
def shipped(base):
    return load_latent_features(SHIPPED, base.vae)


def latents(n=2, side=8, channels=4):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    "pred, target, mask, said",
    [
        (
            latents(channels=3),
            latents(channels=3),
            ONES,
            r"latents \(B,4,h,w\), not \(2, 3, 8, 8\)",
        ),
        (latents(), latents(3), ONES, r"not \(2, 4, 8, 8\) and \(3, 4, 8, 8\)"),
        (latents(), None, ONES, "not None: pass `latents` to the objective"),
        (
            latents(),
            latents(),
            ONES[..., :8, :8],
            r"mask is \(8, 8\) but the pictures are \(32, 32\)",
        ),
        (latents(), latents(), ONES[:1], "1 masks do not fit 2 image numbers"),
        (latents(), latents(), 255 * ONES, r"mask must be in \[0,1\], not 255"),
    ],
)
def test_what_does_not_fit_is_refused(shipped, pred, target, mask, said):
    with pytest.raises(ValueError, match=said):
        MaskedLPIPS(shipped)(pred, target, mask)


def test_the_target_gets_no_gradient_and_the_mask_neither(shipped):
    given = [x.clone().requires_grad_() for x in (latents(), latents(3)[:2], 0.5 * ONES)]
    MaskedLPIPS(shipped)(*given).sum().backward()
    assert given[0].grad is not None and given[1].grad is None and given[2].grad is None


def test_it_runs_in_bf16_and_counts_in_float32(shipped):
    args = (latents(), latents(3)[:2], ONES)
    exact = MaskedLPIPS(shipped)(*args)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = MaskedLPIPS(shipped)(*args)
    assert mixed.dtype == torch.float32 and torch.allclose(mixed, exact, rtol=0.05)


def test_a_nan_is_not_left_out(shipped):
    pair = [latents(), latents(3)[:2]]
    pair[0][0, 0, 0, 0] = float("nan")
    found = MaskedLPIPS(shipped)(*pair, ONES)
    assert found[0].isnan() and found[1].isfinite()


def test_a_mask_far_away_sees_nothing_of_a_change():
    "Beyond a student's reach there is nothing, not even through a normalisation."
    torch.manual_seed(0)
    net = LatentFeatures(f=4, taps=((8, 2), (8, 1), (8, 0.5)), width=8, blocks=2)
    net.trunk[0].second.weight.data.normal_()
    z, mask = latents(1, 32), torch.zeros(1, 1, 128, 128)
    changed = z.clone()
    changed[..., :2, :2] += 3
    mask[..., 100:, 100:] = 1
    assert MaskedLPIPS(net)(changed, z, mask).item() == 0
    assert MaskedLPIPS(net)(changed, z, mask.flip(-1, -2)).item() > 0


@pytest.mark.parametrize("views", [torch.zeros(0, 3), torch.rand(2, 3)])
def test_views_of_few_cells_and_of_nobody(views):
    "Below eight cells nothing is moved."
    x = torch.rand(len(views), 1, 4, 4)
    seen = flip_and_shift(x, views)
    assert seen.shape == x.shape
    for view, a, b in zip(views, seen, x):
        assert a.equal(b.flip(-1) if view[0] >= 0.5 else b)


def test_views_move_latents_and_masks_alike(shipped):
    "A change seen from elsewhere is where its mask is; each person goes with the picture."
    loss = MaskedLPIPS(shipped, per_person=True)
    z, changed = latents(2, 32), latents(2, 32)
    changed[..., 12:16, 12:16] += 3
    people = torch.zeros(3, 1, 128, 128)
    people[0, ..., 44:68, 44:68] = people[2, ..., 44:68, 44:68] = 1
    people[1, ..., 100:124, 100:124] = 1
    index = torch.tensor([0, 0, 1])
    views = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.9, 0.1]])
    moved = loss(changed, z, people, index, views=views)
    by_hand = loss(
        flip_and_shift(changed, views),
        flip_and_shift(z, views),
        flip_and_shift(people, views[index], cell=4),
        index,
    )
    assert torch.allclose(moved, by_hand) and not moved.equal(loss(changed, z, people, index))


@pytest.mark.parametrize("views", [torch.rand(1, 3), torch.rand(2, 2), torch.ones(2, 3)])
def test_views_that_do_not_fit(shipped, views):
    with pytest.raises(ValueError, match=r"views must be \(2,3\) in \[0,1\)"):
        MaskedLPIPS(shipped)(latents(), latents(3)[:2], ONES, views=views)


# networks


def test_a_network_of_another_autoencoder_is_refused(base, tmp_path):
    other = copy.deepcopy(base.vae)
    other.decoder.conv_out.bias.data += 1
    with pytest.raises(ValueError, match="distil one for it with masked-ldm-distill"):
        load_latent_features(SHIPPED, other)
    assert vae_sha256(copy.deepcopy(base.vae).half()) == vae_sha256(base.vae)
    assert vae_sha256(other) != vae_sha256(base.vae)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / "config.json").unlink(), "holds no network of latents: config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (
            lambda f: (f / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}'),
            "holds UNet2DConditionModel, and no network of latents",
        ),
        (
            lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"no"),
            "a network of latents, is damaged",
        ),
        (
            lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(),
            "a network of latents, is damaged",
        ),
    ],
)
def test_a_damaged_network_is_named(tmp_path, spoil, said):
    network = LatentFeatures(width=8, blocks=1)
    network.save_pretrained(tmp_path / "student")
    spoil(tmp_path / "student")
    with pytest.raises((ValueError, FileNotFoundError), match=said) as e:
        load_latent_features(tmp_path / "student")
    assert "student" in str(e.value) and "\n" not in str(e.value)


def test_infinite_weights_are_refused(tmp_path):
    network = LatentFeatures(width=8, blocks=1)
    network.enter.bias.data[0] = float("inf")
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds NaN or infinite weights"):
        load_latent_features(tmp_path)


def published(channels=4):
    "A file of elatentlpips as its authors write it: heads twice, the trunk under net."
    weights = PublishedLatentVGG(channels).state_dict()
    twice = {k.replace("lins.", "lin", 1): v for k, v in weights.items() if k.startswith("lins.")}
    return {**weights, **twice}


def test_the_published_layout(base, tmp_path):
    file = tmp_path / "sd15_latest_vgg16_tuned.pth"
    weights = published()
    shapes = {k: tuple(v.shape) for k, v in weights.items()}  # as its authors' file has them
    known = {
        "net.slice1.0.weight": (64, 4, 3, 3),
        "net.slice2.7.weight": (128, 64, 3, 3),
        "net.slice3.21.running_var": (256,),
        "net.slice4.24.weight": (512, 256, 3, 3),
        "net.slice5.41.weight": (512,),
        "lin0.model.1.weight": (1, 64, 1, 1),
        "lins.4.model.1.weight": (1, 512, 1, 1),
    }
    assert {k: shapes[k] for k in known} == known
    assert {k.split(".")[0] for k in shapes} == {"net", "lins", *(f"lin{i}" for i in range(5))}
    torch.save(weights, file)
    network = load_published(file, base.vae)
    assert network.f == base.f and not network.training
    assert not any(p.requires_grad for p in network.parameters())
    for i, head in enumerate(network.heads):
        assert head.equal(weights[f"lin{i}.model.1.weight"].flatten())
    assert MaskedLPIPS(network)(latents(), latents(3)[:2], ONES).isfinite().all()


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "is not there"),
        (b"no", "is damaged"),
        (dict(a=torch.ones(1)), "is no file of elatentlpips 0.2"),
        ([1], "is no file of elatentlpips 0.2"),
        (16, "for latents of 16 channels, and this base has 4"),
    ],
)
def test_a_wrong_published_file_is_named(base, tmp_path, content, said):
    file = tmp_path / "w.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(published(content) if isinstance(content, int) else content, file)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as e:
        load_published(file, base.vae)
    assert "w.pth" in str(e.value)


def test_code_in_a_published_file_is_not_run(tmp_path):
    torch.save(dict(weight=nn.Linear(1, 1)), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is damaged"):
        load_published(tmp_path / "w.pth")


# a run


def test_who_judges_after_a_network_of_latents(tmp_path):
    assert people_judge("latent") == "judge_perceptual"
    about = dict(_class_name="LatentFeatures", teacher="alex")
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert people_judge("latent", "sd15", str(tmp_path)) == "vgg"
    assert people_judge("latent", "sd15", "sd15_latest_vgg16_tuned.pth") == "alex"
    with pytest.raises(FileNotFoundError, match="no network of latents: config.json is not there"):
        people_judge("latent", "sd15", str(tmp_path / "moved"))
    (tmp_path / "config.json").write_text(json.dumps(dict(_class_name="LatentFeatures")))
    with pytest.raises(ValueError, match="does not say which network taught it"):
        people_judge("latent", "sd15", str(tmp_path))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(preset="sd15-fast", data_root="."), "needs latent_net with base sd15: a folder made"),
        (dict(lpips_net="latent", latent_net="no/such"), "no/such is neither tiny nor a folder"),
        (dict(lpips_net="latent", variant="as_published"), "lpips_net not decoder or latent"),
    ],
)
def test_wrong_settings(given, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig.make(**given)


def test_a_run_takes_each_kind_of_network(base, tmp_path):
    torch.save(published(), tmp_path / "w.pth")
    own = LatentFeatures(f=4, width=8, blocks=1, vae=vae_sha256(base.vae))
    own.save_pretrained(tmp_path / "own")
    kinds = {"tiny": LatentFeatures, "own": LatentFeatures, "w.pth": PublishedLatentVGG}
    for name, kind in kinds.items():
        path = name if name == "tiny" else str(tmp_path / name)
        config = TrainConfig.make(lpips_net="latent", latent_net=path, val_pictures=0, lambda2=0)
        loss = load_networks(config).lpips
        assert isinstance(loss.net, kind) and loss.looks_at == "latents"


def test_the_plan_knows_it():
    from masked_ldm.training.memory_plan import plan

    given = dict(T=1000, lambda2=0.0, batch_size=2, val_pictures=0, cache_latents=True)
    plain = plan(TrainConfig.make(**{**given, "T": 0}))
    latent = plan(TrainConfig.make(**given, lpips_net="latent"))
    pixels = plan(TrainConfig.make(**given))
    assert plain.tflop < latent.tflop < pixels.tflop
    assert latent.memory["step"] < pixels.memory["step"]
    assert latent.memory["losses"] > 0


# distillation

SMALL = dict(
    max_steps=3, batch_size=4, width=8, blocks=1, world_pictures=8, val_pictures=4, size=32
)


def settings(tmp_path, **given):
    places = dict(out=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    return make_settings(DistilSettings, {**SMALL, **places, **given})


def test_a_student_is_saved_with_what_it_needs_to_be_loaded(base, tmp_path):
    card = distil(settings(tmp_path))
    network = load_latent_features(tmp_path / "out", base.vae)
    assert network.config["teacher"] == "tiny" and network.config["vae"] == vae_sha256(base.vae)
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == card
    assert card["losses"]["step"] == 3
    heads = torch.cat(network.heads)
    assert heads.sum() > 0 and len(heads) == 64 + 96 + 128


def test_what_is_in_the_way_of_going_on(tmp_path):
    made = Distillation(settings(tmp_path))
    code = f"from masked_ldm.files import lock_folder; lock_folder({str(tmp_path / 'out')!r}, 'folder')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "in use by another process" in other.stderr
    made.loop()
    made.lock.release()
    with pytest.raises(
        ConfigError, match=r"belongs to other settings \(width\): name another folder"
    ):
        Distillation(settings(tmp_path, width=16))
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
        Distillation(settings(tmp_path))


def test_an_autoencoder_alone_will_do(base, tmp_path):
    base.vae.save_pretrained(tmp_path / "vae")
    world = write_world(tmp_path / "world", 8, 4, size=32)
    card = distil(settings(tmp_path, base=str(tmp_path / "vae"), data_root=str(world)))
    assert card["agreement"] == {}
    load_latent_features(tmp_path / "out", base.vae)
    with pytest.raises(ValueError, match="holds LatentFeatures; a base or an AutoencoderKL"):
        other = dict(base=str(tmp_path / "out"), out=str(tmp_path / "b"))
        Distillation(settings(tmp_path, **other, data_root=str(world)))


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    made = Distillation(settings(tmp_path))
    made.student.enter.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite at step 0") as e:
        made.loop()
    assert is_user_error(e.value)


def test_every_size_that_a_run_may_have():
    "Halves are rounded down by teacher and student alike."
    teacher = Teacher(MaskedLPIPS(random_tapnet(0)), 8, 88)
    student = LatentFeatures(4, 8, teacher.taps, width=8, blocks=1)
    sizes = [m.shape[-1] for m in student(torch.randn(1, 4, 11, 11))]
    assert [m.shape[-1] for m in teacher(torch.randn(1, 3, 88, 88))] == sizes


def test_it_begins_where_its_networks_are(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # meta is not known
    loss = MaskedLPIPS(random_tapnet(0)).to("meta")
    assert all(head.device.type == "meta" for head in Teacher(loss, 4, 64).to("meta").heads)


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(base="sd15"), "data_root is needed with base 'sd15'"),
        (dict(base="sd15", data_root="."), "teacher must be vgg, alex or squeeze with base sd15"),
    ],
)
def test_what_cannot_be_distilled(given, said):
    with pytest.raises(ConfigError, match=said):
        make_settings(DistilSettings, given)


def test_a_student_is_saved_before_it_is_judged(tmp_path, monkeypatch):
    made = Distillation(settings(tmp_path))
    made.loop()
    monkeypatch.setattr(made, "agreement", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.finish()
    load_latent_features(tmp_path / "out")


def test_another_student_under_the_same_name_is_noticed(base, tmp_path):
    from masked_ldm.train import train

    def write(seed):
        torch.manual_seed(seed)
        own = LatentFeatures(f=4, width=8, blocks=1, teacher="tiny", vae=vae_sha256(base.vae))
        own.save_pretrained(tmp_path / "own")

    write(0)
    given = dict(
        lpips_net="latent",
        latent_net=str(tmp_path / "own"),
        lambda2=0.0,
        val_pictures=0,
        world_pictures=8,
        batch_size=2,
        max_steps=1,
        sample_steps=1,
        sample_prompts=["A man."],
        report_to="none",
        cache_dir=str(tmp_path / "cache"),
        out_dir=str(tmp_path / "run"),
    )
    train(TrainConfig.make(**given))
    write(1)
    with pytest.raises(ConfigError, match="latent_net .* holds another network than"):
        train(TrainConfig.make(**{**given, "max_steps": 2}, resume="latest"))


def test_the_plan_of_a_published_network(tmp_path):
    from masked_ldm.training.memory_plan import plan

    torch.save(published(), tmp_path / "w.pth")
    given = dict(T=1000, lambda2=0.0, batch_size=1, val_pictures=0, lpips_net="latent")
    assert plan(TrainConfig.make(**given, latent_net=str(tmp_path / "w.pth"))).tflop > 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no network of latents"):
        plan(TrainConfig.make(**given, latent_net=str(tmp_path / "empty")))


def test_spoiling_is_a_function_of_its_generator():
    z = latents(7)
    a, b = (spoilt(z, torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.equal(b) and a.shape == z.shape and (a != z).flatten(1).any(1).all()


def test_agreement_of_a_loss_with_itself(base):
    "Its own pixel loss, said through the decoder, agrees with itself."
    from masked_ldm.training.networks import load_network

    pixel_loss = MaskedLPIPS(load_network("perceptual"))

    masks = torch.ones(5, 1, 32, 32)
    masks[0] = 0  # nobody, so it does not count
    pairs = latents(5), latents(6)[:5], masks
    loss = through_decoder(pixel_loss, base.decode)
    a, b = (distances_and_gradients(loss, *pairs, at_once=n) for n in (2, 5))
    assert a[0][0] == 0 and a[1][0].abs().max() == 0
    found = agreement(a, b)
    assert found["rank"] == pytest.approx(1) and found["cosine"] == pytest.approx(1, abs=1e-4)


def test_the_command_ends_in_a_sentence(tmp_path):
    command = [sys.executable, "-m", "masked_ldm.training.distillation"]
    done = subprocess.run([*command, "--width", "2"], capture_output=True, text=True)
    assert done.returncode == 1 and "width must be 8 to 4096, not 2" in done.stderr
    assert "Traceback" not in done.stderr
