"How the site shows a function or a class: its own source, without the bodies (`renderer` in settings.ini)."

import ast
import inspect
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from textwrap import dedent

from nbdev.config import get_config

from masked_ldm._modidx import d as exported

ROOT = Path(__file__).parent.parent
SHOWN = (
    "__init__",
    "__call__",
    "__len__",
    "__getitem__",
    "__iter__",
)  # of methods with underscores


def _head(lines, node):
    "Decorators and signature of a definition, with their comments."
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return lines[first - 1 : node.body[0].lineno - 1] or [lines[node.lineno - 1]]


def _said(lines, node):
    "The docstring as it stands there, or dots."
    first = node.body[0]
    if ast.get_docstring(node):
        return lines[first.lineno - 1 : first.end_lineno]
    return [" " * first.col_offset + "..."]


def _is_shown(node):
    if isinstance(node, ast.AnnAssign):
        return not node.target.id.startswith("_")
    named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
    return named and (not node.name.startswith("_") or node.name in SHOWN)


def outline(source):
    "(code, docstring): what a caller needs to see of the source of a function or a class."
    lines = dedent(source).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    code = _head(lines, node)
    parts = filter(_is_shown, node.body) if isinstance(node, ast.ClassDef) else ()
    for i, part in enumerate(parts):
        if isinstance(part, ast.AnnAssign):
            code += lines[part.lineno - 1 : part.end_lineno]
        else:
            code += [""] * (i > 0) + _head(lines, part) + _said(lines, part)
    if isinstance(node, ast.ClassDef) and not any(map(_is_shown, node.body)):
        code.append("    ...")
    return "\n".join(code).replace("`", ""), ast.get_docstring(node)


def _plain(sym):
    "The function of a property or of a decorated function."
    return getattr(sym, "fget", None) or inspect.unwrap(sym)


def _in_package(sym):
    "nbdev runs a page's cells in a shell, where nothing has a source: the same symbol of the package."
    if sym.__module__ != "__main__":
        return sym
    for module, names in exported["syms"].items():
        if f"{module}.{sym.__qualname__}" in names:
            found = _plain(attrgetter(sym.__qualname__)(import_module(module)))
            if found.__doc__ == sym.__doc__:  # a few names are in two modules
                return found
    raise LookupError(f"{sym.__qualname__} is in no module of masked_ldm: run nbdev_export")


class Signature:
    "What nbdev puts below a cell that exports something."

    def __init__(self, sym, name=None, title_level=3):
        self.sym = _in_package(_plain(sym))
        self.name = name or self.sym.__qualname__
        self.title_level = title_level

    def _repr_markdown_(self):
        lines, first = inspect.getsourcelines(self.sym)
        path = Path(inspect.getsourcefile(self.sym)).relative_to(ROOT).as_posix()
        code, docstring = outline("".join(lines))
        cfg = get_config(path=ROOT)
        source = f"{cfg.git_url}/blob/{cfg.branch}/{path}"
        link = f'[source]({source}#L{first}){{style="float:right; font-size:smaller"}}'
        title = f"{'#' * self.title_level} {self.name}"
        return f"---\n\n{link}\n\n{title}\n\n```python\n{code}\n```\n\n{docstring or ''}\n"
