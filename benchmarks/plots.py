"""Pictures of the studies for the guide: SVG whose bytes depend on the data alone. Needs the extra ``bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]

# Text stays text, and no date or random name goes in: the same data give the same file.
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "modicum"}
mpl.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}


def curves(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[Curve]]], *, x: str, y: str, log: bool = False
) -> None:
    """Draw one panel beside the other over a common vertical axis.

    Args:
        path: The SVG to write.
        panels: Title of each panel to its arms; an arm is drawn in one color, with one thin line for each seed.
        x: What the horizontal axis shows.
        y: What the vertical axis shows.
        log: Use logarithmic axes.
    """
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    arms = dict.fromkeys(arm for panel in panels.values() for arm in panel)
    colors = {arm: f"C{number}" for number, arm in enumerate(arms)}
    for axis, (title, panel) in zip(axes, panels.items()):
        for arm, seeds in panel.items():
            for number, (places, values) in enumerate(seeds):
                axis.plot(places, values, color=colors[arm], linewidth=0.9, label=arm if not number else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x)
        if log:
            axis.set_xscale("log")
            axis.set_yscale("log")
    axes[0].set_ylabel(y)
    axes[-1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
