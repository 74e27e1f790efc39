"The decoder as a perceptual network: what it refuses, and that the autoencoder stays its owner's."

import copy

import pytest
import torch
from torch import nn

from masked_ldm.decoder_features import DecoderLPIPS, decoder_features, usual_values
from masked_ldm.models import load_base


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def latents(n=2, side=8, channels=4):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(n))


ONES = torch.ones(2, 1, 32, 32)


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
        (latents(), latents(side=4), ONES, r"and \(2, 4, 4, 4\)"),
        (latents(), None, ONES, "not None: pass `latents` to the objective"),
        (
            latents(),
            latents(),
            ONES[..., :8, :8],
            r"mask is \(8, 8\) but the pictures are \(32, 32\)",
        ),
        (latents(), latents(), ONES[:1], "1 masks do not fit 2 image numbers"),
        (latents(), latents(), ONES[:, 0], r"mask must be \(B,1,H,W\)"),
        (latents(), latents(), 255 * ONES, r"mask must be in \[0,1\], not 255"),
    ],
)
def test_what_does_not_fit_is_refused(base, pred, target, mask, said):
    with pytest.raises(ValueError, match=said):
        DecoderLPIPS(base.vae)(pred, target, mask)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(depths=(0, 4)), r"some of \[0, 1, 2, 3\], 0 being .* not \[0, 4\]"),
        (dict(depths=()), r"not \[\]"),
        (dict(depths=(-1,)), r"not \[-1\]"),
        (dict(outliers=0.5), "share from 0 to below 0.5, not 0.5"),
    ],
)
def test_settings_that_cannot_be(base, settings, said):
    with pytest.raises(ValueError, match=said):
        DecoderLPIPS(base.vae, **settings)


def test_another_network_is_no_autoencoder():
    with pytest.raises(ValueError, match="vae must be an AutoencoderKL of diffusers, not Linear"):
        DecoderLPIPS(nn.Linear(1, 1))


def test_index_and_per_person_go_together(base):
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="needed with per_person=True"):
        DecoderLPIPS(base.vae, per_person=True)(latents(), latents(), ONES)
    with pytest.raises(ValueError, match="and only then"):
        DecoderLPIPS(base.vae)(latents(), latents(), ONES, index)


def test_the_autoencoder_stays_its_owners(base):
    "No copy, no part of the module; its mode and what is trained are as before a call, also a failed one."
    vae = copy.deepcopy(base.vae).train().requires_grad_(True)
    vae.decoder.conv_in.eval()
    vae.decoder.conv_in.bias.requires_grad_(False)
    before = [(id(p), p.dtype, p.requires_grad) for p in vae.parameters()]
    loss = DecoderLPIPS(vae)
    assert not list(loss.parameters()) and not loss.state_dict() and not list(loss.children())
    loss.to(torch.float64).eval()
    z = latents().requires_grad_()
    loss(z, latents(3)[:2], ONES).sum().backward()
    assert z.grad.abs().sum() > 0
    vae.decoder.up_blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(z, z, ONES)
    assert [(id(p), p.dtype, p.requires_grad) for p in vae.parameters()] == before
    assert all(p.grad is None for p in vae.parameters())
    assert vae.decoder.up_blocks[0].training and not vae.decoder.conv_in.training


def test_the_latents_are_unscaled_as_for_a_decode(base):
    "Also where an autoencoder shifts, as that of SD3 does."
    vae = copy.deepcopy(base.vae)
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    seen = []
    hook = vae.decoder.conv_in.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    decoder_features(vae, latents(), (0,))
    vae.decode(latents() / 1.5305 + 0.0609)
    hook.remove()
    assert torch.allclose(*seen, atol=1e-6)


def test_an_autoencoder_without_post_quant_conv(base):
    vae = copy.deepcopy(base.vae)
    vae.post_quant_conv = None
    assert DecoderLPIPS(vae)(latents(), latents(3)[:2], ONES).min() > 0


def test_it_runs_in_bf16_and_counts_in_float32(base):
    args = (latents(), latents(3)[:2], ONES)
    exact = DecoderLPIPS(base.vae)(*args)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = DecoderLPIPS(base.vae)(*args)
    half = DecoderLPIPS(copy.deepcopy(base.vae).bfloat16())(*args)
    for found in (mixed, half):
        assert found.dtype == torch.float32
        assert torch.allclose(found, exact, rtol=0.05)


def test_the_target_gets_no_gradient_and_the_mask_neither(base):
    pred, target, mask = latents(), latents(3)[:2], 0.5 * ONES
    given = [x.clone().requires_grad_() for x in (pred, target, mask)]
    DecoderLPIPS(base.vae)(*given).sum().backward()
    assert given[0].grad is not None and given[1].grad is None and given[2].grad is None


def test_a_nan_is_not_left_out(base):
    "A run skips such a step and counts it; a loss that hid it would train on it."
    for place in (0, 1):
        pair = [latents(), latents(3)[:2]]
        pair[place][0, 0, 0, 0] = float("nan")
        found = DecoderLPIPS(base.vae)(*pair, ONES)
        assert found[0].isnan() and found[1].isfinite()


def test_outliers_of_one_picture_are_not_those_of_another():
    values = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    values[0, 0, 0, 0] = 1e3
    kept = usual_values(values)
    assert kept.sum() == kept.numel() - 1 and not kept[0, 0, 0, 0]
    assert usual_values(100 * values).equal(kept)
    assert usual_values(torch.ones(1, 2, 3, 3)).all()  # all alike: none stands out


def test_an_outlier_of_the_estimate_alone_counts(base):
    "What is left out is decided by the target."
    loss, target = DecoderLPIPS(base.vae, depths=(0,)), latents()
    pred = target.clone()
    pred[0, :, 2, 2] += 50
    assert loss(pred, target, ONES)[0] > 0.1


def test_the_objective_takes_it_person_by_person(base):
    from masked_ldm.objective import MaskAwareObjective

    loss = DecoderLPIPS(base.vae, per_person=True)

    def decode(z):
        raise AssertionError("nothing is to be decoded")

    objective = MaskAwareObjective(100, 0.5, 0.0, loss, None, decode)
    people = torch.zeros(3, 1, 32, 32)
    people[0, ..., :16], people[1, ..., 20:28], people[2, ..., 4:9] = 1, 1, 1
    image_of, x0 = torch.tensor([0, 0, 1]), latents(3)[:2].requires_grad_()
    terms = objective(
        torch.ones(2),
        x0,
        torch.tensor([50, 500]),
        torch.zeros(2, 3, 32, 32),
        ONES,
        torch.zeros(0, 5),
        (people, image_of),
        latents=latents(),
    )
    alone = loss(x0[:1], latents()[:1], people[:2], image_of[:2])
    assert torch.allclose(
        terms.values["lpips"], torch.stack([alone[0], torch.zeros(())]), atol=1e-5
    )
    terms.total.backward()
    assert x0.grad[0].abs().sum() > 0 and x0.grad[1].abs().sum() == 0


def test_a_loss_of_latents_that_detaches_is_named_itself(base):
    "Nothing is decoded, so the decode cannot be to blame."
    from masked_ldm.gradient_check import DeadTerm, check_gradients
    from masked_ldm.objective import MaskAwareObjective

    class Blind(DecoderLPIPS):
        def forward(self, pred, *rest):
            return super().forward(pred.detach(), *rest)

    weight = torch.nn.Parameter(torch.ones(()))
    estimate = weight * latents()
    objective = MaskAwareObjective(1000, 0.5, 0.0, Blind(base.vae), None, base.decode)
    pictures, boxes = torch.zeros(2, 3, 32, 32), torch.zeros(0, 5)
    plain = estimate.square().mean((1, 2, 3))
    terms = objective(plain, estimate, 5, pictures, ONES, boxes, latents=latents(3)[:2])
    with pytest.raises(DeadTerm, match="the loss runs under torch.no_grad.. or detaches"):
        check_gradients(terms, [weight], ("lpips",))


def test_a_quantile_of_some_values_finds_what_that_of_all_finds():
    "Rows, columns and channels are powers of two: an even stride would see few of them."
    gen = torch.Generator().manual_seed(0)
    features = torch.randn(1, 128, 64, 64, generator=gen)
    features *= torch.linspace(0.5, 1, 64)  # columns that differ
    features[:, 3] += 100
    kept = usual_values(features)
    assert not kept[:, 3].any() and kept[:, 4:].all()
