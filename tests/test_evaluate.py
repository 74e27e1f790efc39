"Judging: bad input gets one sentence, the command leaves what it promises, and settings of a run reach its pictures."

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run


def make_run(path, T=100, noise=0.03):
    "A run folder whose branch says something."
    from masked_ldm.models import load_base, make_branch

    base = load_base("tiny")
    branch = make_branch(base.unet, base.f).eval()
    g = torch.Generator().manual_seed(T)
    for m in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
        m.weight.data.normal_(0, noise, generator=g)
    branch.save_pretrained(path / "controlnet")
    config = dict(base="tiny", size=64, T=T, lambda1=0.2, lambda2=0.5, guidance_scale=3.0)
    config |= dict(lpips_net="tiny", face_net="tiny")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "Two runs, judged once by the command with eight prompts in two steps: (runs, folder, report, what was printed)."
    from masked_ldm import evaluate as e

    tmp = tmp_path_factory.mktemp("judged")
    runs = [make_run(tmp / "plain", 0), make_run(tmp / "ours", 100)]
    folder = tmp / "out"
    with pytest.MonkeyPatch.context() as m, redirect_stdout(io.StringIO()) as printed:
        m.setitem(e.PROTOCOLS, "quick", dict(n=8, sample_scheduler="dpm", sample_steps=2))
        e.main([*map(str, runs), "--reference", "8", "--out", str(folder)])
    return runs, folder, json.loads((folder / "evaluation.json").read_text()), printed.getvalue()


def test_one_command(judged):
    _, out, r, printed = judged
    promised = {"evaluation.json", "grid.png", "failures.png", "set.json", "pictures"}
    assert promised <= {p.name for p in out.iterdir()}
    assert len(list((out / "pictures").iterdir())) == 24
    assert r["paper_rows"] == dict(
        base="Stable Diffusion", plain="baseline ControlNet", ours="Masked LDM, T=100"
    )
    assert not r["judge"].startswith("FID")
    assert r["paired"]["ours minus plain"]["attributes"]["n"] == 8
    assert r["settings"]["guidance"] == 3 and r["settings"]["size"] == 64  # the run's
    assert "ours minus plain, same prompts and noise" in printed
    assert "(floor)" in printed and "reference of 8 pictures" in printed


def test_what_was_drawn_is_used_again(judged, monkeypatch):
    from masked_ldm import evaluate as e
    from masked_ldm import sample

    runs, out, r, _ = judged
    monkeypatch.setitem(e.PROTOCOLS, "quick", dict(n=8, sample_scheduler="dpm", sample_steps=2))
    monkeypatch.setattr(sample, "sample", lambda *a, **k: pytest.fail("drawn again"))
    monkeypatch.setattr(e, "compare_grid", lambda *a, **k: e.Image.new("RGB", (8, 8)))
    again = e.evaluate(runs, e.EvalSettings(reference=8, out=str(out)), "cpu")
    assert again["models"] == r["models"] and again["paired"] == r["paired"]
    with pytest.raises(ValueError, match="holds pictures drawn otherwise"):
        e.evaluate(runs, e.EvalSettings(reference=8, out=str(out), guidance_scale=4.0), "cpu")


@pytest.mark.parametrize(
    "x, said",
    [
        (torch.full((1, 3, 8, 8), float("nan")), "NaN"),
        (torch.zeros(3, 8, 8), "shape"),
        (torch.zeros(1, 3, 8, 8).long(), "uint8 or floats"),
    ],
)
def test_bad_pixels_are_refused(x, said):
    from masked_ldm.evaluation.fid import as_uint8

    with pytest.raises(ValueError, match=said):
        as_uint8(x)


def test_too_few_and_other_weights():
    from masked_ldm.evaluation.fid import FeatureExtractor, frechet_distance, kid_pseudo_values

    with pytest.raises(ValueError, match="at least 2 pictures"):
        frechet_distance(np.zeros((1, 4)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="at least 4 pictures"):
        kid_pseudo_values(np.zeros((3, 4)), np.zeros((9, 4)))
    assert FeatureExtractor("inception", None, 299, "0" * 64).title != "FID"
    assert FeatureExtractor("inception", None, 299, "6726825d").title == "FID"


def test_command_says_it_in_one_sentence(tmp_path):
    code, text = run(sys.executable, "-m", "masked_ldm.evaluate", tmp_path)
    last = text.strip().splitlines()[-1]
    assert code == 1 and last.startswith("masked-ldm-eval: "), text
    assert "config.json is missing" in last and "Traceback" not in text, text


def test_a_run_on_the_hub(tmp_path, monkeypatch):
    "A Hub id goes wherever a folder goes; only what a run consists of is fetched."
    import huggingface_hub

    from masked_ldm.sample import MaskedLDMPipeline, open_runs

    there, asked = make_run(tmp_path / "there"), []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(there),
    )
    pipe = MaskedLDMPipeline.from_run("somebody/ours", strength=0.5)
    assert pipe.strength == 0.5 and asked == [("somebody/ours", ["config.json", "controlnet/*"])]
    assert MaskedLDMPipeline.from_pretrained("somebody/ours").strength == 1
    assert list(open_runs(["somebody/ours"])) == ["ours"]


def test_the_report_says_how_it_was_made(judged):
    "Command, settings of the runs, commit, judges and the origin of the reference are written by the program."
    from masked_ldm import evaluate as e

    (a, b), _, r, _ = judged
    assert r["command"] == f"masked-ldm-eval {a} {b} --protocol quick --reference 8 --seed 0"
    assert r["runs"]["ours"]["T"] == 100 and r["runs"]["plain"]["T"] == 0
    assert list(r["paired"]) == ["plain minus base", "ours minus base", "ours minus plain"]
    row = {"difference", "difference_low", "difference_high", "p", "p_holm"}
    assert row <= set(r["paired"]["ours minus plain"]["joints"])
    distance = {"difference", "low", "high", "kid"}
    assert set(r["distance_pairs"]["whole"]["ours minus plain"]) == distance
    assert "people 2200 to 3199" in r["reference_is"] and "judge" in r["judges"]["joints"]
    assert r["provenance"]["versions"]["torch"]
    assert r["provenance"]["commit"] or not (Path(e.__file__).parent.parent / ".git").exists()


def test_what_cannot_be_loaded_is_left_out_and_said(monkeypatch):
    "Photographs on a machine without ViTPose and Inception."
    from masked_ldm import evaluate as e

    def missing(what):
        def make(*args, **kwargs):
            raise FileNotFoundError(f"{what} is not there")

        return make

    monkeypatch.setattr(e, "ViTPose", missing("ViTPose"))
    monkeypatch.setattr(e, "inception_extractor", missing("Inception"))
    monkeypatch.setattr(e, "clip_score", missing("CLIP"))
    judges = e.Judges(toy=False)
    faces = judges.names.pop("faces")
    assert set(judges.names.values()) == {"nobody"} and faces.startswith("MTCNN")
    picture = e.Image.new("RGB", (64, 64))
    judged = judges([picture], e.HeldOut([""], np.array([1]), None, [], [], ""))
    assert set(judged.values) == {"faces", "face_confidence", "sharpness"} and not judged.crops
    assert judges.notes == [f"{what} is not there" for what in ("ViTPose", "Inception", "CLIP")]


def test_photographs_are_held_to_pictures_that_are_no_prompts(world, tmp_path):
    "A COCO root: the reference comes from the validation pictures that are left, and from the training pictures, said so, where too few are."
    from masked_ldm.data.manifest import build_manifest
    from masked_ldm.evaluate import held_out

    where = {
        s: str(build_manifest(world, s, tmp_path / s, 0.05, "annotation")) for s in ("train", "val")
    }
    config = dict(data_root=str(world), size=64)
    few, many = held_out(config, where, 4, 3), held_out(config, where, 4, 40)
    assert len(few.prompts) == len(few.real) == 4
    assert len(few.reference) == 3 and len(many.reference) == 40
    assert few.reference_is == "validation pictures that are no prompts"
    assert many.reference_is.startswith("training pictures, since only")
    with pytest.raises(ValueError, match="names no 'val'"):
        held_out(config, {}, 4, 3)
    assert not {p.tobytes() for p in few.real} & {p.tobytes() for p in few.reference}
