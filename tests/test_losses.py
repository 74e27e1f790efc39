"The losses on real masks, and in the company of other code."
import os, warnings
import pytest, torch
from masked_ldm.critics import random_tapnet
from masked_ldm.masked_lpips import MaskedLPIPS

def both(net, mask, seed=0):
    "Values and gradients, on windows and on whole pictures."
    g = torch.Generator().manual_seed(seed); a, b = torch.rand(2, len(mask), 3, *mask.shape[-2:], generator=g, dtype=torch.float64)*2-1; out = []
    for crop in (True, False): p = a.clone().requires_grad_(); v = MaskedLPIPS(net, crop=crop)(p, b, mask); v.sum().backward(); out.append((v.detach(), p.grad))
    return out

@pytest.mark.skipif("MASKED_LDM_COCO" not in os.environ, reason="needs a COCO root")
def test_windows_are_exact_on_real_masks(tmp_path):
    from masked_ldm.data import PersonDataset, build_manifest
    ds = PersonDataset(build_manifest(os.environ["MASKED_LDM_COCO"], "train", tmp_path, faces="none"), 256); mask = torch.stack([ds[i]["mask"] for i in range(8)])
    (v, g), (w, h) = both(random_tapnet(0, widths=(8, 8, 8, 8)).double(), mask)
    assert (v-w).abs().max() < 1e-12 and (g-h).abs().max() < 1e-12 and h.abs().max() > 1e-8

def test_a_network_that_looks_everywhere_runs_whole():
    class Norm(torch.nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(0); self.c, self.n = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.InstanceNorm2d(4)
        def forward(self, x): return [self.n(self.c(x))]
    mask = torch.zeros(2, 1, 64, 64); mask[0, :, 5:20, 40:60] = 1; loss = MaskedLPIPS(Norm().double())
    assert loss.reach((64, 64))[0] is None
    (v, g), _ = both(Norm().double(), mask); assert v[1] == 0 and not g[1].any()
    torch.manual_seed(1); a, b = torch.rand(2, 2, 3, 64, 64, dtype=torch.float64)*2-1; unit = lambda f: f/f.norm(dim=1, keepdim=True); net = Norm().double()
    plain = ((unit(net(a)[0]) - unit(net(b)[0])).square().sum(1)[0]*mask[0, 0]).sum()/mask[0].sum(); assert abs(loss(a, b, mask.double())[0] - plain) < 1e-9   # the formula, on the whole picture

def test_value_does_not_depend_on_the_batch_and_bf16_is_finite():
    mask = torch.zeros(3, 1, 128, 128); mask[0, :, 5:20, 40:60] = 1; mask[1, :, 100:, 100:] = 1; net = random_tapnet(0); a, b = torch.rand(2, 3, 3, 128, 128)*2-1; loss = MaskedLPIPS(net); v = loss(a, b, mask)
    for i in range(3): assert abs(loss(a[i:i+1], b[i:i+1], mask[i:i+1])[0] - v[i]) < 1e-6
    with torch.autocast("cpu", torch.bfloat16): p = a.clone().requires_grad_(); u = loss(p, b, mask); u.sum().backward()
    assert u.dtype == torch.float32 and torch.isfinite(p.grad).all() and (u-v).abs().max() < .05*v.max() and not p.grad[2].any()

def test_fp16_keeps_its_gradient():
    "As a loss scaler multiplies it: the gradient made on the way must not have underflowed before."
    net, g = random_tapnet(0), torch.Generator().manual_seed(0); loss = MaskedLPIPS(net); a = torch.rand(1, 3, 512, 512, generator=g)*2-1; b = a + .1*torch.randn(a.shape, generator=g); mask = torch.ones(1, 1, 512, 512)
    def grad(half):
        p = a.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=half): v = loss(p, b, mask)
        (v.sum()*2**16).backward(); return p.grad
    want = grad(False); assert (grad(True) - want).norm() < .1*want.norm()

def test_masks_that_do_not_fit_are_named():
    loss, x = MaskedLPIPS(random_tapnet(0)), torch.zeros(3, 3, 64, 64)
    for mask, said in ((torch.ones(3, 3, 64, 64), "mask must be"), (torch.ones(1, 1, 64, 64), "1 masks do not fit 3"), (torch.ones(3, 64, 64), "mask must be")):
        with pytest.raises(ValueError, match=said): loss(x, x, mask)
