"""Moving pictures of agents and targets: SVG that moves by itself, without script or network, and GIF."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

SIDE = 1000  # of the square in which everything is drawn
SECONDS = 14.0  # of one run through
LINKS = 80  # most links of the communication graph that are drawn
Point = Sequence[float]


def animate(
    frames: Sequence[Mapping[str, Any]], *, radius: float, links: Iterable[Sequence[int]], title: str
) -> Markup:
    """Draw a film as one SVG picture that repeats for ever.

    Args:
        frames: For each picture the positions of ``agents`` and ``targets``, and which agent watches each target.
        radius: Radius of the disk.
        links: Pairs of agents who talk to each other.
        title: What the film shows, for those who do not see it.
    """
    if not frames:
        return Markup("")
    agents = [[_place(frame["agents"][i], radius) for frame in frames] for i in range(len(frames[0]["agents"]))]
    targets = [[_place(frame["targets"][j], radius) for frame in frames] for j in range(len(frames[0]["targets"]))]
    pairs = [(i, j) for i, j in links if i < j]
    wires = Markup("").join(_line(agents[i], agents[j], "wire") for i, j in (pairs if len(pairs) <= LINKS else ()))
    watching = Markup("").join(
        _line([agents[frame["watched_by"][j]][t] for t, frame in enumerate(frames)], target, "watch")
        for j, target in enumerate(targets)
    )
    dots = Markup("").join(_dot(track, "target", 9) for track in targets)
    squares = Markup("").join(_dot(track, "agent", 13) for track in agents)
    return Markup(
        '<svg class="film" viewBox="0 0 {0} {0}" role="img" aria-label="{1}">'
        '<circle class="edge" cx="{2}" cy="{2}" r="{3}"/>{4}{5}{6}{7}</svg>'
    ).format(SIDE, title, SIDE // 2, SIDE // 2 - 14, wires, watching, dots, squares)


def _place(point: Point, radius: float) -> tuple[int, int]:
    scale = (SIDE / 2 - 30) / radius
    return round(SIDE / 2 + scale * point[0]), round(SIDE / 2 - scale * point[1])


def _dot(track: Sequence[tuple[int, int]], kind: str, size: int) -> Markup:
    x, y = zip(*track)
    return Markup('<circle class="{}" r="{}" cx="{}" cy="{}">{}{}</circle>').format(
        kind, size, x[0], y[0], _moves("cx", x), _moves("cy", y)
    )


def _line(start: Sequence[tuple[int, int]], end: Sequence[tuple[int, int]], kind: str) -> Markup:
    (x1, y1), (x2, y2) = zip(*start), zip(*end)
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}">{}{}{}{}</line>').format(
        kind, x1[0], y1[0], x2[0], y2[0],
        _moves("x1", x1), _moves("y1", y1), _moves("x2", x2), _moves("y2", y2),
    )  # fmt: skip


def _moves(what: str, values: Sequence[int]) -> Markup:
    if len(set(values)) == 1:
        return Markup("")
    return Markup('<animate attributeName="{}" dur="{:g}s" repeatCount="indefinite" values="{}"/>').format(
        what, SECONDS, ";".join(map(str, values))
    )


def write_gif(
    path: Path, frames: Sequence[Mapping[str, Any]], *, radius: float, links: Iterable[Sequence[int]], size: int = 420
) -> None:
    """Write a film as a GIF; needs pillow. Equal frames give equal bytes.

    Args:
        path: The file.
        frames: See :func:`animate`.
        radius: Radius of the disk.
        links: Pairs of agents who talk to each other.
        size: Pixels of a side.
    """
    from PIL import Image, ImageDraw

    zoom, pairs = size / SIDE, [(i, j) for i, j in links if i < j]
    pictures = []
    for frame in frames:
        picture = Image.new("RGB", (size, size), "#ffffff")
        draw = ImageDraw.Draw(picture)
        agents, targets = (
            [tuple(part * zoom for part in _place(point, radius)) for point in frame[name]]
            for name in ("agents", "targets")
        )
        draw.ellipse([6, 6, size - 6, size - 6], outline="#c9cfd5")
        for i, j in pairs if len(pairs) <= LINKS else ():
            draw.line([agents[i], agents[j]], fill="#e3e6e9")
        for target, agent in zip(targets, frame["watched_by"]):
            draw.line([target, agents[agent]], fill="#9cc3e6")
        for points, half, colour in ((targets, 4, "#d55e00"), (agents, 5, "#0072b2")):
            for x, y in points:
                draw.ellipse([x - half, y - half, x + half, y + half], fill=colour)
        pictures.append(picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=16))
    beside = path.with_name(f".{path.name}.partial")
    milliseconds = round(1000 * SECONDS / len(pictures))
    pictures[0].save(
        beside, format="GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=False
    )
    beside.replace(path)
