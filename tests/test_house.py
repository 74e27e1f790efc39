"The house: notebooks, README and settings say the same thing."

import ast
import json
import re
from dataclasses import fields

import nbformat
import pytest
import yaml
from conftest import NOTEBOOKS, ROOT
from readme import readme

PAPERMILL = [
    "05_train",
    "05b_repair",
    "06_evaluate",
    "training/16_trainable",
    "experiments/build_base",
    "experiments/base_quality",
    "experiments/metrics_validation",
    "experiments/loss_cost",
    "experiments/benchmark",
    "experiments/data_scale",
    "experiments/kills",
    "experiments/cache_speed",
    "experiments/faces_found",
    "experiments/processes",
    "experiments/verdicts",
    "experiments/knockout",
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
        (line,) = (row for row in cell.source.splitlines() if row.startswith(f"{name} = None"))
        comment = re.split(r"\s{2,}", line.strip())[-1].lstrip("# ").split(" / ")[0]
        assert float(comment) == float(getattr(tiny, name)), line


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_have_captions_and_alt_texts(path):
    alts = []
    for c in cells(path):
        mimes = [mime for o in c.get("outputs", []) for mime in o.get("data", {})]
        if not any(mime.startswith("image/") for mime in mimes):
            continue
        told = dict(re.findall(r'^#\| fig-(cap|alt): "([^"\\]+)"$', c.source, re.MULTILINE))
        assert set(told) == {"cap", "alt"}, f"a picture lacks fig-cap or fig-alt: {c.source[:200]}"
        assert told["cap"] != told["alt"], told["alt"]
        alts.append(told["alt"])
    assert len(set(alts)) == len(alts), "two pictures have the same alt text"


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text("utf-8") == readme()


def test_readme_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme()):
        assert (ROOT / target).exists(), target


def test_quarto_file_is_one():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_sidebar_lists_every_notebook():
    listed = set(re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text("utf-8")))
    assert listed == {str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS}


# The package


MODULES = {
    ".".join(p.relative_to(ROOT / "masked_ldm").with_suffix("").parts): ast.parse(
        p.read_text("utf-8")
    )
    for p in sorted((ROOT / "masked_ldm").rglob("*.py"))
    if p.name not in ("_modidx.py", "__init__.py")
}


def imports_of(module):
    "{(module of ours, name)} that a module imports, at its top or inside functions."
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = module.split(".")[: -node.level]
            source = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}".strip(".")
                found.add((whole, "") if whole in MODULES else (source, alias.name))
    return found


def test_no_module_imports_a_private_name():
    for module in MODULES:
        for source, name in imports_of(module):
            assert not name.startswith("_"), f"{module} imports {name} of {source}"


def test_imports_have_no_circle():
    left = {m: {source for source, _ in imports_of(m)} & set(MODULES) for m in MODULES}
    while ready := [m for m, needs in left.items() if not needs]:
        for m in ready:
            del left[m]
        for needs in left.values():
            needs -= set(ready)
    assert not left, f"a circle among {sorted(left)}"


MAY_NOT_IMPORT = {  # a room, and the rooms it knows nothing of
    "one_step|masked_lpips|decoder_features|latent_features|face_loss|several_steps|families|models|toy": "data|training|train|evaluate|evaluation|sample|study",
    "objective|pose_loss": "data|training|train|evaluate|evaluation|sample|study|toy",
    "data": "training|train|evaluate|evaluation|sample|study",
    "training|evaluation|sample|evaluate": "train|study",
}


@pytest.mark.parametrize("rooms", MAY_NOT_IMPORT)
def test_imports_run_one_way(rooms):
    for module in MODULES:
        if module.split(".")[0] not in rooms.split("|") or module == "data.command":
            continue  # a command may ask a run's settings what to encode
        for source, name in imports_of(module):
            far = source.split(".")[0]
            assert far not in MAY_NOT_IMPORT[rooms].split("|"), f"{module} imports {name or source}"


def public_functions(tree):
    "(name, node) of public functions and of the public methods of public classes."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                hidden = isinstance(method, ast.FunctionDef) and method.name.startswith("_")
                if isinstance(method, ast.FunctionDef) and (
                    not hidden or method.name == "__init__"
                ):
                    yield f"{node.name}.{method.name}", method


@pytest.mark.parametrize("module", MODULES)
def test_public_signatures_are_annotated(module):
    for name, node in public_functions(MODULES[module]):
        given = [
            a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")
        ]
        bare = [a.arg for a in given if a.annotation is None]
        assert not bare, f"{module}.{name}: {', '.join(bare)} without a type"
        assert node.returns is not None or name.endswith("__init__"), (
            f"{module}.{name}: returns what?"
        )


@pytest.mark.parametrize("module", MODULES)
def test_classes_are_whole(module):
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.FunctionDef):
            assert not any("patch" in ast.unparse(d) for d in node.decorator_list), node.name


def test_folders_are_packages():
    "A notebook in nbs/data exports to masked_ldm/data; the spine tells one of data's modules."
    for path in NOTEBOOKS:
        for c in cells(path):
            if m := re.match(r"#\| default_exp (\S+)", c.source):
                folder = path.parent.relative_to(ROOT / "nbs")
                assert m[1].split(".")[:-1] == list(folder.parts) or path.stem == "01_data", path


def test_sidebar_order_is_file_order():
    "The spine stands open above; in each section that has numbers, they rise."
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))["website"]["sidebar"]
    spine = [page for page in sidebar["contents"] if isinstance(page, str)]
    assert spine[0] == "index.ipynb" and spine[1:] == sorted(spine[1:])
    sections = [
        part["contents"]
        for part in sidebar["contents"]
        if isinstance(part, dict) and "contents" in part
    ]
    for pages in sections:
        numbered = [p for p in pages if isinstance(p, str) and re.search(r"(^|/)\d", p)]
        assert numbered == sorted(numbered), pages


def test_the_landing_page_shows_what_is_in_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    (cell,) = (c for c in cells(ROOT / "nbs" / "index.ipynb") if c.cell_type == "code")
    *before, last = ast.parse(cell.source).body
    names = {}
    exec(compile(ast.Module(before, []), "index", "exec"), names)
    table = eval(compile(ast.Expression(last.value), "index", "eval"), names)
    (stored,) = cell.outputs
    assert stored["data"]["text/markdown"].strip() == table.data.strip()
