"Switches of a run that need a whole step or run to be seen, or an optional package."

import pytest
import torch
from test_train import weights


def trainer(path, **kw):
    from masked_ldm.train import TrainConfig, Trainer

    tr = Trainer(TrainConfig.make(**{"T": 1000, **kw}), path)
    g = torch.Generator().manual_seed(0)
    branch = tr.trained.branch
    for m in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
        m.weight.data.normal_(0, 0.02, generator=g)
    return tr


def gradients(tr, n=4):
    "Gradient of the branch for the first n pictures, all below T."
    from masked_ldm.data.dataset import collate
    from masked_ldm.training.step import StepDraw
    from masked_ldm.training.timesteps import sample_noise

    noise, posterior_noise, _ = sample_noise(0, 0, range(n), tr.latent_shape)
    draw = StepDraw(noise, posterior_noise, torch.arange(n) * 200 + 50)
    tr.trained.optimizer.zero_grad()
    batch = collate([tr.data.train[i] for i in range(n)])
    tr.accelerator.backward(tr.losses(batch, draw).total)
    return torch.cat([p.grad.flatten() for p in tr.trained.weights])


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def stepped(path, **kw):
    "Gradient of a whole step of a run in float64, for the same four pictures, all below T."
    from in_float64 import collate_doubled, float64

    from masked_ldm.data.dataset import batch_keys

    with float64():
        tr = trainer(path, **kw)
        pictures = tr.data.train
        (keys,) = batch_keys(len(pictures), 4, 0, 0, 1)
        n = 4 // tr.config.gradient_accumulation_steps
        tr.step(
            [
                (range(k, k + n), collate_doubled([pictures[i] for _, i in keys[k : k + n]]))
                for k in range(0, 4, n)
            ]
        )
    return {name: p.grad for name, p in tr.trained.branch.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def plain_step(tmp_path_factory, cache):
    tmp = tmp_path_factory.mktemp("plain")
    small = dict(cache_dir=cache, world_pictures=48, val_pictures=0, batch_size=4, report_to="none")
    return small, stepped(tmp / "run", **small)


@pytest.mark.parametrize(
    "switch",
    [
        dict(gradient_accumulation_steps=4),
        dict(decode_batch=3, channels_last=True),
        dict(decode_batch=1, gradient_checkpointing=True, gradient_accumulation_steps=2),
    ],
    ids=str,
)
def test_switch_leaves_the_gradient(switch, tmp_path, plain_step):
    "A13, each weight's gradient by itself. In float64: in float32 it holds to 5e-5 for the diffusion loss, and only to some 1e-3 through the kinks of the loss networks."
    small, want = plain_step
    got = stepped(tmp_path / "run", **small, **switch)
    assert all(g.abs().sum() > 0 for n, g in want.items() if n.startswith("down_blocks"))
    worst = max(want, key=lambda n: (got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-9))
    assert off(got[worst], want[worst]) < 1e-10, (worst, off(got[worst], want[worst]))


def test_compiled_is_the_same(tmp_path, quick, monkeypatch):
    "Captured forward and backward as for a compiler; the kernels are torch's business, and building them takes minutes."
    from functools import partial

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    quick = {**quick, "val_pictures": 0}
    want = gradients(trainer(tmp_path / "a", **quick), 2)
    got = gradients(trainer(tmp_path / "b", **quick, torch_compile=True, decode_batch=1), 2)
    assert off(got, want) < 2e-2, off(
        got, want
    )  # float32, other kernels: to 1e-3 through the kinks of the loss networks


def test_a_compiled_decoder_takes_any_number_of_samples(monkeypatch):
    "PyTorch gives up on a function, silently, when it has been built eight times; nothing is generated here, so no compiler is needed."
    from functools import partial

    from torch._dynamo.utils import counters

    from masked_ldm.models import load_base
    from masked_ldm.training.config import TrainConfig
    from masked_ldm.training.optimizer import compiled

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    vae = load_base().vae

    def decode(z):
        return vae.decode(z).sample

    built = compiled(TrainConfig.make(torch_compile=True), decode, varying=True)
    for n in (2, 1, 5, 3, 4, 7, 6, 9, 8, 10, 1):
        z = torch.randn(n, 4, 8, 8, requires_grad=True)
        torch.testing.assert_close(built(z), decode(z))
        assert built(z).requires_grad
    assert counters["stats"]["unique_graphs"] <= 3, counters[
        "stats"
    ]  # the first number, any number, one


def test_cap_and_strata_reach_the_run(tmp_path, quick):
    from masked_ldm.train import TrainConfig, train

    r = train(
        TrainConfig.make(
            **{
                **quick,
                "T": 400,
                "batch_size": 8,
                "max_steps": 2,
                "val_pictures": 0,
                "stratified_t": True,
                "max_decoded": 2,
            }
        )
    )
    below = [
        sum(b["n"] for k, b in row["bands"].items() if int(k.split("-")[0]) < 400)
        for row in r.history
    ]
    assert below == [3] * 2 and all(row["loss"] > 0 for row in r.history)


def test_eight_bit_resumes(tmp_path, quick):
    pytest.importorskip("bitsandbytes")
    from masked_ldm.train import TrainConfig, train

    whole = train(TrainConfig.make(**quick, use_8bit_adam=True))
    half = {**quick, "out_dir": str(tmp_path / "half"), "use_8bit_adam": True}
    train(TrainConfig.make(**{**half, "max_steps": 3}))
    rest = train(TrainConfig.make(**half, resume="latest"))
    a, b = weights(whole.path), weights(rest.path)
    assert all(torch.equal(a[k], b[k]) for k in a)
