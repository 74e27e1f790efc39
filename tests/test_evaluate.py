"Judging: bad input gets one sentence, the command leaves what it promises, and settings of a run reach its pictures."

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, papermill, run


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
    again = e.evaluate(runs, e.EvalSettings(reference=8, out=str(out), device="cpu"))
    assert again["models"] == r["models"] and again["paired"] == r["paired"]
    with pytest.raises(ValueError, match="holds pictures drawn otherwise"):
        e.evaluate(
            runs, e.EvalSettings(reference=8, out=str(out), device="cpu", guidance_scale=4.0)
        )


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
    wanted = ["config.json", "controlnet/*", "lora/*", "unet/*"]  # a run has one of the three
    assert pipe.strength == 0.5 and asked == [("somebody/ours", wanted)]
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
    assert many.reference_is.startswith("training pictures, since all but")
    with pytest.raises(ValueError, match="names no 'val'"):
        held_out(config, {}, 4, 3)
    assert not {p.tobytes() for p in few.real} & {p.tobytes() for p in few.reference}


def test_a_terminal_without_the_letters(monkeypatch):
    from masked_ldm.settings import run_command

    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", latin)
    run_command("tea", lambda: print("faces \u2191 \u4eba"))
    latin.flush()
    assert latin.buffer.getvalue() == b"faces \\u2191 \\u4eba\n"


def test_a_run_is_drawn_as_it_was_trained(tmp_path):
    "Its size and its precision, unless another size is asked for; latents stay in float32."
    from masked_ldm.sample import MaskedLDMPipeline, load_models, open_runs, sample

    config = json.loads((make_run(tmp_path / "run") / "config.json").read_text())
    config |= dict(size=32, mixed_precision="bf16")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    models = load_models(open_runs([tmp_path / "run"]), device="cpu")
    assert models["run"].base.unet is models["base"].unet  # one copy
    assert models["run"].text_encoder.dtype == torch.bfloat16
    seen = []
    step = models["run"].vae.decode
    models["run"].vae.decode = lambda z, **k: seen.append(z.dtype) or step(z, **k)
    (drawn,) = sample(models["run"], ["a"], steps=1, guidance_scale=1.0)
    (asked,) = sample(models["run"], ["a"], steps=1, guidance_scale=1.0, size=40)
    assert drawn.size == (32, 32) and asked.size == (40, 40)
    assert seen == [torch.float32] * 2
    one = dict(num_inference_steps=1, guidance_scale=1.0)
    assert MaskedLDMPipeline.from_run(tmp_path / "run")("a", **one).images[0].size == (32, 32)


def test_names_of_runs_differ(tmp_path):
    from masked_ldm.sample import open_runs

    paths = [tmp_path / name for name in ("a/run", "b/run", "base", "my | run")]
    for path in paths:
        make_run(path)
    assert list(open_runs(paths[:2])) == ["a/run", "b/run"]
    assert list(open_runs([paths[3]])) == ["my_run"]
    (name,) = open_runs([paths[2]])
    assert name.endswith("/base") and name != "base"
    (tmp_path / "link").symlink_to(paths[0])
    for again in (paths[0], f"{paths[0]}/", f"{tmp_path}/b/../a/run", tmp_path / "link"):
        with pytest.raises(ValueError, match="a run is named twice"):
            open_runs([paths[0], again])


def test_memory_that_does_not_suffice(tmp_path):
    "Fewer at a time, as long as that helps; then one sentence."
    from masked_ldm.sample import by_parts, memory_explained
    from masked_ldm.training.memory_plan import OutOfMemory

    tried = []

    def work(part, fits=2):
        tried.append(part.stop - part.start)
        if tried[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return range(part.start, part.stop)

    assert by_parts(work, 7, 8) == list(range(7)) and tried == [7, 4, 2, 2, 2, 1]
    with (
        pytest.raises(OutOfMemory, match="one picture at a time.* kept in some/where"),
        memory_explained("some/where"),
    ):
        by_parts(lambda part: work(part, 0), 3, 8)
    with pytest.raises(ValueError), memory_explained():
        by_parts(lambda part: int("x"), 3, 8)


@pytest.mark.parametrize("mixed_precision, most", [("bf16", 7.0), ("no", 10.0)])
def test_stable_diffusion_is_judged_within_ten_gib(mixed_precision, most):
    "Two runs at 512 px by count: weights of base, branches and judges, and the most that drawing or judging needs beside them."
    from masked_ldm.models import ControlledUNet, make_branch, own_precision, set_precision
    from masked_ldm.training import memory_plan as plan

    base = plan.empty_base("sd15")
    with torch.device("meta"):
        branches = [make_branch(base.unet).eval().requires_grad_(False) for _ in range(2)]
    set_precision(base, mixed_precision, torch.device("cuda"))
    networks = (base.vae, base.unet, base.text_encoder, *branches)
    for network in networks:
        plan.without_content(network)
    model = ControlledUNet(base.unet, branches[0])
    x, text, pixels = plan.empty(2, 4, 64, 64), plan.empty(2, 77, 768), plan.empty(1, 3, 512, 512)
    work = dict(
        draw=lambda: model(x, torch.ones(2), text),  # with guidance
        decode=lambda: base.decode(x[:1]),
        encode=lambda: base.moments(pixels),
    )
    bf16 = mixed_precision == "bf16"
    with torch.no_grad(), own_precision(base), plan._norms_in_float32(bf16):
        beside = max(plan.cost(one).gib for one in work.values())
    judges = 1.4  # CLIP 0.56, ViTPose 0.34, RT-DETR 0.16, Inception 0.09, LPIPS, faces, their input
    assert plan.weights_of(*networks) + beside + judges < most


def test_photographs_that_have_moved(world, tmp_path):
    from masked_ldm.data.manifest import build_manifest
    from masked_ldm.evaluate import held_out, moved
    from masked_ldm.sample import Run
    from masked_ldm.settings import ConfigError

    for split in ("train", "val"):
        build_manifest(world, split, tmp_path / "made" / split, 0.05, "annotation")
    config = dict(data_root="/gone", size=64, cache_dir=str(tmp_path / "cache"), faces="annotation")
    run = Run(
        "run", tmp_path, config, dict(val="/gone/metadata.jsonl", train="/gone/metadata.jsonl")
    )
    for place in (tmp_path / "made", world):  # manifests, or a data set
        here = moved(run, str(place))
        assert len(held_out(here.config, here.data, 4, 3).prompts) == 4
    for nowhere in ("/gone", str(tmp_path)):
        with pytest.raises(ConfigError, match="data_root"):
            moved(run, nowhere)


def test_the_hub_is_asked_once(monkeypatch):
    "transformers would ask again and again for every file of every network."
    from masked_ldm.evaluation import people_metrics as m

    asked, loaded = [], []

    class Network:
        @classmethod
        def from_pretrained(cls, name, **how):
            loaded.append(how["local_files_only"])

    def nobody():
        asked.append(1)
        raise OSError("no network")

    monkeypatch.setattr(m, "get_session", nobody)
    monkeypatch.setattr(m.constants, "HF_HUB_OFFLINE", False)
    m._hub_answers.cache_clear()
    for name in ("some/network", "another/network"):
        m._load(Network, name)
    m._hub_answers.cache_clear()
    assert asked == [1] and loaded == [True, True]


def run_notebook(name, until="", **parameters):
    "Run a notebook's cells as papermill does, up to one that holds a text; parameters it may not have."
    names = dict(__name__="__main__")
    for cell in nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= parameters
        elif until and until in cell.source:
            return


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("06_evaluate", "runs"),
        ("experiments/evidence", "seed"),
        ("experiments/verdicts", "result"),
        ("experiments/metrics_validation", "N"),
        ("experiments/base_quality", "n_val"),
    ],
)
def test_a_misspelt_parameter_is_refused(tmp_path, monkeypatch, name, wrong):
    from masked_ldm.settings import ConfigError

    monkeypatch.chdir(tmp_path)  # from any folder
    with pytest.raises(ConfigError, match=f"unknown parameter '{wrong}'"):
        run_notebook(name, **{wrong: "a,b"})
    if name != "06_evaluate":
        run_notebook(name, "parameters_given(globals()")


def test_the_report_can_be_read_while_the_experiment_runs(tmp_path):
    "With nothing made yet, and with the files of two arms."
    verdicts, evidence = "nbs/experiments/verdicts.ipynb", ROOT / "results" / "evidence"
    (tmp_path / "some").mkdir()
    for name in ("real", "hurt-base", *(f"hurt-plain-seed{seed}" for seed in (3, 4, 5, 6))):
        for path in evidence.glob(f"{name}.*"):
            shutil.copy(path, tmp_path / "some")
    for folder in ("none", "some"):
        code, text = papermill(
            tmp_path / "o.ipynb", ("results", tmp_path / folder), notebook=verdicts
        )
        assert code == 0, text[-2000:]
