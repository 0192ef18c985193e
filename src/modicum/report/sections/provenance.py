"""How to get the same again: recipe, inputs, outputs, versions and machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from markupsafe import Markup

from modicum.report.html import fold, table
from modicum.report.runs import GROUP, RunView
from modicum.report.sections import Section, section
from modicum.report.text import number


@section(order=90)
def provenance(run: RunView) -> Section | None:
    """Show where everything came from; a fact that all runs share is shown once."""
    tops = run.stages if run.job == GROUP else (run,)
    environments: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for part in run.walk():
        environment = part.record.get("environment")
        if isinstance(environment, Mapping):
            environments.setdefault(repr(environment), (environment, []))[1].append(part.name)
    body = [_inventory(run)]
    for environment, names in environments.values():
        body.append(_environment(environment, ", ".join(names) if len(environments) > 1 else ""))
    for part in tops:
        if part.recipe:
            text = yaml.safe_dump(dict(part.recipe), sort_keys=False, allow_unicode=True)
            body.append(fold(f"Recipe of {part.name}", Markup("<pre><code>{}</code></pre>").format(text)))
    return Section("How it was made", Markup("").join(body))


def _inventory(run: RunView) -> Markup:
    rows = []
    for part in run.walk():
        if part.job == GROUP:
            continue
        outputs = part.record.get("outputs")
        made = ", ".join(map(str, outputs.values())) if isinstance(outputs, Mapping) else ""
        rows.append([part.name, part.job, made or "–", number(part.recipe.get("seed")), part.record.get("hash", "–")])
    return table(["Run", "Job", "Made", "Seed", "Hash"], rows, texts=3)


def _environment(environment: Mapping[str, Any], names: str) -> Markup:
    return Markup("<dl>{}</dl>").format(
        Markup("").join(
            Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(*item) for item in _facts(environment, names)
        )
    )


def _facts(environment: Mapping[str, Any], names: str) -> Iterator[tuple[str, str]]:
    if names:
        yield "Runs", names
    cpus = environment.get("cpus")
    processor = str(environment.get("processor") or "")
    yield "Machine", f"{processor}{', ' if processor else ''}{cpus or '?'} cores"
    if environment.get("platform"):
        yield "System", str(environment["platform"])
    if environment.get("python"):
        yield "Python", str(environment["python"])
    versions = environment.get("versions")
    for name, version in versions.items() if isinstance(versions, Mapping) else ():
        yield str(name), str(version)
