"What the site shows of functions and classes."

import ast
import importlib
from configparser import ConfigParser

import pytest
from api import modules
from conftest import ROOT
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
from signatures import Signature, outline

CLASS = """
@dataclass
class Face(Region):
    "A face."

    box: Tensor  # (4,) pixels
    _seen: int = 0

    @property
    def area(
        self,
    ) -> float:  # square pixels, see `box`
        "What it covers."
        return self.box.prod()

    def _grow(self):
        pass

    def __len__(self) -> int:
        return 4
"""


def test_an_outline_is_the_source_without_bodies():
    code, docstring = outline(CLASS)
    assert docstring == "A face."
    assert code == (
        "@dataclass\nclass Face(Region):\n"
        "    box: Tensor  # (4,) pixels\n\n"
        "    @property\n    def area(\n        self,\n    ) -> float:  # square pixels, see box\n"
        '        "What it covers."\n\n'
        "    def __len__(self) -> int:\n        ..."
    )
    assert outline("def f(x: int) -> int:  # more\n    return x + 1\n") == (
        "def f(x: int) -> int:  # more",
        None,
    )


@pytest.mark.parametrize("module", modules())
def test_every_public_name_has_a_signature(module):
    package = importlib.import_module(f"masked_ldm.{module}")
    for name, anchor in modules()[module]["names"].items():
        if not anchor:  # a constant
            continue
        symbol = getattr(package, name)
        shown = Signature(symbol)._repr_markdown_()
        assert f"### {name}\n" in shown
        assert "/nan" not in shown and "#LNone" not in shown
        code = shown.split("```python\n")[1].split("\n```")[0]
        assert "`" not in code
        ast.parse(code if isinstance(symbol, type) else code + "\n    ...")


@pytest.mark.parametrize("page", ["12_device", "data/05_crop"])
def test_a_page_shows_the_signatures_of_its_module(page):
    "As nbdev makes it: by running the page's exports in a shell of its own."
    nb = read_nb(ROOT / "nbs" / f"{page}.ipynb")
    FilterDefaults()(nb)
    shown = "".join(
        "".join(output.data["text/markdown"])
        for c in nb.cells
        if "show_doc(" in c.source
        for output in c.outputs
    )
    module = next(m for m, of in modules().items() if of["notebook"] == f"{page}.ipynb")
    for name, anchor in modules()[module]["names"].items():
        assert not anchor or f"### {name}\n" in shown
    assert f"masked_ldm/{module.replace('.', '/')}.py#L" in shown


def test_nbdev_is_told():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    module, _, name = cfg["DEFAULT"]["renderer"].partition(".")
    assert getattr(importlib.import_module(module), name) is Signature
