"nbs/api.md, module by module, from what nbdev exported: `python tests/api.py`."

import ast
import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@lru_cache(None)
def modules():
    "{module: dict(notebook, says, names: {public name: its anchor on the notebook's page, or ''})}, in the sidebar's order."
    listed, out = re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text()), {}
    syms = ast.literal_eval(
        (ROOT / "masked_ldm" / "_modidx.py").read_text().split("=", 1)[1].strip()
    )["syms"]
    for full, known in syms.items():
        tree = ast.parse(text := (ROOT / (full.replace(".", "/") + ".py")).read_text())
        (names,) = (
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
        )

        def anchor(name):
            return (
                "#" + known[f"{full}.{name}"][0].split("#")[1] if f"{full}.{name}" in known else ""
            )

        out[full.partition(".")[2]] = dict(
            notebook=re.search(r"File to edit: (?:\.\./)+nbs/(.+\.ipynb)", text)[1],
            says=ast.get_docstring(tree),
            names={n: anchor(n) for n in names},
        )
    return dict(sorted(out.items(), key=lambda kv: listed.index(kv[1]["notebook"])))


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
    (ROOT / "nbs" / "api.md").write_text(api())
