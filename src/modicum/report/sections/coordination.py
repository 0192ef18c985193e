"""Agents that choose together: a film, utility by round, a table with paired differences, and who talks to whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from modicum.borders import loads
from modicum.evaluate.intervals import mean
from modicum.report.axes import Point
from modicum.report.charts import COLORS, Line, finite, line_chart
from modicum.report.film import animate
from modicum.report.html import figure, fold, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, Stat, section
from modicum.report.text import MINUS, number, plural

FILMS = 3  # how many are shown at most
BANDS = 6  # more policies than this in a picture hide each other's bands
WEIGHTS = 4  # how many pictures of weights are shown at first
Cell = Mapping[str, Any]


@section(order=45)
def coordination(run: RunView) -> Section | None:
    """Draw every comparison of policies."""
    found = [(part, results) for part in run.walk() if part.job == "coordinate" and (results := _results(part))]
    if not found:
        return None
    body = Markup("").join(_one(part, results) for part, results in found)
    findings = [sentence for _, results in found for sentence in _findings(results)]
    best = max(found[0][1]["cells"], key=lambda cell: (cell["policy"] != "oracle_greedy", _mean(cell["utility"])))
    stat = Stat("Best utility", number(_mean(best["utility"])), f"{best['label']}, {best['graph']}")
    return Section("Coordination", body, findings=tuple(findings), stats=(stat,))


def _results(run: RunView) -> dict[str, Any] | None:
    try:
        found = loads((run.folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("cells") else None


def _one(run: RunView, results: Mapping[str, Any]) -> Markup:
    charts = grid(
        (_chart(results["cells"], graph, what) for what in ("worlds", "regret") for graph in results["graphs"]),
        wide=True,
    )
    course = figure(
        charts,
        caption="Means over the worlds; where there are few policies, with bands of their 95 % intervals. Regret is "
        "what the best moves of all rounds so far, from the places that a policy had reached, would have had more.",
    )
    parts = (_films(run, results), course, _weights(results), _table(results), _graphs(results), _tuning(results))
    return Markup("").join(parts)


def _films(run: RunView, results: Mapping[str, Any]) -> Markup:
    try:
        scene = loads((run.folder / "frames.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Markup("")
    films = [one for one in scene.get("films", ()) if one.get("frames")]
    # Learners first, then what they are measured by.
    order = {"ma_spl": 0, "ma_osma": 1, "last_greedy": 2, "random": 3}
    films.sort(key=lambda one: order.get(one["label"].partition(",")[0], 9))
    chosen: list[Any] = []
    for one in films:
        if one["label"].partition(",")[0] not in {other["label"].partition(",")[0] for other in chosen}:
            chosen.append(one)
    pictures = []
    for one in chosen[:FILMS]:
        name = f"{one['label']}, {one['graph']}"
        links = results["graphs"][one["graph"]]["links"]
        drawn = animate(one["frames"], radius=scene["radius"], links=links, title=f"Agents and targets under {name}")
        pictures.append(Markup('<div><p class="axis-title">{}</p>{}</div>').format(name, drawn))
    if not pictures:
        return Markup("")
    caption = (
        "Blue: agents; orange: targets; a line joins each target to the agent that is nearest to it. Grey lines, where "
        "there are few, join agents that talk to each other."
    )
    return figure(grid(pictures), caption=caption)


def _chart(cells: Sequence[Cell], graph: str, what: str) -> Markup:
    """Draw the utility of each round, or the regret so far."""
    lines = []
    shown = [cell for cell in cells if cell["graph"] == graph and isinstance(cell.get("course"), Mapping)]
    shown = [cell for cell in shown if what in cell["course"]]
    if not shown:
        return Markup("")
    name = "Utility" if what == "worlds" else "Regret"
    for color, cell in enumerate(shown):
        worlds = cell["course"][what]
        rounds = [float(t) for t in cell["course"]["rounds"]]
        middles = [mean(values) for values in zip(*worlds)]
        points = [(t, finite(one.value)) for t, one in zip(rounds, middles)]
        band: list[Point] = []
        if len(worlds) > 1 and len(shown) <= BANDS:
            least = min(0.0, *(min(values) for values in worlds))  # an interval's end below 0 means nothing
            band = [(t, finite(one.high)) for t, one in zip(rounds, middles)]
            band += [(t, max(least, one.low or 0.0)) for t, one in zip(reversed(rounds), reversed(middles))]
        final = _mean(cell["utility"]) if what == "worlds" else middles[-1].value
        lines.append(Line(points, color, cell["label"], number(final), band=band))
    return line_chart(
        lines, title=f"{name}, {graph} graph", x_label="round", from_zero=True,
        describe=f"{name} by round of each policy over the {graph} graph.",
    )  # fmt: skip


def _weights(results: Mapping[str, Any]) -> Markup:
    """Draw how often each domain was chosen, by round: a picture for each variant of a selection of data."""
    names = results.get("domains")
    cells = [cell for cell in results["cells"] if isinstance(cell.get("choices"), Mapping)]
    if not names or not cells:
        return Markup("")
    first = cells[0]["graph"]
    cells.sort(key=lambda cell: (cell["graph"] != first, bool(cell["hint"])))
    shares = [[sum(row) for row in cell["choices"]["shares"]] for cell in cells]
    # Of many domains those are drawn that are chosen most, the same in all pictures.
    most = sorted(range(len(names)), key=lambda d: -sum(row[d] for row in shares))[:COLORS]
    drawn = [_weights_of(cell, names, sorted(most)) for cell in cells]
    left = len(names) - len(most)
    caption = "Share of all workers' choices, in all worlds together, in stretches of rounds." + (
        f" Left out: {plural(left, 'domain')} chosen less." if left else ""
    )
    rest = (
        fold(f"{plural(len(drawn) - WEIGHTS, 'further picture')}", grid(drawn[WEIGHTS:], wide=True))
        if drawn[WEIGHTS:]
        else ""
    )
    return figure(grid(drawn[:WEIGHTS], wide=True), caption=caption) + rest


def _weights_of(cell: Cell, names: Sequence[str], shown: Sequence[int]) -> Markup:
    rounds, shares = cell["choices"]["rounds"], cell["choices"]["shares"]
    lines = [
        Line(
            [(float(t), finite(share)) for t, share in zip(rounds, shares[d])],
            color,
            names[d],
            number(shares[d][-1], 2),
        )
        for color, d in enumerate(shown)
    ]
    title = f"Domains under {cell['label']}, {cell['graph']} graph"
    return line_chart(
        lines, title=title, x_label="round", from_zero=True,
        describe=f"How often each domain was chosen, by round, under {cell['label']} over the {cell['graph']} graph.",
    )  # fmt: skip


def _table(results: Mapping[str, Any]) -> Markup:
    differences = {(d["graph"], d["label"]): d for d in results.get("differences", ())}
    rows = []
    for cell in results["cells"]:
        difference = differences.get((cell["graph"], cell["label"]))
        rounds = cell.get("rounds") or 1
        rows.append(
            [
                cell["label"],
                cell["graph"],
                f"{cell.get('knob', '')} {number(cell['step'])}".strip() if cell.get("step") is not None else None,
                _with_spread(cell["utility"]),
                f"{_mean(cell['ratio']):.1%}" if cell.get("ratio") else None,
                _interval(difference) if difference else None,
                f"{cell['bytes'] / rounds / 1e3:.1f} kB" if cell.get("bytes") else None,
                number(round(cell["evaluations"] / rounds)),
            ]
        )
    first = results["cells"][0]["label"]
    header = ["Policy", "Graph", "Step", "Utility", "Of the best move", f"Less {first}", "Sent a round", "Evaluations"]
    drawn = table(header, rows, texts=2, caption="Mean utility by world, and paired differences with 95 % intervals")
    exact = {cell.get("optimum") for cell in results["cells"]} == {"exact"}
    best = "the best of all joint moves" if exact else "a greedy that sees the objective"
    note = (
        f"Of the best move: utility over what {best} would have had in that round, from the places that this policy "
        "had reached. It says how good a policy's moves are, not how good its places are."
    )
    return figure(drawn, caption=note)


def _graphs(results: Mapping[str, Any]) -> Markup:
    agents = len(results.get("blocks", ()))
    pictures = []
    for name, graph in results["graphs"].items():
        places = [
            (round(50 + 42 * math.sin(2 * math.pi * i / agents)), round(50 - 42 * math.cos(2 * math.pi * i / agents)))
            for i in range(agents)
        ]
        wires = Markup("").join(
            Markup('<line class="wire" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(*places[i], *places[j])
            for i, j in graph["links"]
            if i < j
        )
        dots = Markup("").join(Markup('<circle class="agent" r="2.4" cx="{}" cy="{}"/>').format(*p) for p in places)
        pictures.append(
            Markup(
                '<div><p class="axis-title">{}: β = {}</p><svg class="film small" viewBox="0 0 100 100" role="img" '
                'aria-label="The {} graph">{}{}</svg></div>'
            ).format(name, number(graph["beta"]), name, wires, dots)
        )
    caption = "Who talks to whom. β is what one average leaves of a disagreement; at 0 all agree at once."
    return figure(grid(pictures), caption=caption)


def _tuning(results: Mapping[str, Any]) -> Markup:
    tuned = [cell for cell in results["cells"] if isinstance(cell.get("tuning"), Mapping)]
    if not tuned:
        return Markup("")
    # Policies with a grid of their own have a table of their own.
    grids = {tuple(cell["tuning"]): [] for cell in tuned}  # type: dict[tuple[str, ...], list[Cell]]
    for cell in tuned:
        grids[tuple(cell["tuning"])].append(cell)
    caption = "Utility by step, on worlds of their own"
    tables = [
        table(
            ["Policy", "Graph", *steps],
            [[cell["label"], cell["graph"], *(number(cell["tuning"][step]) for step in steps)] for cell in cells],
            texts=2,
            caption=caption if "-1" not in steps else "Utility by favourite (-1: none), on worlds of their own",
        )
        for steps, cells in grids.items()
    ]
    return fold("Steps", Markup("").join(tables))


def _findings(results: Mapping[str, Any]) -> list[Markup]:
    cells = [cell for cell in results["cells"] if cell["policy"] not in ("oracle_greedy",)]
    ranked = sorted(cells, key=lambda cell: -_mean(cell["utility"]))
    found = [
        Markup("<b>{}</b> ({} graph) had the highest utility, {}.").format(
            ranked[0]["label"], ranked[0]["graph"], number(_mean(ranked[0]["utility"]))
        )
    ]
    local = [cell for cell in ranked if cell["policy"] in ("ma_spl", "ma_osma", "ma_osea", "rag")]
    central = [cell for cell in ranked if cell["policy"] == "last_greedy"]
    if local and central:
        share = _mean(local[0]["utility"]) / _mean(central[0]["utility"])
        found.append(
            Markup("<b>{}</b> ({} graph), which talks to neighbours alone, reached {} of the central {}.").format(
                local[0]["label"], local[0]["graph"], f"{share:.0%}", central[0]["label"]
            )
        )
    return found


def _with_spread(values: Sequence[float]) -> str:
    middle = _mean(values)
    if len(values) < 2:
        return number(middle)
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))
    return f"{number(middle)} ± {number(spread, 2)}"


def _interval(difference: Mapping[str, Any]) -> str:
    value = f"{'+' if difference['value'] >= 0 else ''}{number(difference['value'])}"
    if difference.get("low") is None:
        return value
    return f"{value} [{number(difference['low'])}, {number(difference['high'])}]".replace("-", MINUS)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
