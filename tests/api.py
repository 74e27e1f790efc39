"nbs/api.md, module by module, from what nbdev exported: `python tests/api.py`."

import ast
import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _public_names(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def _anchor(symbols, full):
    "Where a name is documented on its notebook's page; empty for a constant."
    return "#" + symbols[full][0].split("#")[1] if full in symbols else ""


@lru_cache(None)
def modules():
    "{module: dict(notebook, says, names: {public name: its anchor or ''})}, in the sidebar's order."
    listed = re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text("utf-8"))
    index = (ROOT / "masked_ldm" / "_modidx.py").read_text("utf-8").split("=", 1)[1].strip()
    found = {}
    for full, symbols in ast.literal_eval(index)["syms"].items():
        text = (ROOT / (full.replace(".", "/") + ".py")).read_text("utf-8")
        tree = ast.parse(text)
        found[full.partition(".")[2]] = dict(
            notebook=re.search(r"File to edit: (?:\.\./)+nbs/(.+\.ipynb)", text)[1],
            says=ast.get_docstring(tree),
            names={n: _anchor(symbols, f"{full}.{n}") for n in _public_names(tree)},
        )
    return dict(sorted(found.items(), key=lambda item: listed.index(item[1]["notebook"])))


HEAD = """# Reference: modules and their names

> Each module is one notebook; its page is the reference, with every name explained, used and tested where it is defined.

Whatever is listed here is public: `from masked_ldm.MODULE import NAME`. Commands, and what they call: `masked-ldm-data` is [data.command](data/12_command.ipynb), `masked-ldm-train` [train](05_train.ipynb), `masked-ldm-eval` [evaluate](06_evaluate.ipynb),
`masked-ldm-sample` [sample](07_sample.ipynb), `masked-ldm-study` [study.app](study/02_app.ipynb). This page is made by `tests/api.py`.
"""


def api():
    "The page's text."
    out = [HEAD]
    for name, m in modules().items():
        links = ", ".join(
            f"[`{n}`]({m['notebook']}{a})" if a else f"`{n}`" for n, a in m["names"].items()
        )
        says = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", m["says"])  # its links start elsewhere
        out.append(f"## {name}\n\n[{m['notebook']}]({m['notebook']}): {says}\n\n{links}\n")
    return "\n".join(out)


if __name__ == "__main__":
    (ROOT / "nbs" / "api.md").write_text(api(), "utf-8")
