"""Pages made from the registries: a table of all methods, a page for each, and the fields of each job's recipe.

What is not registered does not appear, so these pages cannot promise what is not there.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from pydantic import BaseModel
from sphinx.application import Sphinx

from modicum import recipe
from modicum.knobs import documentation, plain, unpacked
from modicum.registry import REGISTRIES, Entry, Registry, job
from modicum.schema import fields

TITLES = {
    "merge_methods": "Merge methods",
    "expert_stores": "Stores of experts",
    "averagers": "Averaging checkpoints",
    "gradient_rules": "Gradient rules",
    "objectives": "Objectives",
    "adapter_inits": "Adapter initializations",
    "zeroth_order": "Zeroth-order optimizers",
    "models": "Models",
    "policies": "Policies for several agents",
    "attacks": "Attacks",
    "judges": "Judges",
    "measures": "Measures of models",
    "sources": "Data sources",
    "row_kinds": "Kinds of rows",
    "jobs": "Jobs",
}


def write_pages(app: Sphinx) -> None:
    """Write ``methods/``; runs before Sphinx looks for sources."""
    folder = Path(app.srcdir) / "methods"
    wanted = {folder / "index.md": _index()}
    for kind, table in REGISTRIES.items():
        if kind in TITLES:
            wanted |= {folder / f"{_page(kind, name)}.md": _method(table[name]) for name in table}
    for old in set(folder.glob("*.md")) - set(wanted):
        old.unlink()
    for path, text in wanted.items():
        # An unchanged file keeps its time, so that Sphinx does not read it again.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _page(kind: str, name: str) -> str:
    return f"{kind.replace('_', '-')}-{name.replace('_', '-')}"


def _index() -> str:
    lines = [
        "# Methods",
        "",
        "Everything that is registered in this version, made from the code itself; `modicum list` prints the same.",
        "Each page states the mathematics, the knobs with their ranges, the cost, and where the code departs from the",
        "paper.",
        "",
    ]
    pages = []
    for kind, title in TITLES.items():
        table: Registry = REGISTRIES[kind]
        if not len(table):
            continue
        lines += [f"## {title}", "", "| name | what it does | paper |", "|---|---|---|"]
        for name in table:
            entry = table[name]
            pages.append(_page(kind, name))
            lines.append(f"| [{name}]({pages[-1]}.md) | {_cell(entry.summary)} | {_paper(entry)} |")
        lines.append("")
    return "\n".join([*lines, "```{toctree}", ":hidden:", "", *pages, "```", ""])


def _method(entry: Entry) -> str:
    target = entry.function
    directive = "autoclass" if inspect.isclass(target) else "autofunction"
    facts = [f"{entry.noun.capitalize()}{f' · {_paper(entry)}' if entry.paper else ''}"]
    if entry.laws:
        facts.append(f"Laws held by tests: {', '.join(sorted(entry.laws)).replace('_', ' ')}.")
    keys = ["## Keys", _job(entry.name)] if entry.noun == job.noun else ["## Knobs", _fields(entry.schema)]
    parts = [f"# {entry.name}", *facts, *keys, "## Reference"]
    parts.append(f"```{{eval-rst}}\n.. {directive}:: {target.__module__}.{target.__qualname__}\n```")
    return "\n\n".join(parts) + "\n"


def _fields(schema: type[BaseModel]) -> str:
    """Return a table of the fields of ``schema``."""
    if not schema.model_fields:
        return "None."
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, kind, default, said in fields(schema):
        default = default if default in ("required", "its defaults") else f"`{default}`".replace("|", "\\|")
        rows.append(f"| `{name}` | {_cell(kind)} | {default} | {_cell(said)} |")
    return "\n".join(rows)


def _job(name: str) -> str:
    """Return a table of the keys of a job's recipe, and one for each of its sections."""
    schema = recipe.job_schema(name)
    parts = [_fields(schema)]
    for section, keys in recipe.sections(schema).items():
        said = plain(section.__doc__ or "").partition("\n")[0]
        parts.append(f"{', '.join(f'`{key}`' for key in keys)}: {_cell(said)}")
        parts.append(_fields(section))
    return "\n\n".join(parts)


def _paper(entry: Entry) -> str:
    paper = entry.paper or ""
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper.startswith("arXiv:") else paper


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def explain_shared_knobs(_app: Sphinx, _kind: str, _name: str, target: Any, _options: Any, lines: list[str]) -> None:
    """Explain unpacked keywords in the docstring of a function or class that takes them."""
    if (inspect.isfunction(target) or inspect.isclass(target)) and unpacked(target):
        lines[:] = documentation(target).splitlines()


class JobFields(Directive):
    """``{job} NAME`` shows the keys of the recipe of a job, those of its sections included."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the table as Markdown in place."""
        name = self.arguments[0]
        container = nodes.container()
        lines = _job(name).splitlines()
        self.state.nested_parse(StringList(lines, f"job {name}"), self.content_offset, container)
        return container.children


class Available(Directive):
    """``{available} KIND NAME`` says whether this version has a method, and links to it."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Parse the sentence as Markdown in place."""
        kind, name = self.arguments
        known = name in REGISTRIES[kind]
        sentence = (
            f"*In this version:* [{name}](methods/{_page(kind, name)}.md)"
            if known
            else f"*Planned:* `{name}` is not part of this version."
        )
        container = nodes.container()
        self.state.nested_parse(StringList([sentence], "availability"), self.content_offset, container)
        return container.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", explain_shared_knobs, priority=400)  # before sections become fields
    app.add_directive("job", JobFields)
    app.add_directive("available", Available)
    return {"version": "1", "parallel_read_safe": True}
