"README.md from nbs/index.ipynb, without Quarto: `python tests/readme.py`."

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent


def readme():
    "The README's text."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    for c in nb.cells:
        if c.cell_type == "code":
            c.source = (
                ""
                if "#| echo: false" in c.source
                else re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
            )
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"```\w*\n\s*```\n", "", text)  # a cell that shows only its output
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"\]\(images/", "](nbs/images/", text)
    return re.sub(r"\]\(([\w/]+\.(?:ipynb|md))", r"](nbs/\1", text).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), "utf-8")
