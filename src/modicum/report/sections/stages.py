"""The course of things: which stage did what, in which order, and for how long."""

from __future__ import annotations

from markupsafe import Markup

from modicum.report.runs import GROUP, RunView
from modicum.report.sections import Section, section
from modicum.report.text import duration, is_number


@section(order=80)
def stages(run: RunView) -> Section | None:
    """Draw the stages as bars along the time that they took together."""
    parts = [part for part in run.walk() if not part.stages]
    if len(parts) < 2:
        return None
    # Runs given side by side have no common clock: each begins at zero.
    lanes = run.stages if run.job == GROUP else (run,)
    firsts = {next(part for part in lane.walk() if not part.stages).folder for lane in lanes}
    total = max(sum(_seconds(part) for part in lane.walk() if not part.stages) for lane in lanes) or 1.0
    rows = []
    before = 0.0
    for part in parts:
        took = _seconds(part)
        before = 0.0 if part.folder in firsts else before
        rows.append(
            Markup(
                '<tr class="{status}"><th scope="row">{name}</th><td>{job}</td>'
                '<td class="bar"><div><i style="left:{left:.2f}%;width:{width:.2f}%"></i></div></td>'
                '<td class="number">{took}</td><td><span class="status {status}">{status}</span></td></tr>'
            ).format(
                status=part.status,
                name=part.name,
                job=part.job,
                left=100 * before / total,
                width=100 * took / total,
                took=duration(part.record.get("seconds")),
            )
        )
        before += took
    return Section(
        "Course",
        Markup(
            '<div class="scroll"><table class="course"><thead><tr><th scope="col">Stage</th><th scope="col">Job</th>'
            '<th scope="col" class="bar">Time</th><th scope="col"><span class="unseen">Duration</span></th>'
            '<th scope="col">Status</th></tr></thead><tbody>{}</tbody></table></div>'
        ).format(Markup("").join(rows)),
    )


def _seconds(part: RunView) -> float:
    value = part.record.get("seconds")
    return float(value) if is_number(value) else 0.0
