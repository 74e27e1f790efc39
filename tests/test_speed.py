"Switches of a run that need a compiler, an optional package, or a whole run to be seen."
import json, shutil
import pytest, torch
from test_train import weights

def trainer(path, **kw):
    from masked_ldm.train import TrainConfig, Trainer
    tr = Trainer(TrainConfig.make(**{"T": 1000, **kw}), path); g = torch.Generator().manual_seed(0)
    for m in (*tr.bare.controlnet_down_blocks, tr.bare.controlnet_mid_block): m.weight.data.normal_(0, .02, generator=g)
    return tr

def gradients(tr, n=4):
    "Gradient of the branch for the first n pictures, all below T."
    from masked_ldm.data import collate
    from masked_ldm.train import keyed_noise
    noise, post, _ = keyed_noise(0, 0, range(n), tr.latent); tr.opt.zero_grad()
    tr.acc.backward(tr.losses(collate([tr.train_set[i] for i in range(n)]), noise, post, torch.arange(n)*200 + 50).total)
    return torch.cat([p.grad.flatten() for p in tr.bare.parameters() if p.grad is not None])

def off(a, b): return ((a-b).norm()/b.norm()).item()

@pytest.mark.parametrize("switch", [dict(decode_batch=1), dict(decode_batch=3), dict(checkpoint_branch=True), dict(checkpoint_unet=True), dict(checkpoint_vae=True), dict(channels_last=True)], ids=str)
def test_switch_leaves_the_gradient(switch, tmp_path, quick):
    want = gradients(trainer(tmp_path/"a", **quick)); got = gradients(trainer(tmp_path/"b", **quick, **switch))
    assert off(got, want) < 2e-2, off(got, want)   # float32 through ReLU and max-pooling kinks of the loss networks

@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_is_the_same(tmp_path, quick):
    want = gradients(trainer(tmp_path/"a", **quick), 2); got = gradients(trainer(tmp_path/"b", **quick, torch_compile=True, decode_batch=1), 2)
    assert off(got, want) < 2e-2, off(got, want)

def test_cap_and_strata_reach_the_run(tmp_path, quick):
    from masked_ldm.train import TrainConfig, train
    r = train(TrainConfig.make(**{**quick, "T": 400, "batch_size": 8, "max_steps": 5, "stratified_t": True, "max_decoded": 2}))
    below = [sum(b["n"] for k, b in row["bands"].items() if int(k.split("-")[0]) < 400) for row in r.history]
    assert below == [3]*5 and all(row["loss"] > 0 for row in r.history)

def test_crop_decode_trains(tmp_path, quick):
    from masked_ldm.train import TrainConfig, train
    r = train(TrainConfig.make(**{**quick, "T": 1000, "max_steps": 2, "decode": "crop"})); assert all(v > 0 for v in r.norms.values()) and all(row["lpips"] for row in r.history)

def test_eight_bit_resumes(tmp_path, quick):
    pytest.importorskip("bitsandbytes")
    from masked_ldm.train import TrainConfig, train
    whole = train(TrainConfig.make(**quick, use_8bit_adam=True)); half = {**quick, "out_dir": str(tmp_path/"half"), "use_8bit_adam": True}
    train(TrainConfig.make(**{**half, "max_steps": 3})); rest = train(TrainConfig.make(**half, resume="latest"))
    a, b = weights(whole.path), weights(rest.path); assert all(torch.equal(a[k], b[k]) for k in a)

def test_a_run_on_a_gpu_announces_itself(monkeypatch):
    "No GPU is needed: what the card says is given."
    from masked_ldm import budget
    from masked_ldm.config import TrainConfig
    monkeypatch.setattr(budget.torch.cuda, "get_device_name", lambda device: "a card"); monkeypatch.setattr(budget, "throughput", lambda device, bf16: 1.)
    for gib, said in ((12, "on a card with 12.0 GiB free"), (.2, "that will not fit. These settings would: "), (.01, "No switch helps")):
        monkeypatch.setattr(budget.torch.cuda, "mem_get_info", lambda device: (int(gib*2**30), 0)); text = budget.announced(TrainConfig.make(T=1000), "cuda:0"); assert text.startswith("planned: ") and said in text, text
