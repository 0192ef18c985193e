"""Scorers of answers, by which a mixture keeps pairs: a file of scores, a Python function, a classifier, linear heads.

A scorer gives each answer a number for each of its heads. The margin of a pair is what its chosen answer gets more.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from modicum.borders import expanded, loads
from modicum.errors import CheckpointError, ModicumError, RecipeError, first_line, listed
from modicum.evaluate.rows import Row, question_of
from modicum.jobs.data.section import ScorerSection
from modicum.shortage import pass_on

Scores: TypeAlias = Sequence[float] | Mapping[str, Any]
Scorer: TypeAlias = Callable[[Sequence[tuple[Row, str]]], Sequence[Scores]]  # answers, each beside the row that asks
Function: TypeAlias = Callable[[str, str], Scores]


def open_scorer(
    section: ScorerSection,
    rows: Mapping[str, Sequence[Row]],
    *,
    seed: int,
    note: Callable[[str], object],
) -> tuple[Scorer, Mapping[str, Sequence[Row]]]:
    """Return the scorer that a recipe names, and the rows of each part that it may score.

    Args:
        section: Which one.
        rows: The pairs of each part. Linear heads are trained on some of them, which are left out.
        seed: Names the choice of these.
        note: Told how well trained heads do.

    Raises:
        ModicumError: It cannot be read, loaded or trained.
    """
    if section.file is not None:
        return read_scores(section.file), rows
    if section.function is not None:
        return of_function(load_function(section.function)), rows
    from modicum.jobs.data.scoring_models import Classifier, trained_heads

    if section.model is not None:
        return Classifier(section), rows
    return trained_heads(section, rows, seed=seed, note=note)


def rehearse_scorer(section: ScorerSection, rows: Mapping[str, Sequence[Row]], *, seed: int) -> None:
    """Refuse what a scorer that is a model would refuse before it has read an answer.

    Args:
        section: Which one; of a file or a function nothing is asked.
        rows: The pairs of each part.
        seed: Names the choice of those on which heads are trained.

    Raises:
        ModicumError: It cannot be loaded, has too few pairs to be trained on, or an answer is too long for it.
    """
    if section.model is not None or section.heads_of is not None:
        from modicum.jobs.data.scoring_models import rehearse

        rehearse(section, rows, seed=seed)


def of_function(function: Function) -> Scorer:
    """Return a function ``(prompt, answer) -> scores`` as a scorer."""

    def score(asked: Sequence[tuple[Row, str]]) -> list[Scores]:
        return [_asked(function, question_of(row), answer) for row, answer in asked]

    return score


def _asked(function: Function, prompt: str, answer: str) -> Scores:
    try:
        return function(prompt, answer)
    except (Exception, SystemExit) as error:  # of the user's code, whatever it does
        pass_on(error)
        told = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        name = getattr(function, "__name__", "scorer")
        raise RecipeError(f"The scorer {name} fails on the answer {answer!r:.50} ({told}). Correct its code.") from None


def score_pairs(
    rows: Sequence[Row], scorer: Scorer, *, heads: int | Sequence[str] | None = None, where: str = "the pairs"
) -> tuple[list[list[float]], list[list[float]] | None]:
    """Return the margins of pairs on all heads, and the weights that the scorer gives to its heads, if it does.

    Args:
        rows: Pairs.
        scorer: Scores answers.
        heads: How many heads are needed, or their names; as many as the first answer has when not given.
        where: How errors call the rows.

    Raises:
        RecipeError: A score is missing or not finite, or an answer has other heads; the row is named.

    Example:
        >>> rows = [{"prompt": "1 + 1?", "chosen": "2", "rejected": "33"}]
        >>> score_pairs(rows, of_function(lambda prompt, answer: [-len(answer)]))
        ([[1.0]], None)
    """
    asked = [(row, row[side]) for row in rows for side in ("chosen", "rejected")]
    found = scorer(asked)
    if len(found) != len(asked):
        raise RecipeError(f"{where}: the scorer returned {len(found)} scores for {len(asked)} answers.")
    margins: list[list[float]] = []
    gates: list[list[float] | None] = []
    for number, row in enumerate(rows):
        sides = []
        for side, given in zip(("chosen", "rejected"), found[2 * number : 2 * number + 2]):
            told = f"{where}, row {number} ({question_of(row)!r:.50}), {side}"
            values, gate = _read(given, heads, told)
            if margins and len(values) != len(margins[0]):
                raise RecipeError(f"{told}: the scorer returned {len(values)} heads, expected {len(margins[0])}.")
            sides.append(values)
        if len(sides[0]) != len(sides[1]):
            raise RecipeError(f"{told}: the scorer returned {len(sides[1])} heads, expected {len(sides[0])}.")
        margins.append([a - b for a, b in zip(*sides)])
        gates.append(gate)
    known = [gate for gate in gates if gate is not None]
    return margins, known if len(known) == len(margins) else None


def _read(given: Scores, heads: int | Sequence[str] | None, where: str) -> tuple[list[float], list[float] | None]:
    gate = None
    if isinstance(given, Mapping) and isinstance(given.get("scores"), Mapping | Sequence):
        gate, given = given.get("gates"), given["scores"]
    names = None if heads is None or isinstance(heads, int) else list(heads)
    if isinstance(given, Mapping):
        wanted = names if names is not None else sorted(given)
        if missing := [name for name in wanted if name not in given]:
            raise RecipeError(f"{where}: the scorer has no head {missing[0]!r}; it has {listed(given)}.")
        values = [given[name] for name in wanted]
    else:
        values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    needed = len(names) if names is not None else heads
    if not values or (needed is not None and len(values) < needed):  # type: ignore[operator]
        raise RecipeError(f"{where}: the scorer returned {len(values)} heads, expected {needed or 'one or more'}.")
    for head, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"{where}: head {head} of the scorer returned {value!r:.40}, expected a number.")
        if not _is_finite(value):
            told = "NaN" if value != value else f"{value:.5g}" if isinstance(value, float) else "a number beyond all"
            raise RecipeError(f"{where}: head {head} of the scorer returned {told}.")
    if gate is not None and not (isinstance(gate, Sequence) and all(map(_is_finite, gate))):
        raise RecipeError(f"{where}: the scorer returned the gates {gate!r:.40}, expected finite numbers.")
    return [float(value) for value in values], None if gate is None else [float(x) for x in gate]


def _is_finite(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_scores(name: str) -> Scorer:
    """Return a scorer that looks answers up in a file of lines ``{prompt, answer, scores}``.

    Args:
        name: A ``.jsonl`` file. ``scores`` are numbers, or numbers by the names of heads; ``gates`` may weigh them.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = expanded(name)
    known: dict[tuple[str, str], Scores] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
            if line.strip():
                row = loads(line)
                if not isinstance(row, dict) or not {"prompt", "answer", "scores"} <= row.keys():
                    raise CheckpointError(f"{path}, line {number + 1}: expected prompt, answer and scores.")
                key = str(row["prompt"]).strip(), str(row["answer"]).strip()
                given = {part: row[part] for part in ("scores", "gates") if part in row}
                if known.setdefault(key, given) != given:
                    raise CheckpointError(
                        f"{path}, line {number + 1}: the answer {key[1]!r:.50} to {key[0]!r:.50} has other scores in "
                        "an earlier line. Drop one."
                    )
    except OSError as error:
        raise CheckpointError(f"Cannot read the scores {path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a file of lines of JSON: {first_line(error)}") from None

    def score(asked: Sequence[tuple[Row, str]]) -> list[Scores]:
        found = []
        for row, answer in asked:
            key = question_of(row).strip(), answer.strip()
            if key not in known:
                raise RecipeError(f"{path} has no scores of the answer {answer!r:.50} to {key[0]!r:.50}. Add a line.")
            found.append(known[key])
        return found

    return score


def load_function(name: str) -> Function:
    """Return the function ``FILE.py:NAME`` or ``MODULE:NAME``, which runs the code of that file.

    Raises:
        RecipeError: There is no such file, module or function.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = expanded(place)
            spec = importlib.util.spec_from_file_location(f"scorer_{path.stem}", path)
            if spec is None or spec.loader is None or not path.is_file():
                raise RecipeError(f"There is no file {path} with a scorer.")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function: Function = getattr(module, attribute)
    except ModicumError:
        raise
    except (Exception, SystemExit) as error:  # of the user's code, whatever it does
        pass_on(error)
        told = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        raise RecipeError(f"The scorer {name} cannot be loaded: {told}. Correct its code.") from None
    return function
