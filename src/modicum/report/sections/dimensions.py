"""Several dimensions at once: methods with intervals and worst dimension, trade-offs, who helps or harms whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from markupsafe import Markup

from modicum.evaluate.intervals import Estimate
from modicum.report import dimensions as read_dimensions
from modicum.report.charts import Line, Scale, heat_map, line_chart
from modicum.report.dimensions import BASE, CONTINUAL, EXPERT, MERGE, MIXTURE, Arm, Table
from modicum.report.html import figure, fold, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, Stat, section
from modicum.report.text import change, measure, number, phrase, plain, plural

PLANES = 6  # pictures of two dimensions at most
NAMED = 6  # methods of a front that are named in a picture


@section(order=14)
def dimensions(run: RunView) -> Section | None:
    """Draw every grid that scores models on several dimensions."""
    found = [read for part in run.walk() if part.job == "grid" and (read := read_dimensions.read(part.folder))]
    if not found:
        return None
    body = Markup("").join(_one(each) for each in found)
    findings = [sentence for each in found for sentence in _findings(each)]
    best = _best(found[0], MERGE, MIXTURE, CONTINUAL)
    average = None if best is None else found[0].average(best)
    stats: tuple[Stat, ...] = ()
    if best is not None and average is not None:
        worst = found[0].worst(best)
        stats = (
            Stat(
                "Best balance", number(average.value), f"{best.name}; worst dimension {number(worst and worst.value)}"
            ),
        )
    return Section("Dimensions", body, findings=tuple(findings), stats=stats)


def _one(found: Table) -> Markup:
    parts = [_methods(found), _trade_offs(found), _collaboration(found), _against_mixtures(found), _paradigms(found)]
    return Markup("").join([*parts, _correlations(found), _lengths(found)])


def _told(found: Estimate | None, unit: str = "number") -> str | None:
    if found is None:
        return None

    def write(value: float) -> str:
        return measure(value, unit)

    if found.low is None or found.high is None:
        return write(found.value)
    return f"{write(found.value)} [{write(found.low)}, {write(found.high)}]"


def _methods(found: Table) -> Markup:
    rows = [
        [
            arm.name,
            arm.role,
            *(_told(arm.score(name), found.units[name]) for name in found.dimensions),
            _told(found.average(arm)),
            _told(found.worst(arm)),
            str(len(arm.scores)),
        ]
        for arm in _ranked(found, found.arms)
    ]
    header = ["Model", "Made by", *map(plain, found.dimensions), "Normalised average", "Worst dimension", "Seeds"]
    apart = [plain(name) for name in found.dimensions if name not in found.own]
    several = any(len(arm.scores) > 1 for arm in found.arms)
    intervals = (
        "intervals of Student's t over seeds, or over items where a dimension's scores are of one seed or all the same"
        if several
        else "intervals over items, for each dimension; of one seed, averages have none"
    )
    caption = (
        f"Higher is better; {intervals}. A normalised score is the share of that of the dimension's own expert. The "
        "average over dimensions hides what the worst one shows."
    )
    if apart and found.own:
        caption += f" No expert was trained for {phrase(apart)}, which no average holds."
    return Markup("<h3>Methods</h3>{}").format(figure(table(header, rows, texts=2), caption=caption))


def _ranked(found: Table, arms: Iterable[Arm]) -> list[Arm]:
    def rank(arm: Arm) -> tuple[bool, float]:
        average = found.average(arm)
        return average is None, -(average.value if average is not None else 0.0)

    return sorted(arms, key=rank)


def _best(found: Table, *roles: str) -> Arm | None:
    arms = [arm for arm in found.of_role(*roles) if found.average(arm) is not None]
    return next(iter(_ranked(found, arms)), None)


def _trade_offs(found: Table) -> Markup:
    front, volume = found.front()
    if not front:
        return Markup("")
    pictures = [_plane(found, *pair) for pair in list(combinations(found.dimensions, 2))[:PLANES]]
    told = "" if volume is None else f" The front's volume above the base's scores is {number(volume)}."
    text = (
        f"No other method beats {phrase([arm.name for arm in front])} in all dimensions at once.{told} In each picture "
        "the methods that no other beats in both of its dimensions are coloured and named; experts are faint."
    )
    return Markup("<h3>Trade-offs</h3>{}").format(figure(grid(pictures, wide=True), caption=text))


def _plane(found: Table, across: str, up: str) -> Markup:
    front, _ = found.front([across, up])
    named = {arm.name: color for color, arm in enumerate(front[:NAMED])}
    lines = []
    for arm in found.arms:
        x, y = arm.score(across), arm.score(up)
        if x is None or y is None:
            continue
        point = [(x.value, y.value)]
        if arm.name in named:
            lines.append(Line(point, named[arm.name], arm.name, style="dots"))
        else:
            lines.append(Line(point, 7, style="dots faint" if arm.role == EXPERT else "dots thin"))
    return line_chart(
        lines, title=plain(up), x_label=plain(across), whole=False,
        describe=f"{plain(up)} against {plain(across)} of every method.",
    )  # fmt: skip


def _collaboration(found: Table) -> Markup:
    matrix = found.matrix()
    if matrix is None:
        return Markup("")
    names, values, conflict = matrix
    words = [plain(name) for name in names]
    picture = heat_map(
        words, words, values, title="Gain of the expert (row) in each dimension (column)", x_label="dimension", every=1,
        scale=Scale.of([value for row in values for value in row], center=0.0),
        describe="How much of each dimension's own gain the experts of the others bring.",
    )  # fmt: skip
    rows = [[word, *map(number, row), number(harm, 2)] for word, row, harm in zip(words, values, conflict)]
    blank = [word for place, word in enumerate(words) if values[place][place] is None]
    told = f" Blank columns ({phrase(blank)}): their own expert gains nothing, as far as can be told." if blank else ""
    caption = (
        "1 is as much as the dimension's own expert gains on the base, 0 is nothing, and below 0 one dimension costs "
        f"another.{told} Conflict is the mean squared loss on the dimensions that an expert was not trained on."
    )
    numbers = table(["Expert", *words, "Conflict"], rows)
    return Markup("<h3>Collaboration and conflict</h3>{}").format(figure(picture, caption=caption, numbers=numbers))


def _against_mixtures(found: Table) -> Markup:
    mixtures, merges = found.of_role(MIXTURE), found.of_role(MERGE)
    rows = [
        [merge.name, mixture.name, change(gap.value, "number"), *_ends(gap), str(gap.n)]
        for merge in merges
        for mixture in mixtures
        if (gap := found.difference(merge, mixture)) is not None
    ]
    if not rows:
        return Markup("")
    caption = (
        "Normalised average of the merge minus that of the mixture, paired by seed. One seed gives no interval; "
        "several comparisons on one test set find a difference by chance now and then."
    )
    header = ["Merge", "Mixture", "Difference", "Low", "High", "Seeds"]
    return Markup("<h3>Merging against mixing</h3>{}").format(figure(table(header, rows, texts=2), caption=caption))


def _ends(gap: Estimate) -> tuple[str | None, str | None]:
    low, high = (None if end is None else change(end, "number") for end in (gap.low, gap.high))
    return low, high


def _paradigms(found: Table) -> Markup:
    continual = found.of_role(CONTINUAL)
    if not continual:
        return Markup("")
    rows = [
        [
            arm.name,
            "continual" if arm.role == CONTINUAL else "static",
            _told(found.average(arm)),
            _told(found.worst(arm)),
        ]
        for arm in _ranked(found, found.of_role(MERGE, MIXTURE, CONTINUAL))
    ]
    caption = (
        "Static: all experts from one base, merged once, or one run on mixed data. Continual: dimensions arrive one "
        "after another."
    )
    header = ["Model", "Paradigm", "Normalised average", "Worst dimension"]
    return Markup("<h3>Static and continual</h3>{}").format(figure(table(header, rows, texts=2), caption=caption))


def _correlations(found: Table) -> Markup:
    rows = [
        [plain(a), plain(b), number(value), number(low), number(high)]
        for a, b, value, low, high in found.correlations()
    ]
    if not rows:
        return Markup("")
    header = ["Dimension", "Dimension", "Rank correlation", "Low", "High"]
    return fold("Rank correlations of dimensions over all models", table(header, rows, texts=2))


def _lengths(found: Table) -> Markup:
    tasks = [name for name in found.dimensions if any(task == name for _, task in found.words)]
    if not tasks:
        return Markup("")
    rows = [
        [arm.name, *(number(found.words.get((arm.name, task))) for task in tasks)]
        for arm in found.arms
        if any((arm.name, task) in found.words for task in tasks)
    ]
    caption = "Words of an answer: a model that says less, or nothing, may score well for it."
    return Markup("<h3>Lengths</h3>{}").format(figure(table(["Model", *map(plain, tasks)], rows), caption=caption))


def _findings(found: Table) -> list[str]:
    merge, mixture, base = _best(found, MERGE), _best(found, MIXTURE), _best(found, BASE)
    said = []
    for what, arm in (("merge", merge), ("mixture", mixture)):
        if arm is None or (average := found.average(arm)) is None:
            continue
        worst = found.worst(arm)
        said.append(
            f"The best {what}, {arm.name}, keeps {measure(average.value, 'share')} of the experts' scores on average "
            f"and {measure(worst and worst.value, 'share')} in its worst dimension{_beside(found, base)}."
        )
    if merge is not None and mixture is not None and (gap := found.difference(merge, mixture)) is not None:
        several = f", each the best of {_counts(found)} by these very scores"
        chosen = several if len(found.of_role(MERGE)) + len(found.of_role(MIXTURE)) > 2 else ""
        said.append(f"{merge.name} minus {mixture.name}: {change(gap.value, 'number')}{_sure(gap)}{chosen}.")
    return said


def _counts(found: Table) -> str:
    return f"{plural(len(found.of_role(MERGE)), 'merge')} and {plural(len(found.of_role(MIXTURE)), 'mixture')}"


def _beside(found: Table, base: Arm | None) -> str:
    average = None if base is None else found.average(base)
    return "" if average is None else f" (the base: {measure(average.value, 'share')})"


def _sure(gap: Estimate) -> str:
    if gap.low is None or gap.high is None:
        return ", of one seed, which cannot tell whether it is chance"
    ends: Sequence[str] = [change(end, "number") for end in (gap.low, gap.high)]
    verdict = "" if gap.low > 0 or gap.high < 0 else ", not told from nothing"
    return f", paired by seed, interval {ends[0]} to {ends[1]}{verdict}"
