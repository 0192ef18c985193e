"""The page around the sections: title, summary, style."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from modicum.report.runs import GROUP, RunView
from modicum.report.sections import Section, Stat, collect
from modicum.report.text import duration, is_number, phrase, plural

MOST_STATS = 4
MOST_NAMES = 4  # in a title


def render(run: RunView) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("modicum.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = collect(run)
    style = files("modicum.report").joinpath("style.css").read_text(encoding="utf-8")
    page = environment.get_template("page.html.j2").render(
        title=_title(run),
        subtitle=_subtitle(run),
        status=run.status,
        problems=_problems(run),
        stats=_stats(run, sections),
        findings=[finding for part in sections for finding in part.findings],
        notes=_notes(run),
        sections=sections,
        style=Markup(style),  # noqa: S704 - a file of this package
    )
    # JSON can hold halves of characters, which no file can.
    return page.encode("utf-8", "replace").decode("utf-8")


def _title(run: RunView) -> str:
    if run.job != GROUP:
        return run.name
    return phrase(view.name for view in run.stages) if len(run.stages) <= MOST_NAMES else plural(len(run.stages), "run")


def _subtitle(run: RunView) -> str:
    if run.job == GROUP:
        return f"{plural(len(run.stages), 'run')} side by side"
    jobs = list(dict.fromkeys(stage.job for stage in run.stages))
    return f"{run.job}: {phrase(jobs)}" if jobs else run.job


def _stats(run: RunView, sections: list[Section]) -> list[Stat]:
    found = [stat for part in sections for stat in part.stats][: MOST_STATS - 1]
    tops = run.stages if run.job == GROUP else (run,)
    seconds = [s for view in tops if is_number(s := view.record.get("seconds")) and s > 0]
    if seconds:
        stages = sum(not part.stages for part in run.walk())
        detail = _subtitle(run) if run.job == GROUP else plural(stages, "stage") if run.stages else run.job
        found.append(Stat("Time", duration(sum(seconds)), detail))
    return found


def _problems(run: RunView) -> list[tuple[str, str, str]]:
    """Say of every unfinished run what became of it: name, status, sentence."""
    found = []
    waiting = []
    for part in run.walk():
        # A pipeline fails with its stage's error; telling it twice helps nobody.
        if part.job == GROUP or part.status == "done" or any(s.status == part.status for s in part.stages):
            continue
        if part.status == "failed":
            found.append((part.name, "failed", str(part.record.get("error", "The record names no error."))))
        elif part.status == "interrupted":
            found.append((part.name, "interrupted", "Not finished. Run it again to go on."))
        elif part.status == "running":
            found.append((part.name, "running", "Not finished: still running, or interrupted. Run it again to go on."))
        else:
            waiting.append(part.name)
    if waiting:
        found.append((phrase(waiting), "waiting", "Not started."))
    return found


def _notes(run: RunView) -> list[tuple[str, list[str]]]:
    """Return each note once, with the runs that made it."""
    found: dict[str, list[str]] = {}
    for part in run.walk():
        for note in part.notes:
            found.setdefault(note, []).append(part.name)
    return list(found.items())
