"The pages at the top of the sidebar as one page to print: `python tests/book.py FILE.html`."

import re
import sys
from html import escape
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter
from nbdev.config import get_config
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
PRINTED = """<style>
body { max-width: 52rem; margin: auto; padding: 1rem; }
pre, pre * { white-space: pre-wrap !important; overflow-wrap: anywhere; }
img { max-width: 100%; }
@media print { body { zoom: .75; } .page { break-before: page; } img { break-inside: avoid; } }
</style>"""


def spine():
    "Names of the pages that are in no section of the sidebar."
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))
    contents = site["website"]["sidebar"]["contents"]
    return [entry for entry in contents if isinstance(entry, str)]


def identifier(heading):
    "Pandoc's id of a heading."
    s = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    s = re.sub(r"[^\w\s.-]", "", s).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", s)) or "section"


def linked(text, name, pages):
    "Headings get the ids that links use; links to pages of the book lead into it, others to the site."
    config = get_config()

    def target(match):
        path, place = match[1] or name, (match[2] or "#")[1:]
        if path in pages:
            return f"](#{pages[path].get(place, path)})"
        page, place = path.rsplit(".", 1)[0], match[2] or ""
        return f"]({config.doc_host}{config.doc_baseurl}/{page}.html{place})"

    def marked(match):
        return f'<a id="{pages[name][identifier(match[2])]}"></a>\n\n{match[0]}'

    text = re.sub(r"^(#+) +(.+)$", marked, text, flags=re.M)
    return re.sub(r"\]\((?:([\w./-]+\.(?:ipynb|md))|(?=#))(#[^)\s]*)?\)", target, text)


def shown(cell, name, pages):
    "A cell as the site shows it; its directives become alt texts and a caption below."
    if cell.cell_type == "markdown":
        cell.source = linked(cell.source, name, pages)
        return [cell]
    said = dict(re.findall(r"^#\| *([\w-]+):? *(.*)$", cell.source, re.M))
    if "hide" in said:
        return []
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    if said.get("echo") == "false":
        cell.metadata["tags"] = ["output_only"]
    for output in cell.outputs:
        for kind, data in list(output.get("data", {}).items()):
            if kind == "text/markdown":
                output.data[kind] = linked(data, name, pages)
            if kind.startswith("image/"):  # with its alt text, which nbconvert leaves out
                alt = escape(said.get("fig-alt", "").strip('"'))
                output.data = {"text/html": f'<img alt="{alt}" src="data:{kind};base64,{data}">'}
    caption = said.get("fig-cap", "").strip('"')
    return [cell] + [nbformat.v4.new_markdown_cell(f"*{caption}*")] * bool(caption)


def book():
    "The book, an HTML page with its pictures in it."
    notebooks = {name: nbformat.read(ROOT / "nbs" / name, 4).cells for name in spine()}
    pages, cells = {}, []  # {page: {id on the site: id in the book}}
    for name, of_page in notebooks.items():
        said = "\n".join(c.source for c in of_page if c.cell_type == "markdown")
        ids = map(identifier, re.findall(r"^#+ +(.+)$", said, re.M))
        pages[name] = {i: f"{name}--{i}" for i in ids}
    for name, of_page in notebooks.items():
        mark = f'<div class="page" id="{name}"></div>'
        cells.append(nbformat.v4.new_markdown_cell(mark))
        for cell in of_page:
            cells += shown(cell, name, pages)
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={"output_only"}))
    exporter = HTMLExporter(
        config=config, embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    nb = nbformat.v4.new_notebook(cells=cells)
    about = dict(metadata=dict(name=get_config().title, path=str(ROOT / "nbs")))
    text, _ = exporter.from_notebook_node(nb, about)
    return text.replace("</head>", f"{PRINTED}</head>", 1)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(book(), "utf-8")
