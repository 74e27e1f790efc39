"The losses on real masks, and in the company of other code."

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from masked_ldm.masked_lpips import MaskedLPIPS
from masked_ldm.toy.networks import random_tapnet


@pytest.mark.parametrize(
    "name",
    [
        *("masked_lpips", "decoder_features", "latent_features", "face_loss", "pose_loss"),
        *("objective", "one_step"),
    ],
)
def test_a_loss_loads_no_detector_no_plotting_and_no_data_code(name):
    code = (
        f"import sys; import masked_ldm.{name}; "
        "print(*(m for m in sys.modules if m.startswith(("
        "'facenet_pytorch', 'pycocotools', 'matplotlib', "
        "'masked_ldm.data', 'masked_ldm.training', 'masked_ldm.toy'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.skipif("MASKED_LDM_COCO" not in os.environ, reason="needs a COCO root")
def test_it_is_the_papers_procedure_on_real_masks(tmp_path):
    "Maps enlarged to the picture and averaged over the mask: the same values and gradients."
    from masked_ldm.data.dataset import PersonDataset
    from masked_ldm.data.manifest import build_manifest

    manifest = build_manifest(os.environ["MASKED_LDM_COCO"], "train", tmp_path, faces="none")
    dataset = PersonDataset(manifest, 256)
    mask = torch.stack([dataset[i]["mask"] for i in range(4)]).double()
    gen = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 4, 3, 256, 256, generator=gen, dtype=torch.float64) * 2 - 1
    loss = MaskedLPIPS(random_tapnet(0, widths=(8, 8, 8, 8)).double())

    def papers(pred):
        total = 0
        for difference in loss.maps(pred, target):
            enlarged = F.interpolate(difference, size=256, mode="bilinear")
            total = total + (enlarged * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
        return total

    found = []
    for f in (lambda p: loss(p, target, mask), papers):
        p = pred.clone().requires_grad_()
        values = f(p)
        found.append((values.detach(), torch.autograd.grad(values.sum(), p)[0]))
    (value, gradient), (value_there, gradient_there) = found
    assert (value - value_there).abs().max() < 1e-12
    assert (gradient - gradient_there).abs().max() < 1e-12 and gradient.abs().max() > 1e-8


def test_a_network_that_looks_everywhere():
    "An empty mask stays without a gradient, though every feature depends on every pixel."

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.c, self.n = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.InstanceNorm2d(4)

        def forward(self, x):
            return [self.n(self.c(x))]

    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 5:20, 40:60] = 1
    net = Norm().double()
    torch.manual_seed(1)
    a, b = torch.rand(2, 2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    p = a.clone().requires_grad_()
    value = MaskedLPIPS(net)(p, b, mask)
    value.sum().backward()
    assert value[1] == 0 and not p.grad[1].any()

    def unit(f):
        return f / f.norm(dim=1, keepdim=True)

    apart = (unit(net(a)[0]) - unit(net(b)[0])).square().sum(1)[0]
    assert abs(value[0] - (apart * mask[0, 0]).sum() / mask[0].sum()) < 1e-9  # the formula


def test_value_does_not_depend_on_the_batch_and_bf16_is_finite():
    mask = torch.zeros(3, 1, 128, 128)
    mask[0, :, 5:20, 40:60] = 1
    mask[1, :, 100:, 100:] = 1
    net = random_tapnet(0)
    a, b = torch.rand(2, 3, 3, 128, 128) * 2 - 1
    loss = MaskedLPIPS(net)
    v = loss(a, b, mask)
    for i in range(3):
        assert abs(loss(a[i : i + 1], b[i : i + 1], mask[i : i + 1])[0] - v[i]) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        p = a.clone().requires_grad_()
        u = loss(p, b, mask)
        u.sum().backward()
    assert (
        u.dtype == torch.float32
        and torch.isfinite(p.grad).all()
        and (u - v).abs().max() < 0.05 * v.max()
        and not p.grad[2].any()
    )


def test_fp16_keeps_its_gradient():
    "As a loss scaler multiplies it."
    net, g = random_tapnet(0), torch.Generator().manual_seed(0)
    loss = MaskedLPIPS(net)
    a = torch.rand(1, 3, 512, 512, generator=g) * 2 - 1
    b = a + 0.1 * torch.randn(a.shape, generator=g)
    mask = torch.ones(1, 1, 512, 512)

    def grad(half):
        p = a.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=half):
            v = loss(p, b, mask)
        (v.sum() * 2**16).backward()
        return p.grad

    want = grad(False)
    assert (grad(True) - want).norm() < 0.1 * want.norm()


def test_masks_that_do_not_fit_are_named():
    loss, x = MaskedLPIPS(random_tapnet(0)), torch.zeros(3, 3, 64, 64)
    for mask, said in (
        (torch.ones(3, 3, 64, 64), "mask must be"),
        (torch.ones(1, 1, 64, 64), "1 masks do not fit 3"),
        (torch.ones(3, 64, 64), "mask must be"),
    ):
        with pytest.raises(ValueError, match=said):
            loss(x, x, mask)


@pytest.fixture
def step():
    "A small model, decoder and batch: (losses(**settings) -> Terms, trained weights)."
    from masked_ldm.face_loss import FaceLoss
    from masked_ldm.objective import MaskAwareObjective

    torch.manual_seed(0)
    net, decoder = (
        torch.nn.Conv2d(4, 4, 3, padding=1),
        torch.nn.Sequential(
            torch.nn.Upsample(scale_factor=8), torch.nn.Conv2d(4, 3, 3, padding=1)
        ).requires_grad_(False),
    )
    z, x = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 32, 32) * 2 - 1
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 4:28, 8:24] = 1
    boxes = torch.tensor([[0.0, 8, 4, 24, 20], [1, 9, 5, 25, 21]])

    def losses(decode=decoder, m=mask, b=boxes, edit=lambda x: x, plain=lambda x: x, **kw):
        out = edit(net(z))
        objective = MaskAwareObjective(
            **{
                **dict(
                    T=100,
                    lambda1=0.2,
                    lambda2=0.5,
                    lpips=MaskedLPIPS(random_tapnet(0, widths=(4, 8))),
                    face=FaceLoss(random_tapnet(1, widths=(4, 8)), size=16),
                    decode=decode,
                ),
                **kw,
            }
        )
        l_ldm = plain(out.square().mean((1, 2, 3)))
        return objective(l_ldm, out, torch.tensor([5, 50]), x, m, b)

    return losses, list(net.parameters()), decoder, mask


DEATHS = {
    "decode under no_grad": "decode runs under torch.no_grad",
    "uint8 round trip": "uint8 round trip",
    "detach": r"\.detach\(\)",
    "mask of zeros": "the mask is empty",
    "frozen branch": "no weight is trained",
    "as published": "decoded picture has none",
    "half of the batch": r"sample\(s\) 1 of",
    "half of the output": r"sample\(s\) 1 of",
    "half of the plain loss": r"diffusion loss has weight but .* sample\(s\) 1 of",
    "nothing finite in a sample": "gradient that is not finite in sample",
    "saturated clamp": "carries zeros",
    "no faces": "no boxes",
}


@pytest.mark.parametrize("way", DEATHS)
def test_a_dead_term_is_refused_and_named(step, way):
    from masked_ldm.gradient_check import DeadTerm
    from masked_ldm.objective import check_gradients  # the path that README showed first

    losses, params, decoder, mask = step

    def half(x):
        return torch.cat([x[:1], x[1:].detach()])

    assert all(v > 0 for v in check_gradients(losses(), params).values())
    kw = {
        "decode under no_grad": dict(decode=torch.no_grad()(lambda z: decoder(z))),
        "uint8 round trip": dict(
            decode=lambda z: ((decoder(z).clamp(-1, 1) + 1) * 127.5).byte() / 127.5 - 1
        ),
        "detach": dict(decode=lambda z: decoder(z.detach())),
        "mask of zeros": dict(m=mask * 0),
        "as published": dict(variant="as_published"),
        "half of the batch": dict(
            decode=lambda z: torch.cat([decoder(z[:1]), decoder(z[1:]).detach()])
        ),
        "half of the output": dict(edit=half),
        "half of the plain loss": dict(plain=half),
        "nothing finite in a sample": dict(plain=lambda x: x / torch.tensor([1.0, 0.0])),
        "saturated clamp": dict(decode=lambda z: (decoder(z) * 1e6).clamp(-1, 1)),
        "no faces": dict(b=torch.zeros(0, 5)),
    }.get(way, {})
    if way == "frozen branch":
        for p in params:
            p.requires_grad_(False)
    with pytest.raises(DeadTerm, match=DEATHS[way]):
        check_gradients(losses(**kw), params)


def test_two_face_losses_share_a_network_and_survive_copying():
    import copy

    from masked_ldm.face_loss import FaceLoss

    net = random_tapnet(1, widths=(4, 8))
    a, b = FaceLoss(net, size=16), FaceLoss(net, size=16)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    boxes = torch.tensor([[0.0, 4, 4, 20, 24], [1, 6, 2, 28, 30]])
    v = a(x, y, boxes)
    assert (
        torch.equal(copy.deepcopy(a)(x, y, boxes), v)
        and torch.equal(b(x, y, boxes), v)
        and v.min() > 0
    )


def test_a_backbone_may_return_one_tap_or_a_dict():
    class Net(torch.nn.Module):
        def __init__(self, form):
            super().__init__()
            torch.manual_seed(0)
            self.c, self.form = torch.nn.Conv2d(3, 4, 3, padding=1), form

        def forward(self, x):
            f = self.c(x)
            return dict(
                one=f,
                list=[f],
                dict={"f": f},
                mean=f - f.mean((2, 3), keepdim=True),
                tokens=f.flatten(2),
            )[self.form]

    x, y = torch.rand(2, 1, 3, 48, 48) * 2 - 1
    mask = torch.zeros(1, 1, 48, 48)
    mask[..., 4:14, 6:20] = 1
    v = {f: MaskedLPIPS(Net(f))(x, y, mask) for f in ("one", "list", "dict", "mean")}
    assert torch.equal(v["one"], v["list"]) and torch.equal(v["dict"], v["list"]) and v["mean"] > 0
    with pytest.raises(TypeError, match="must return its taps"):
        MaskedLPIPS(Net("tokens"))(x, y, mask)


def test_fp16_keeps_its_gradient_in_parts(step):
    "The decoder's own gradient must not underflow either, a few samples at a time."
    losses, params, decoder, _ = step
    small = torch.nn.Sequential(decoder[0], decoder[1])
    small[1].weight.data *= 1 / 64

    def grad(half, size):
        with torch.autocast("cpu", torch.float16, enabled=half):
            total = losses(decode=lambda z: small(z), decode_batch=size, lambda1=0.5).total
        return (
            torch.cat([g.flatten().float() for g in torch.autograd.grad(total * 2**12, params)])
            / 2**12
        )

    want, got = grad(False, 0), grad(True, 1)
    assert (got - want).norm() < 0.1 * want.norm(), (got - want).norm() / want.norm()


def test_parts_are_the_whole(step):
    losses, params, _, _ = step
    whole = torch.autograd.grad(losses().total, params)
    terms = losses(decode_batch=1)
    parts = torch.autograd.grad(terms.total, params)
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() < 1e-3 * a.abs().max()  # float32; the page does it in float64
    assert len(terms.images) == 2


def test_masked_lpips_is_differentiable_twice():
    "Plain autograd inside: a gradient has a gradient."
    loss = MaskedLPIPS(random_tapnet(0, widths=(4, 8)))
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    a.requires_grad_()
    (g,) = torch.autograd.grad(loss(a, b, torch.ones(1, 1, 32, 32)).sum(), a, create_graph=True)
    g.square().sum().backward()
    assert a.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["lpips", "face"])
def test_a_network_that_is_handed_in_stays_its_owners(kind):
    "Its mode, its gradients and its memory layout; and no copy is made."
    from masked_ldm.face_loss import FaceLoss

    class Net(torch.nn.Module):
        face_layers = ("drop",)

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.norm(self.conv(x)))

    net = Net().train()
    net.norm.eval()  # its owner's choice
    net.conv.bias.requires_grad_(False)
    before = [(id(p), p.data_ptr(), p.stride(), p.requires_grad) for p in net.parameters()]
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    x.requires_grad_()
    if kind == "lpips":
        loss, where = MaskedLPIPS(net), torch.ones(1, 1, 32, 32)
    else:
        loss, where = FaceLoss(net, size=16), torch.tensor([[0.0, 2, 2, 30, 30]])
    loss.train().eval().train()
    first, second = loss(x, y, where), loss(x, y, where)
    assert torch.equal(first, second)  # no dropout, no batch statistics
    first.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())
    assert before == [(id(p), p.data_ptr(), p.stride(), p.requires_grad) for p in net.parameters()]
    assert [net.training, net.norm.training, net.drop.training] == [True, False, True]


@pytest.mark.parametrize("factor", [127.5, float("inf")])
def test_a_target_in_another_range_is_refused(step, factor):
    from masked_ldm.objective import MaskAwareObjective

    losses, _, decoder, mask = step
    objective = MaskAwareObjective(100, 0.0, 0.0, None, None, decoder)
    z, target = torch.randn(2, 4, 4, 4), (torch.rand(2, 3, 32, 32) * 2) * factor
    with pytest.raises(ValueError, match=r"target must be RGB in \[-1,1\]"):
        objective(torch.ones(2), z, 5, target, mask, torch.zeros(0, 5))


@pytest.mark.parametrize(
    "load, file",
    [
        (lambda: MaskedLPIPS("alex"), "alexnet-owt-7be5be79.pth"),
        (lambda: _face_loss("vggface2"), "20180402-114759-vggface2.pt"),
    ],
    ids=["lpips", "face"],
)
def test_downloaded_weights_that_are_damaged_are_named(load, file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = {True: tmp_path / "hub" / "checkpoints", False: tmp_path / "checkpoints"}
    path = place[file.endswith(".pth")] / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\3\4 a download that broke off")
    with pytest.raises(ValueError, match=f"{file}, the weights of .* is damaged: delete it"):
        load()


def _face_loss(name):
    from masked_ldm.face_loss import FaceLoss

    return FaceLoss(name)
