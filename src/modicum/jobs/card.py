"""The model card of a merge: what was merged and how, in the form that the Hub reads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modicum.borders import check_plain
from modicum.documents import parse_yaml
from modicum.errors import RecipeError

CARD = "README.md"
HEAD = 64 << 10  # letters of a card that are looked at
STAGES = "stages"  # where a pipeline has its runs
LICENCE = ("license", "license_name", "license_link")
SHARED = ("language", "pipeline_tag")  # kept where all inputs that say it say the same
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def model_card(
    inputs: Mapping[str, Sequence[Path]],
    *,
    base: str | None,
    method: str,
    recipe: Mapping[str, Any],
    said: Mapping[str, Any],
    mergekit: bool = False,
    adapter: bool = False,
) -> bytes:
    """Return the text of a ``README.md``.

    Args:
        inputs: The folders of each model that went in, by its reference.
        base: Which of them is the base.
        method: The merge method.
        recipe: What was run.
        said: What the recipe says for the card itself, such as its licence.
        mergekit: The recipe is a mergekit file.
        adapter: The result is a LoRA adapter.
    """
    cards = {name: front_matter(folders) for name, folders in inputs.items()}
    licences = {name: str(card["license"]) for name, card in cards.items() if card.get("license")}
    head: dict[str, Any] = {}
    if hub := [name.partition("@")[0] for name in inputs if HUB_ID.match(name) and not Path(name).exists()]:
        head |= {"base_model": hub, "base_model_relation": "merge"}
    head["library_name"] = "peft" if adapter else "transformers"
    head["tags"] = ["merge", "modicum", *(["mergekit"] if mergekit else [])]
    if len(licences) == len(inputs) and len(set(licences.values())) == 1:
        head |= {key: next(iter(cards.values()))[key] for key in LICENCE if key in next(iter(cards.values()))}
    for key in SHARED:
        found = [card[key] for card in cards.values() if key in card]
        if found and all(value == found[0] for value in found):
            head[key] = found[0]
    tags = said.get("tags") or []
    head |= {key: value for key, value in said.items() if key != "tags"}
    head["tags"] += [tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in head["tags"]]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# A merge by {method}",
        "",
        f"Merged with [modicum](https://pypi.org/project/modicum/) by the method `{method}`"
        + (f", with `{base}` as the base." if base else "."),
        "",
        "| model | licence |",
        "|---|---|",
        *(
            f"| {_linked(name)}{' (base)' if name == base else ''} | {licences.get(name, 'not stated')} |"
            for name in inputs
        ),
        "",
        "The recipe:" if not mergekit else "The mergekit file:",
        "",
        "```yaml",
        yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines).encode()


def beside(value: Any, folder: Path) -> Any:
    """Return settings in which paths to runs beside ``folder`` are relative: those of a pipeline move with it.

    Example:
        >>> beside({"base": "/runs/p/stages/first/model", "seed": 1}, Path("/runs/p/stages/second"))
        {'base': '../first/model', 'seed': 1}
    """
    if isinstance(value, dict):
        return {key: beside(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [beside(item, folder) for item in value]
    if isinstance(value, str) and folder.parent.name == STAGES:
        for above in (str(folder.parent), str(folder.parent.resolve())):
            if value.startswith(above + os.sep):
                return f"..{value[len(above) :]}"
    return value


def front_matter(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the settings at the head of the first model card in ``folders``; nothing where there is none to read."""
    for folder in folders:
        file = folder / CARD
        if not file.is_file():
            continue
        check_plain(file)
        with file.open(encoding="utf-8", errors="replace") as opened:
            match = re.match(r"---[ \t]*\n(.*?)\n---", opened.read(HEAD), re.DOTALL)
        try:
            found = parse_yaml(match[1]) if match else None
        except RecipeError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _linked(name: str) -> str:
    if HUB_ID.match(name) and not Path(name).exists():
        return f"[{name}](https://huggingface.co/{name.partition('@')[0]})"
    return f"`{name}`"
