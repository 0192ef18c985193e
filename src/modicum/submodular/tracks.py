"""Tracks of real or simulated targets: from CSV files (x, y, or latitude and longitude), and from Stone Soup."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modicum.borders import check_plain, expanded
from modicum.errors import CheckpointError, MissingExtraError, RecipeError, did_you_mean
from modicum.random import derive_seed

# Names that AIS and ADS-B files use.
NAMES = {
    "time": ("time", "t", "timestamp", "basedatetime"),
    "id": ("id", "mmsi", "icao24", "track", "target"),
    "x": ("x", "easting"),
    "y": ("y", "northing"),
    "lat": ("lat", "latitude", "latitude_degrees"),
    "lon": ("lon", "lng", "longitude", "longitude_degrees"),
}
EARTH = 6_371_008.8  # metres, mean radius
MOST = 50_000_000  # positions, 800 MB
FARTHEST = 1e15  # seconds and units of length, whose differences are still exact to a unit
RANGES = {"lat": (-90.0, 90.0), "lon": (-180.0, 360.0)}  # AIS writes 91 and 181 where nothing is known


def read_tracks(
    path: str | Path,
    *,
    step: float = 10.0,
    max_gap: float = 600.0,
    fit: float | None = None,
    start: float | None = None,
    duration: float | None = None,
    incomplete: Literal["refuse", "leave_out"] = "refuse",
) -> Tensor:
    """Read tracks from a CSV file and interpolate them to even rounds.

    Args:
        path: A file with a header: time (seconds, or ISO 8601, in UTC where it names no zone), an identity (``id``,
            ``MMSI``, ``icao24``), and either ``x, y`` in units of length or ``lat, lon`` in degrees, which become
            metres from their middle.
        step: Seconds of a round.
        max_gap: A track with a longer gap in the common time is not complete.
        fit: Shift and scale all positions into a disk of this radius.
        start: Seconds after the first report at which the rounds begin; the first time that all tracks share where not
            given.
        duration: Seconds of all rounds; as long as all tracks last where not given.
        incomplete: What is done with a track that has a gap, or does not last from the first round to the last.

    Returns:
        Positions, (rounds, targets, 2) in float64.

    Raises:
        CheckpointError: The file cannot be read.
        RecipeError: A column is missing, a value is no number, or a track is not complete, or none is.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write("time,id,x,y\\n0,a,0,0\\n20,a,2,4\\n")
        ...     file.flush()
        ...     read_tracks(file.name, step=10)[:, 0].tolist()
        [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
    """
    if not step > 0:
        raise RecipeError(f"step is {step}, expected a number of seconds above 0.")
    reports = _reports(expanded(path))
    first = min(times[0] for times, _ in reports.values())
    begin = max(times[0] for times, _ in reports.values()) if start is None else first + start
    end = min(times[-1] for times, _ in reports.values()) if duration is None else begin + duration
    if end < begin:
        late = max(reports, key=lambda name: reports[name][0][0])
        early = min(reports, key=lambda name: reports[name][0][-1])
        raise RecipeError(
            f"{path}: track {early} ends before track {late} begins. Give start and duration, or leave one of them out."
        )
    count = (end - begin) / step
    if count * len(reports) > MOST:
        raise RecipeError(
            f"{path}: {end - begin:.4g} s in rounds of {step:g} s are {count:.3g} positions of each of {len(reports)} "
            f"tracks, expected at most {MOST:,} in all. Narrow start and duration, or raise step."
        )
    moments = begin + step * np.arange(math.floor(count + 1e-9) + 1)
    positions = []
    for name, (times, places) in reports.items():
        fault = _fault(times - first, begin - first, end - first, max_gap)
        if fault and incomplete == "refuse":
            raise RecipeError(f"{path}: track {name} {fault}, or leave it out (incomplete: leave_out).")
        if fault:
            continue
        positions.append(np.stack([np.interp(moments, times, places[:, axis]) for axis in (0, 1)], -1))
    if not positions:
        raise RecipeError(
            f"{path}: none of {len(reports)} tracks is complete from {begin - first:g} s to {end - first:g} s."
        )
    found = np.stack(positions, 1)
    if fit is not None:
        middle = (found.reshape(-1, 2).max(0) + found.reshape(-1, 2).min(0)) / 2
        found = found - middle
        reach = float(np.linalg.norm(found, axis=-1).max())
        found = found * (fit / reach if reach else 1.0)
    return torch.from_numpy(found)


def _fault(times: Any, begin: float, end: float, max_gap: float) -> str | None:
    """Say what a track lacks between two moments, and what may help."""
    if times[0] > begin + 1e-9 or times[-1] < end - 1e-9:
        return f"covers {times[0]:g} s to {times[-1]:g} s, expected {begin:g} s to {end:g} s. Narrow start and duration"
    gaps = np.where((times[1:] > begin) & (times[:-1] < end), np.diff(times), 0)
    if len(gaps) and gaps.max() > max_gap:
        place = int(gaps.argmax())
        return f"has a gap of {gaps[place]:g} s after {times[place]:g} s, expected at most {max_gap:g} s. Raise max_gap"
    return None


def _reports(path: Path) -> dict[str, tuple[Any, Any]]:
    """Return times and places of each track, in order of time."""
    check_plain(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"Cannot read {path}: {str(error).rstrip('.')}. Expected CSV with a header.") from None
    if len(rows) < 2:
        raise RecipeError(f"{path} has {len(rows)} lines, expected a header and reports.")
    header = [name.strip().lower() for name in rows[0]]
    column = {role: header.index(name) for role, names in NAMES.items() for name in names if name in header}
    flat = {"x", "y"} <= column.keys()
    for role in ("time", "id", *(() if flat else ("lat", "lon"))):
        if role not in column:
            raise RecipeError(
                f"{path} has no column {role!r} (or {', '.join(NAMES[role][1:])}), expected time, id, and x, y or lat, "
                f"lon. {did_you_mean(role, header)}"
            )
    axes = ("x", "y") if flat else ("lat", "lon")
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) < len(header):
            raise RecipeError(f"{path}, line {number}: {len(row)} values for {len(header)} columns.")
        moment = _seconds(row[column["time"]], f"{path}, line {number}")
        place = tuple(_number(row[column[axis]], axis, f"{path}, line {number}") for axis in axes)
        found.setdefault(row[column["id"]].strip(), {})[moment] = (place[0], place[1])
    tracks = {
        name: (np.array(sorted(reports)), np.array([reports[moment] for moment in sorted(reports)]))
        for name, reports in found.items()
    }
    if flat:
        return tracks
    every = np.concatenate([places for _, places in tracks.values()])
    lat, anchor = every.mean(0)[0], every[0, 1]
    lon = anchor + _degrees(every[:, 1] - anchor).mean()
    return {name: (times, _metres(places, lat, lon)) for name, (times, places) in tracks.items()}


def _metres(places: Any, lat: float, lon: float) -> Any:
    """Return metres east and north of a point; good to 0.1 % within some 100 km."""
    degree = math.pi / 180 * EARTH
    east = _degrees(places[:, 1] - lon) * degree * math.cos(math.radians(lat))
    return np.stack([east, (places[:, 0] - lat) * degree], -1)


def _degrees(turns: Any) -> Any:
    """Return differences of longitudes the short way round, also across the date line."""
    return (turns + 180) % 360 - 180


def _seconds(text: str, where: str) -> float:
    try:
        found = float(text)
        if abs(found) < FARTHEST:
            return found
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        raise RecipeError(f"{where}: time is {text!r:.40}, expected seconds or an ISO 8601 moment.") from None


def _number(text: str, axis: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < FARTHEST:
        raise RecipeError(f"{where}: {axis} is {text!r:.40}, expected a number.")
    low, high = RANGES.get(axis, (-FARTHEST, FARTHEST))
    if not low <= value <= high:
        raise RecipeError(f"{where}: {axis} is {text!r:.40}, expected degrees from {low:g} to {high:g}.")
    return value


def from_stone_soup(paths: Iterable[Any], *, mapping: Sequence[int] = (0, 2), fit: float | None = None) -> Tensor:
    """Return the positions of Stone Soup's ground truth paths.

    Args:
        paths: Ground truth paths that all have as many states.
        mapping: Where the two coordinates stand in a state.
        fit: Shift and scale all positions into a disk of this radius.

    Returns:
        Positions, (rounds, targets, 2).

    Raises:
        RecipeError: There is none, or some end earlier than others.
    """
    found = [[[float(state.state_vector[axis]) for axis in mapping] for state in path] for path in paths]
    if not found or len({len(track) for track in found}) != 1:
        raise RecipeError(f"paths have {sorted({len(track) for track in found})} states, expected as many in each.")
    tracks = np.asarray(found).swapaxes(0, 1)
    if fit is not None:
        middle = (tracks.reshape(-1, 2).max(0) + tracks.reshape(-1, 2).min(0)) / 2
        tracks = tracks - middle
        tracks = tracks * (fit / (float(np.linalg.norm(tracks, axis=-1).max()) or 1.0))
    return torch.from_numpy(tracks)


def stone_soup_tracks(
    targets: int, rounds: int, *, seed: int = 0, noise: float = 0.05, fit: float | None = None
) -> Tensor:
    """Simulate targets of nearly constant velocity with Stone Soup, each by a simulator and seed of its own.

    Args:
        targets: Number of targets.
        rounds: Number of rounds, a second each.
        seed: Seed of all draws.
        noise: Diffusion of the velocities.
        fit: Shift and scale all positions into a disk of this radius.

    Returns:
        Positions, (rounds, targets, 2).

    Raises:
        MissingExtraError: Stone Soup is not installed.
    """
    try:
        from stonesoup.models.transition.linear import CombinedLinearGaussianTransitionModel, ConstantVelocity
        from stonesoup.simulator.simple import SingleTargetGroundTruthSimulator
        from stonesoup.types.state import State
    except ImportError:
        raise MissingExtraError("stonesoup", "tracking") from None
    starts = np.random.default_rng(seed).normal(size=(targets, 4)) * (10, 0.5, 10, 0.5)
    paths = []
    for target, start in enumerate(starts):
        own = derive_seed(seed, "stonesoup", target) % 2**32
        model = CombinedLinearGaussianTransitionModel([ConstantVelocity(noise), ConstantVelocity(noise)], seed=own)
        state = State(start[:, None], timestamp=datetime(2026, 1, 1))
        simulator = SingleTargetGroundTruthSimulator(model, state, number_steps=rounds)
        (path,) = [known for _, known in simulator][-1]
        paths.append(path)
    return from_stone_soup(paths, fit=fit)
