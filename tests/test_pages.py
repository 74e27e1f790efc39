"Every sentence of a notebook reaches its page, as nbdev makes it for Quarto. Of the first cell nbdev keeps title and claim only; and it links the names it knows, within links too."

import re
from functools import lru_cache

import pytest
import yaml
from conftest import NOTEBOOKS, ROOT
from execnb.nbio import dict2nb, read_nb
from nbdev.processors import FilterDefaults, exec_show_docs

LINK = re.compile(r"\[([^\[\]]*)\]\([^()]*\)")


class Processors(FilterDefaults):
    "What nbdev does to a notebook before Quarto renders it, but for running the code."

    def base_procs(self):
        return [proc for proc in super().base_procs() if proc is not exec_show_docs]


def plain(text):
    "Markdown without links, as one line."
    without = LINK.sub(r"\1", LINK.sub(r"\1", text))  # twice: a link may lie in a link
    return " ".join(without.split())


def prose(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def made(notebook):
    "The sentences a reader shall see, and the texts of the page that is made of the notebook."
    wanted = [s for text in prose(notebook) for s in re.split(r"(?<=[.!?:]) ", plain(text))]
    Processors()(notebook)
    head = notebook.cells[0]
    assert head.cell_type == "raw", "the page has no title"
    about = yaml.safe_load(head.source.strip().strip("-"))
    return wanted, [f"# {about['title']} > {about['description']}", *prose(notebook)]


def lost(wanted, texts):
    shown = " ".join(plain(text) for text in texts)
    return [sentence for sentence in wanted if sentence not in shown]


@lru_cache(None)
def page(path):
    return made(read_nb(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_sentence_is_on_its_page(path):
    assert not lost(*page(path)), "the first cell holds title and claim, nothing else"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_link_lies_in_a_link(path):
    _, texts = page(path)
    nested = [
        found for text in texts for found in re.findall(r"\[\[.*?\]\(.*?\).*?\]\(.*?\)", text)
    ]
    assert not nested, "nbdev links names in backticks: none inside a link's text"


def notebook_of(*cells):
    cells = [{"cell_type": kind, "metadata": {}, "source": text} for kind, text in cells]
    notebook = dict2nb({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    notebook.path_ = ROOT / "nbs" / "a_page.ipynb"
    return notebook


def test_a_lost_introduction_is_seen():
    title = "# Title\n\n> A claim: it is short."
    first = "The introduction, with a [link](index.ipynb)."
    code = ("code", "#| default_exp nothing")
    wrong = notebook_of(("markdown", f"{title}\n\n{first}"), code)
    assert lost(*made(wrong)) == ["The introduction, with a link."]
    assert not lost(*made(notebook_of(("markdown", title), ("markdown", first), code)))
