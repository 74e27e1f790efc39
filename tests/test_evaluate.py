"Judging: bad input gets one sentence, the command leaves what it promises, and settings of a run reach its pictures."
import json, sys
import numpy as np, pytest, torch
from conftest import run

def make_run(path, T=100, noise=.03):
    "A run folder whose branch says something."
    from masked_ldm.models import load_base, make_branch
    base = load_base("tiny"); branch = make_branch(base.unet, base.f).eval(); g = torch.Generator().manual_seed(T)
    for m in (*branch.controlnet_down_blocks, branch.controlnet_mid_block): m.weight.data.normal_(0, noise, generator=g)
    branch.save_pretrained(path/"controlnet"); (path/"config.json").write_text(json.dumps(dict(base="tiny", size=64, T=T, lambda1=.2, lambda2=.5, guidance_scale=3., lpips_net="tiny", face_net="tiny"))); return path

def test_one_command(tmp_path, monkeypatch):
    from masked_ldm import evaluate as e
    monkeypatch.setitem(e.PROTOCOLS, "quick", dict(n=8, scheduler="dpm", steps=3, guidance=None)); a, b = make_run(tmp_path/"plain", 0), make_run(tmp_path/"ours", 100); out = tmp_path/"out"
    r = e.evaluate([a, b], n_ref=24, out=out, device="cpu"); assert {"evaluation.json", "grid.png", "failures.png", "set.json", "pictures"} <= {p.name for p in out.iterdir()} and len(list((out/"pictures").iterdir())) == 24
    assert r["paper_rows"] == dict(base="Stable Diffusion", plain="baseline ControlNet", ours="Masked LDM, T=100") and not r["judge"].startswith("FID") and r["paired"]["ours minus plain"]["attributes"]["n"] == 8
    text = e.format_report(r) + e.table1(r); assert "ours minus plain, same prompts and noise" in text and "(floor)" in text and "reference of 24 pictures" in text
    again = e.evaluate([a, b], n_ref=24, out=out, device="cpu"); assert again["models"] == r["models"] and again["paired"] == r["paired"]

@pytest.mark.parametrize("x, said", [(torch.full((1, 3, 8, 8), float("nan")), "NaN"), (torch.zeros(3, 8, 8), "shape"), (torch.zeros(1, 3, 8, 8).long(), "uint8 or floats")])
def test_bad_pixels_are_refused(x, said):
    from masked_ldm.distances import as_uint8
    with pytest.raises(ValueError, match=said): as_uint8(x)

def test_too_few_and_other_weights():
    from masked_ldm.distances import Features, frechet, kid
    with pytest.raises(ValueError, match="at least 2 pictures"): frechet(np.zeros((1, 4)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="at least 4 pictures"): kid(np.zeros((3, 4)), np.zeros((9, 4)))
    assert Features("inception", None, 299, "0"*64).title != "FID" and Features("inception", None, 299, "6726825d").title == "FID"

def test_command_says_it_in_one_sentence(tmp_path):
    code, text = run(sys.executable, "-c", "from masked_ldm.evaluate import main; main()", tmp_path); last = text.strip().splitlines()[-1]
    assert code == 1 and last.startswith("masked-ldm-eval: ") and "config.json is missing" in last and "Traceback" not in text, text
