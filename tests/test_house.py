"The house: notebooks, README and settings say the same thing."

import ast
import json
import re
from dataclasses import fields

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT
from readme import readme

PAPERMILL = [
    "05_train",
    "06_evaluate",
    "toy/05_build_base",
    "experiments/base_quality",
    "experiments/metrics_validation",
    "experiments/loss_cost",
    "experiments/benchmark",
    "experiments/data_scale",
    "experiments/kills",
    "experiments/cache_speed",
    "experiments/faces_found",
    "experiments/processes",
    "experiments/ablations",
    "experiments/report",
]  # notebooks with parameters


def cells(path):
    return nbformat.read(path, 4).cells


@pytest.mark.parametrize("name", PAPERMILL)
def test_one_parameters_cell(name):
    assert (
        sum(
            "parameters" in c.metadata.get("tags", [])
            for c in cells(ROOT / "nbs" / f"{name}.ipynb")
        )
        == 1
    )


@pytest.mark.parametrize("name", PAPERMILL)
def test_papermill_needs_no_nbdev(name):
    "papermill runs every cell, also those that nbdev hides; a plain `pip install -e .` has no nbdev."
    assert not any(
        "nbdev" in c.source.replace("nbdev_test", "")
        for c in cells(ROOT / "nbs" / f"{name}.ipynb")
        if c.cell_type == "code"
    )


def test_every_field_is_a_parameter():
    from masked_ldm.train import TrainConfig

    (cell,) = (
        c
        for c in cells(ROOT / "nbs" / "05_train.ipynb")
        if "parameters" in c.metadata.get("tags", [])
    )
    assert {t.id for node in ast.parse(cell.source).body for t in node.targets} == {
        f.name for f in fields(TrainConfig)
    }


def test_parameter_comments_tell_the_presets():
    from masked_ldm.train import TrainConfig

    (cell,) = (
        c
        for c in cells(ROOT / "nbs" / "05_train.ipynb")
        if "parameters" in c.metadata.get("tags", [])
    )
    tiny = TrainConfig.make()
    for name in (
        "T",
        "lambda1",
        "lambda2",
        "size",
        "max_steps",
        "batch_size",
        "learning_rate",
        "world_pictures",
        "val_pictures",
        "guidance_scale",
        "sample_steps",
        "log_steps",
    ):
        (line,) = (l for l in cell.source.splitlines() if l.startswith(f"{name} = None"))
        told = re.split(r"\s{2,}", line.strip())[-1].lstrip("# ").split(" / ")[0]
        assert float(told) == float(getattr(tiny, name)), line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_reads_well(path):
    cs = cells(path)
    first = cs[0].source
    code = [c for c in cs if c.cell_type == "code"]
    text = json.dumps([c.outputs for c in code])
    assert re.fullmatch(r"# .+\n\n> .+", first), "opens with H1 and a one-line claim, nothing else"
    assert any(c.outputs for c in code), "no outputs saved"
    assert not any(o.output_type == "error" for c in code for o in c.outputs), "an error is saved"
    assert not re.search(r"(?<![\w.:/])/(?:work|root|tmp|home|Users)/[\w./-]+", text), (
        "a machine path in an output"
    )
    assert "it/s]" not in text, "a progress bar in an output"
    assert path.stat().st_size < 800_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_printed_is_shown(path):
    "A merge may lose outputs: a cell that prints has one."
    for c in cells(path):
        if c.cell_type != "code" or c.source.startswith(
            ("#| hide", "#| export", "#| eval: false", "#| default")
        ):
            continue
        try:
            body = ast.parse(c.source).body
        except SyntaxError:
            continue
        assert c.outputs or not any(
            isinstance(b, ast.Expr)
            and isinstance(b.value, ast.Call)
            and getattr(b.value.func, "id", "") == "print"
            for b in body
        ), c.source[:200]


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text() == readme()


def test_readme_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme()):
        assert (ROOT / target).exists(), target


def test_quarto_file_is_one():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_sidebar_lists_every_notebook():
    listed = set(re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text()))
    assert listed == {str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS}
