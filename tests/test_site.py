"The site: every link leads somewhere, every page is in the sidebar, every command has flags that exist, every quoted error is in the source."

import argparse
import ast
import builtins
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
from configparser import ConfigParser
from functools import lru_cache

import nbformat
import pytest
import yaml
from api import api, modules
from book import book, identifier, spine
from conftest import NOTEBOOKS, ROOT

from masked_ldm.settings import Parser, make_settings, settings_given

NBS = ROOT / "nbs"
PAGES = sorted(
    [
        *NOTEBOOKS,
        *(
            p
            for p in NBS.rglob("*.md")
            if not {".ipynb_checkpoints", "runs", "_proc"} & set(p.parts)
        ),
    ]
)  # of the site
READ = [*PAGES, *sorted(ROOT.glob("*.md"))]
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
BLOB = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}/"


def name(p):
    return str(p.relative_to(ROOT))


@lru_cache(None)
def text(page):
    "A page's prose."
    return (
        page.read_text("utf-8")
        if page.suffix == ".md"
        else "\n\n".join(
            c.source for c in nbformat.read(page, 4).cells if c.cell_type == "markdown"
        )
    )


def bare(page):
    return re.sub(
        r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text(page), flags=re.S)
    )  # without code


def links(page):
    return [
        *re.findall(r"\]\(([^)\s]+)\)", bare(page)),
        *re.findall(r"<(?:img|a)[^>]+(?:src|href)=\"([^\"]+)\"", bare(page)),
    ]


# links


@lru_cache(None)
def anchors(page):
    "Ids that the rendered page has: its headings, and what nbdev documents on it."
    out, seen = set(), {}
    for h in re.findall(
        r"^#{1,6} +(.+?)\s*$", re.sub(r"```.*?```", "", text(page), flags=re.S), re.M
    ):
        i = identifier(h)
        out.add(i if i not in seen else f"{i}-{seen[i]}")
        seen[i] = seen.get(i, 0) + 1
    return out | {
        a[1:]
        for m in modules().values()
        if NBS / m["notebook"] == page
        for a in m["names"].values()
        if a
    }


def test_ids_are_pandocs():
    for heading, want in {
        "Where to put T": "where-to-put-t",
        "A ControlNet, a LoRA, a whole UNet": "a-controlnet-a-lora-a-whole-unet",
        "`a_b`: why?": "a_b-why",
        "3 things [here](x)": "things-here",
    }.items():
        assert identifier(heading) == want


@pytest.mark.parametrize("page", READ, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith(BLOB):
            assert (ROOT / link[len(BLOB) :].split("#")[0]).exists(), link
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: nothing is there"
        assert ROOT in target.parents and (NBS not in page.parents or NBS in target.parents), (
            f"{link} leaves the site: use {BLOB}..."
        )
        if anchor:
            assert target in READ and anchor in anchors(target), (
                f"{link}: the page has {sorted(anchors(target)) if target in READ else 'no anchors'}"
            )


# sidebar


def _hrefs(items):
    for i in items:
        if isinstance(i, str):
            yield i
        elif "contents" in i:
            yield from _hrefs(i["contents"])
        elif set(i) != {"text"}:  # a heading
            yield i["href"]


def test_sidebar_has_every_page_once():
    listed = list(
        _hrefs(
            yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))["website"]["sidebar"][
                "contents"
            ]
        )
    )
    pages = [str(p.relative_to(NBS)) for p in PAGES]
    assert sorted(listed) == sorted([*pages, "book.html"])


def test_reference_is_what_is_exported():
    assert (NBS / "api.md").read_text("utf-8") == api(), "run: python tests/api.py"


def test_pages_of_prose_say_what_they_need():
    for p in PAGES:
        first = text(p).split("\n\n")
        assert first[0].startswith("# ") and (p.suffix == ".ipynb" or first[1].startswith("> ")), p
        if p.suffix == ".md" and p.parent.name == "howto":
            assert first[2].startswith("Needs: "), p


# what nbdev runs to make the pages

_SCOPES = (
    ast.FunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


def _walk(tree, inside):  # nodes, with those in functions, classes and comprehensions or without
    todo = [tree]
    while todo:
        n = todo.pop()
        yield n
        if inside or not isinstance(n, _SCOPES):
            todo += ast.iter_child_nodes(n)


def _bound(tree, inside=True):
    "Names that code binds, anywhere or at its top; a star import brings what its module has."
    nodes = list(_walk(tree, inside))
    out = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)} | {
        n.arg for n in nodes if isinstance(n, ast.arg)
    }
    out |= {
        n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))
    }
    for n in (n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))):
        for a in n.names:
            out |= (
                set(dir(importlib.import_module(n.module)))
                if a.name == "*"
                else {(a.asname or a.name).split(".")[0]}
            )
    return out


@pytest.mark.parametrize(
    "page",
    [p for p in NOTEBOOKS if any(NBS / m["notebook"] == p for m in modules().values())],
    ids=lambda p: p.stem,
)
def test_pages_can_be_made(page):
    "For the docs nbdev runs a module's exported cells and, alone, each cell that imports: that one must not need what other cells made."
    have = set(dir(builtins)) | {"display", "get_ipython"}
    for c in (
        c
        for c in nbformat.read(page, 4).cells
        if c.cell_type == "code" and "nbdev_export()" not in c.source
    ):
        tree = ast.parse(re.sub(r"^\s*[!%].*$", "", c.source, flags=re.M))
        marks = set(re.findall(r"^#\|\s*(\w+)", c.source, re.M))
        if not marks & {"export", "exports", "exporti"} and (
            re.search(r"^#\| eval: false", c.source, re.M)
            or not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree))
        ):
            continue
        lost = (
            {
                n.id
                for n in ast.walk(tree)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
            }
            - _bound(tree)
            - have
        )
        assert not lost or marks & {"export", "exports", "exporti"}, (
            f"imports beside code that needs {sorted(lost)}: move the imports up into the page's imports\n{c.source}"
        )
        have |= _bound(tree, False)


# error sentences


def _plain(node):
    "A string expression's literal text; what is filled in is \\0."
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _plain(node.left) + _plain(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"


@lru_cache(None)
def sentences():
    "All literal texts of the package."
    return {
        _plain(n)
        for p in (ROOT / "masked_ldm").rglob("*.py")
        if p.name != "_modidx.py"
        for n in ast.walk(ast.parse(p.read_text("utf-8")))
        if isinstance(n, (ast.JoinedStr, ast.Constant, ast.BinOp))
    }


def quoted():
    "Each is a heading, so that it can be found and linked, and code, so that it is shown as printed."
    return re.findall(r"^### `(.+)`$", text(NBS / "troubleshooting.md"), re.M)


def found(quote):
    "Is there a text that has the quote's fragments, in this order?"
    pattern = re.compile(
        ".*".join(re.escape(f.strip()) for f in quote.split("…") if f.strip()), re.S
    )
    return any(pattern.search(s) for s in sentences())


@pytest.mark.parametrize("quote", quoted())
def test_quoted_errors_are_said(quote):
    assert found(quote), quote


def test_an_error_nobody_says_is_seen():
    assert len(quoted()) > 40 and not found("run folder … is haunted by process …")


# commands


class Got(BaseException):
    pass


def _parser(main):
    "The parser that a command's `main` makes; abbreviations off."

    def stop(self, *a, **k):
        raise Got(self)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(argparse.ArgumentParser, "parse_args", stop)
        m.setattr(Parser, "parse_args", stop)
        try:
            main([])
        except Got as e:
            e.args[0].allow_abbrev = False
            return e.args[0]


@lru_cache(None)
def parsers():
    "{program: argparse parser}"
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    from masked_ldm import evaluate, sample, train
    from masked_ldm.data import command as data_command
    from masked_ldm.study import app as study
    from masked_ldm.training import distillation

    ours = {
        f"masked-ldm-{k}": _parser(m.main)
        for k, m in dict(
            train=train, eval=evaluate, sample=sample, study=study, distill=distillation
        ).items()
    }
    return ours | {
        "masked-ldm-data": data_command.make_parser(),
        "accelerate": launch_command_parser(),
        "torchrun": get_args_parser(),
    }


def settings_classes():
    "{program: its settings class}, for commands that have one."
    from masked_ldm.evaluate import EvalSettings
    from masked_ldm.sample import SampleSettings
    from masked_ldm.study.app import StudySettings
    from masked_ldm.training.distillation import DistilSettings

    return {
        "masked-ldm-distill": DistilSettings,
        "masked-ldm-eval": EvalSettings,
        "masked-ldm-sample": SampleSettings,
        "masked-ldm-study": StudySettings,
    }


def _settings(given, processes=1):
    "A run's settings, checked but for what is on the disk and what is installed."
    from masked_ldm.training import config

    with pytest.MonkeyPatch.context() as m:
        m.setattr(config, "_check_data_root", lambda root: None)
        m.setattr(config, "_check_latent_net", lambda c: None)
        m.setattr(config, "find_spec", lambda name: True)
        c = config.TrainConfig.make(**given)
    assert c.batch_size % (processes * c.gradient_accumulation_steps) == 0, (
        f"batch_size {c.batch_size} on {processes} processes"
    )


def _ours(program, args, processes=1):
    from masked_ldm.data import command as data_command

    a = parsers()[program].parse_args(args)
    if program == "masked-ldm-train":
        _settings(vars(a), processes)
    for program_of, cls in settings_classes().items():
        if program == program_of:
            given = {k: v for k, v in settings_given(cls, a).items() if k != "out"}  # not made yet
            make_settings(cls, given)
    if program == "masked-ldm-data":
        with pytest.MonkeyPatch.context() as m:
            m.setattr(data_command, "choose_device", lambda name: None)
            data_command.read_settings(a)


def _launcher(program, args):
    if program == "accelerate":
        assert args.pop(0) == "launch"
    a = parsers()[program].parse_args(args)
    assert a.module and a.training_script == "masked_ldm.train", a
    _ours(
        "masked-ldm-train",
        a.training_script_args,
        a.num_processes or 1
        if program == "accelerate"
        else int(a.nnodes.split(":")[-1]) * int(a.nproc_per_node),
    )


def _papermill(args):
    from papermill.cli import _resolve_type, papermill

    given = papermill.make_context("papermill", args).params
    page = ROOT / given["notebook_path"]
    (cell,) = (
        c for c in nbformat.read(page, 4).cells if "parameters" in c.metadata.get("tags", [])
    )
    known = {t.id for n in ast.parse(cell.source).body for t in n.targets}
    said = {k: _resolve_type(v) for k, v in given["parameters"]}
    assert set(said) <= known, f"{page.name} has no parameter {set(said) - known}"
    if page.name == "05_train.ipynb":
        _settings(said)


def _make(args):
    assert args and all(
        re.search(rf"^{a}:", (ROOT / "Makefile").read_text("utf-8"), re.M) for a in args
    ), args


def _pip(args):
    assert args[0] == "install"
    extras = {k[:-13] for k in SETTINGS if k.endswith("_requirements")}
    for a in args[1:]:
        assert (
            a == "-e"
            or (m := re.fullmatch(r"(\.|masked_ldm)(?:\[([\w,]+)\])?", a))
            and set((m[2] or "").split(",")) <= extras | {""}
        ), a


def _nbdev(program, args):
    import nbdev.clean
    import nbdev.doclinks
    import nbdev.test
    from fastcore.script import anno_parser

    f = dict(
        nbdev_export=nbdev.doclinks.nbdev_export,
        nbdev_clean=nbdev.clean.nbdev_clean,
        nbdev_test=nbdev.test.nbdev_test,
    )[program]
    a = anno_parser(getattr(f, "__wrapped__", f)).parse_args(args)
    assert not getattr(a, "path", None) or (ROOT / a.path).exists()


def _jupyter(args):
    from nbconvert.nbconvertapp import NbConvertApp

    assert args[0] == "nbconvert" and (ROOT / args[-1]).is_file()
    for a in args[1:]:
        assert not a.startswith("--") or a[2:] in {**NbConvertApp.flags, **NbConvertApp.aliases}, a


def _hf(args):
    from huggingface_hub.cli.hf import app

    app([*args, "--help"], standalone_mode=False)  # raises for a command it does not know


def _shell(program, args):
    if program == "git":
        assert args == ["clone", SETTINGS["git_url"]]
    if program == "cd":
        assert args == [SETTINGS["repo"]]
    if program == "ruff":
        assert args[0] in ("format", "check") and all((ROOT / a).exists() for a in args[1:])
    if program == "python":
        assert args[:2] == ["-m", "pytest"] and all((ROOT / a).exists() for a in args[2:])


def check(line):
    "Raise, or exit, for a command that would not be understood."
    program, *args = shlex.split(line, comments=True)
    if program.startswith("masked-ldm-"):
        assert f"{program}=" in SETTINGS["console_scripts"]
        return _ours(program, args)
    if program in ("accelerate", "torchrun"):
        return _launcher(program, args)
    if program.startswith("nbdev_"):
        return _nbdev(program, args)
    if program in ("git", "cd", "python", "ruff"):
        return _shell(program, args)
    dict(papermill=_papermill, make=_make, pip=_pip, jupyter=_jupyter, hf=_hf)[program](args)


def blocks(page):
    return [
        (m.start(), m[1])
        for m in re.finditer(r"```(?:sh|bash|shell|console)\n(.*?)```", text(page), re.S)
    ]


COMMANDS = sorted(
    {
        (name(p), row.strip())
        for p in READ
        for _, b in blocks(p)
        for row in b.splitlines()
        if row.split("#")[0].strip()
    }
)


@pytest.mark.parametrize("page,line", COMMANDS, ids=lambda v: v[:60])
def test_commands_are_understood(page, line, capsys):
    try:
        check(line)
    except SystemExit as e:
        pytest.fail(f"{page}: {line}\n{capsys.readouterr().err or e}")


@pytest.mark.parametrize(
    "line",
    [
        "masked-ldm-train --max_step 3",
        "masked-ldm-train --size 100",
        "masked-ldm-data build x --min_aera .1",
        "masked-ldm-eval a --protocol slow",
        "papermill nbs/05_train.ipynb o.ipynb -p stesp 3",
        "accelerate launch --num_gpus 2 -m masked_ldm.train",
        "accelerate launch --num_processes 3 -m masked_ldm.train --batch_size 4",
        "make tests",
        "pip install -e '.[gpu]'",
        "hf auth enter",
        "nbdev_clean --deep",
        "rm x",
    ],
)
def test_commands_with_slips_are_not(line):
    with pytest.raises((SystemExit, Exception)):
        check(line)


def test_there_are_commands():
    assert len(COMMANDS) > 40


NEEDY = re.compile(
    r"sd15|/data/|/shared/|accelerate|^hf |nnodes", re.M
)  # weights, photographs, GPUs, the internet


@pytest.mark.parametrize("page", READ, ids=name)
def test_needs_are_said(page):
    "Near a command that does not run anywhere stands what it needs."
    for at, b in blocks(page):
        if NEEDY.search(b):
            assert re.search(
                r"\b[Nn]eed|GPU|weights|COCO|photograph",
                text(page)[:600]
                + text(page)[max(0, at - 700) : at]
                + text(page)[at + len(b) : at + len(b) + 700],
            ), b


@lru_cache(None)
def flags():
    "Every option of every command, and papermill's."
    out, todo = set(), list(parsers().values())
    while todo:
        p = todo.pop()
        for a in p._actions:
            out |= set(a.option_strings)
            todo += list(a.choices.values()) if isinstance(a, argparse._SubParsersAction) else []
    return out


@pytest.mark.parametrize("page", READ, ids=name)
def test_flags_in_prose_exist(page):
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text(page), flags=re.S)):
        for flag in re.findall(r"(?:^|\s)(--[a-z]\w+(?:-\w+)*)", code):
            assert flag in flags() | {"--NAME", "--help", "--logdir", "--cpu"}, (
                f"{flag} in `{code}`"
            )


# Python


def snippets(page):
    return re.findall(r"```python\n(.*?)```", text(page), re.S)


@pytest.mark.parametrize("page", [p for p in READ if snippets(p)], ids=name)
def test_python_shown_has_real_names(page):
    "What a page imports from this package is there, and takes the keywords it is given; what a page shows is Python."
    there = {}
    for tree in map(ast.parse, snippets(page)):
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom) and n.module.startswith("masked_ldm"):
                there |= {
                    a.name: getattr(importlib.import_module(n.module), a.name) for a in n.names
                }
        for n in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            f = n.func
            f = (
                there.get(f.id)
                if isinstance(f, ast.Name)
                else getattr(there.get(getattr(f.value, "id", "")), f.attr, None)
                if isinstance(f, ast.Attribute)
                else None
            )
            if f:
                inspect.signature(f).bind_partial(*n.args, **{k.arg: k for k in n.keywords})
    assert there


# what goes with the software


def test_citation():
    c = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (
        c["cff-version"] == "1.2.0" and c["message"] and c["title"] and c["license"] == "Apache-2.0"
    )
    assert (
        str(c["version"]) == SETTINGS["version"]
        and c["authors"] == [dict(name=SETTINGS["author"])]
        and c["repository-code"] == SETTINGS["git_url"]
    )
    (paper,) = c["references"]
    assert [a["family-names"] for a in paper["authors"]] == [
        "Gupta",
        "Hebbar",
        "Mohta",
    ] and "Mask-Aware" in paper["title"]
    assert f"version = {{{SETTINGS['version']}}}" in text(NBS / "licences.md")


def test_changelog_knows_the_version():
    assert re.search(
        rf"^## \[{re.escape(SETTINGS['version'])}\]|^To become {re.escape(SETTINGS['version'])}\b",
        (ROOT / "CHANGELOG.md").read_text("utf-8"),
        re.M,
    )


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_docs_without_quarto_is_one_sentence(tmp_path):
    r = subprocess.run(
        [shutil.which("make"), "-s", "-o", "setup", "docs"],
        cwd=ROOT,
        env=dict(PATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert r.returncode and r.stdout.count("\n") == 1 and "Quarto" in r.stdout, r.stdout + r.stderr


def test_the_page_of_commands_knows_every_flag(monkeypatch, capsys):
    "Pythons lay their help out differently; names and sentences are the same."
    monkeypatch.setenv("COLUMNS", "96")
    page = nbformat.read(NBS / "commands.ipynb", 4)
    shown = [c for c in page.cells if c.source.startswith("#| echo: false\n")]
    assert {re.search(r"\((\w+)", c.source)[1] for c in shown} == {
        spec.partition("=")[2].partition(":")[0].rpartition(".")[2]
        for spec in SETTINGS["console_scripts"].split()
    }
    for cell in shown:
        module, *subcommand = re.findall(r"\w+", cell.source.split("show_help")[1])
        name = next(m for m in modules() if m.rpartition(".")[2] == module)
        with pytest.raises(SystemExit):
            importlib.import_module(f"masked_ldm.{name}").main([*subcommand, "--help"])
        printed = capsys.readouterr().out
        flags = set(re.findall(r"--\w+", printed))
        assert flags == set(re.findall(r"--\w+", cell.outputs[0]["text"])), cell.source
        told = printed.split("\n\n", 1)[1].split()
        stored = cell.outputs[0]["text"].split("\n\n", 1)[1].split()
        assert set(told) == set(stored), cell.source


def test_the_book_holds_the_spine():
    pages, text = spine(), book()
    assert pages[0] == "index.ipynb" and pages[-1] == "07_sample.ipynb"
    assert re.findall(r'<div class="page" id="([^"]+)"', text) == pages
    assert text.count("<h1") == len(pages)
    assert "#|" not in text and "data:image" in text and "No description" not in text
    within = re.findall(r'<a href="#([^"]+)"', text)
    assert len([link for link in within if link.split("--")[0] in pages]) > 20
    assert set(re.findall(r'<a href="#([^"]+\.ipynb[^"]*)"', text)) <= set(
        re.findall(r' id="([^"]+)"', text)
    )
    assert all("://" in link for link in re.findall(r'href="([^"#]+)', text))
