"The run as users start it: papermill, the command line, Python."
import json, sys
import pytest, torch
from safetensors.torch import load_file
from conftest import ROOT, papermill, run

WRONG = dict(T=([("T", 1200)], "T must be between 0 and 1000 (timesteps), not 1200"), misspelt=([("lamda1", .2)], "unknown parameter 'lamda1'; did you mean 'lambda1'?"),
             weights=([("lambda1", .8), ("lambda2", .5)], "lambda1 + lambda2 must be between 0 and 1"), root=([("data_root", "tests")], "data_root tests is no COCO 2017 data set: it lacks annotations/instances_train2017.json"),
             size=([("size", 100)], "size must be a multiple of 8 pixels"))

@pytest.mark.parametrize("name", WRONG)
def test_wrong_setting_is_one_sentence(name, tmp_path):
    given, said = WRONG[name]; code, text = papermill(tmp_path/"o.ipynb", *given); end = text[text.index("Exception encountered"):].strip().splitlines()
    assert code and len(end) == 2 and end[1].startswith(f"ConfigError: {said}"), text
    assert not (ROOT/"tests"/"runs").exists()

def test_papermill_run(tmp_path, quick):
    code, text = papermill(tmp_path/"o.ipynb", *quick.items(), ("T", 400)); assert code == 0, text
    out = tmp_path/"run"; rows = [json.loads(l) for l in (out/"metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and json.loads((out/"config.json").read_text())["T"] == 400
    assert any(r["lpips"] and r["face"] and r["ldm"] for r in rows) and {"README.md", "controlnet", "samples", "metrics.json"} <= {p.name for p in out.iterdir()}
    norms = json.loads((out/"metrics.json").read_text())["gradient_norms"]; assert all(v > 0 for v in norms.values())

def weights(path): return load_file(path/"controlnet"/"diffusion_pytorch_model.safetensors")

def test_resumed_is_never_stopped(tmp_path, quick):
    from masked_ldm.train import ConfigError, TrainConfig, train
    whole = train(TrainConfig.make(**quick))
    half = {**quick, "out_dir": str(tmp_path/"half")}; train(TrainConfig.make(**{**half, "max_steps": 3}))
    with pytest.raises(ConfigError, match="already holds a run"): train(TrainConfig.make(**half))
    with pytest.raises(ConfigError, match="lambda1 was 0.2, is 0.3"): train(TrainConfig.make(**half, resume="latest", lambda1=.3))
    rest = train(TrainConfig.make(**half, resume="latest"))
    a, b = weights(whole.path), weights(rest.path); assert all(torch.equal(a[k], b[k]) for k in a)
    fresh = train(TrainConfig.make(**{**quick, "seed": 1, "max_steps": 1, "out_dir": str(tmp_path/"other")})); c = weights(fresh.path); assert any(not torch.equal(a[k], c[k]) for k in a)

def test_accumulation_is_the_same_step(tmp_path, quick):
    from masked_ldm.train import TrainConfig, Trainer, run_folder
    from masked_ldm.data import batch_keys, collate
    got = []
    for parts in (1, 4):
        tr = Trainer(TrainConfig.make(**{**quick, "T": 1000, "gradient_accumulation_steps": parts, "out_dir": str(tmp_path/f"p{parts}")}), tmp_path/f"p{parts}"); keys, = batch_keys(len(tr.train_set), 4, 0, 0, 1)
        for _ in range(2): done = tr.step([(range(k, k+4//parts), collate([tr.train_set[i] for i in keys[k:k+4//parts]])) for k in range(0, 4, 4//parts)])
        got.append([p.grad.clone() for p in tr.bare.parameters() if p.requires_grad])
    for a, b in zip(*got): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_checkpointing_is_the_same_gradient(tmp_path, quick):
    from masked_ldm.train import TrainConfig, Trainer
    from masked_ldm.data import collate
    got = []
    for on in (False, True):
        tr = Trainer(TrainConfig.make(**{**quick, "T": 1000, "gradient_checkpointing": on}), tmp_path/str(on))
        tr.step([(range(2), collate([tr.train_set[i] for i in range(2)]))]); got.append([p.grad.clone() for p in tr.bare.parameters() if p.requires_grad])
    for a, b in zip(*got): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

def test_as_published_runs_and_is_dead(tmp_path, quick):
    from masked_ldm.train import TrainConfig, train
    norms = train(TrainConfig.make(**{**quick, "max_steps": 1, "variant": "as_published"})).norms
    assert norms["lpips"] == norms["face"] == 0 and norms["ldm"] > 0

def test_each_person_once(tmp_path, quick):
    from masked_ldm.train import TrainConfig, train
    assert train(TrainConfig.make(**{**quick, "max_steps": 2, "per_person": True, "T": 1000})).history[-1]["lpips"] > 0

def test_missing_weights_are_listed_at_once(tmp_path, world):
    code, text = run(sys.executable, "-m", "masked_ldm.train", "--preset", "sd15", "--data_root", world, "--out_dir", tmp_path/"run", HF_HUB_OFFLINE="1", HF_HOME=tmp_path, TORCH_HOME=tmp_path,
                     https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    last = text.strip().splitlines()[-1]
    assert code and all(s in last for s in ("4 network(s) of this run cannot be loaded", "stable-diffusion-v1-5", "vgg16-397923af.pth", "vggface2", "alexnet")), text
