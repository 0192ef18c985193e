"""The log of a clipper: which tensors were clipped when, in a file of JSON lines that a report reads without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.record import read_lines

if TYPE_CHECKING:
    import torch

    from modicum.optim.gradient.clipper import Clipped, NormClipper

LOG = "clipping.jsonl"


class ClippingLog:
    """Write norms, thresholds and clip rates to a file of JSON lines, reading the device only when it is flushed.

    The first line names the tensors. A line with ``norm`` holds norms, thresholds and factors of one step; a line with
    ``clip_rate`` the share of steps, since the last such line, in which each tensor was clipped.

    Args:
        path: The file. Its lines about steps beyond ``after`` are dropped, because these steps are done again.
        clipper: The clipper to watch.
        every: Steps between two lines with norms.
        after: Steps done already.
    """

    def __init__(self, path: Path, clipper: NormClipper, *, every: int = 10, after: int = 0) -> None:
        self.path, self.every, self.step = path, every, after
        self._rows: list[tuple[int, torch.Tensor]] = []
        self._clipped: torch.Tensor | None = None
        self._since = after
        head = json.dumps({"names": clipper.units, "every": every})
        kept = [line for line in read_lines(path) if line.get("step", math.inf) <= after]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([head, *map(json.dumps, kept)]) + "\n", encoding="utf-8")
        clipper.observer = self.observe

    def observe(self, clipped: Clipped) -> None:
        """Remember one step, on the device."""
        import torch

        self.step += 1
        touched = (clipped.factors < 1).float()
        self._clipped = touched if self._clipped is None else self._clipped + touched
        if self.step % self.every == 0 or self.step == 1:
            missing = torch.full_like(clipped.norms, math.nan)
            limits = missing if clipped.thresholds is None else clipped.thresholds
            self._rows.append((self.step, torch.stack([clipped.norms, limits, clipped.factors])))

    def flush(self) -> None:
        """Write the remembered steps."""
        if self._clipped is None:
            return
        lines: list[dict[str, Any]] = []
        for step, values in self._rows:
            norm, threshold, factor = (_numbers(row) for row in values.tolist())
            lines.append({"step": step, "norm": norm, "threshold": threshold, "factor": factor})
        rate = (self._clipped / (self.step - self._since)).tolist()
        lines.append({"step": self.step, "steps": self.step - self._since, "clip_rate": _numbers(rate)})
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self._rows, self._clipped, self._since = [], None, self.step


def read_clipping_log(folder: str | Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the tensors and the lines of ``clipping.jsonl``; nothing where there is no such file."""
    lines = read_lines(Path(folder) / LOG)
    names: list[str] = next((line["names"] for line in lines if "names" in line), [])
    return names, [line for line in lines if "step" in line]


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]
