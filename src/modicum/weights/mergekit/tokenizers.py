"""Tokenizers as data: which token each row is of, other tokens appended, chat templates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from filecmp import cmp
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from modicum.errors import ModicumError, RecipeError, UnsupportedError, did_you_mean
from modicum.layout import VOCABULARY_FILES, VOCABULARY_PARTS
from modicum.vocabulary import TOKENIZER, token_ids
from modicum.weights.adapter import read_json
from modicum.weights.checkpoint import Checkpoint

TEMPLATES = resources.files("modicum.weights.mergekit") / "templates"
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
OPTIONAL = (*ENDS, "sep_token_id", "cls_token_id", "forced_bos_token_id", "forced_eos_token_id")
LISTS_OF_IDS = ("suppress_tokens", "bad_words_ids", "force_words_ids")  # settings of generation
CLASH = "has other tokens than FIRST"
Converter = Callable[[Path], bytes]


def read_tokenizer(model: Checkpoint, convert: Converter | None = None) -> Mapping[str, Any] | None:
    """Return a model's ``tokenizer.json``, made of its other files where it has none; ``None`` without a tokenizer.

    Args:
        model: The model.
        convert: From a folder with a tokenizer to the text of a ``tokenizer.json``.

    Raises:
        UnsupportedError: It cannot be converted.
    """
    files = {path.name: path for path in model.companions()}
    if TOKENIZER in files:
        return read_json(files[TOKENIZER], model.name)
    older = next((name for name in VOCABULARY_FILES if name in files), None)
    if older is None:
        return None
    if convert is None:
        raise UnsupportedError(
            f"{model.name} has no {TOKENIZER} beside {older}. Save its tokenizer with transformers first."
        )
    found: Mapping[str, Any] = json.loads(convert(files[older].parent))
    return found


def notes_on_tokenizers(
    models: Mapping[str, object],
    more: str = "and they are merged all the same; tokenizer: union brings equal tokens together",
) -> list[str]:
    """Say where models are merged whose tokenizers differ, in tokens or in how they cut texts, or may differ.

    Args:
        models: By what to call them; the first one gives the result its tokenizer.
        more: What follows from it.
    """
    return [f"{told}, {more}" for _, told in _differences(models)]


def clashes(models: Mapping[str, object]) -> list[str]:
    """Say where models give a row to different tokens, as tokenizers of one size may.

    Args:
        models: By what to call them.
    """
    return [told for clash, told in _differences(models) if clash]


def _differences(models: Mapping[str, object]) -> list[tuple[bool, str]]:
    """Return what tokenizers differ in from the first one, and whether they give a row to different tokens."""
    found: dict[str, dict[str, Path]] = {}
    for name, model in models.items():
        if isinstance(model, Checkpoint) and (files := {p.name: p for p in model.companions() if _is_vocabulary(p)}):
            found[name] = files
    first, *others = found or [""]
    notes = ((other, _difference(found[first], found[other])) for other in others)
    return [(CLASH in told, f"{other} {told.replace('FIRST', first)}") for other, told in notes if told]


def _is_vocabulary(path: Path) -> bool:
    return path.name in (*VOCABULARY_FILES, *VOCABULARY_PARTS) or path.suffix == ".tiktoken"


def _difference(one: Mapping[str, Path], other: Mapping[str, Path]) -> str | None:
    """Return in what a tokenizer differs from the FIRST one, each given by its files; ``None`` where it does not."""
    common = [name for name in one if name in other]
    changed = [name for name in common if not cmp(one[name], other[name], shallow=False)]
    if TOKENIZER in common:  # what transformers reads, if it is there
        if TOKENIZER not in changed:
            return None
        mine, theirs = _data(one[TOKENIZER]), _data(other[TOKENIZER])
        return _difference_of_data(mine, theirs) if mine and theirs else f"has a {TOKENIZER} that cannot be compared"
    if not set(common) - set(VOCABULARY_PARTS):
        return "has no file of its tokenizer in common with FIRST, so that their tokens cannot be compared"
    return f"has another {changed[0]} than FIRST" if changed else None


def _difference_of_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    mine, theirs = ({row: token for token, row in token_ids(each, "").items()} for each in (one, other))
    rows = [row for row, token in mine.items() if theirs.get(row, token) != token]
    if rows:
        told = f"such as {theirs[rows[0]]!r} for {mine[rows[0]]!r}"
        return f"{CLASH} in {len(rows)} rows, {told}"
    a, b = _cutting(one), _cutting(other)
    parts = sorted(key for key in a.keys() & b.keys() if a[key] != b[key])
    return f"has the tokens of FIRST and cuts texts into others ({', '.join(parts)})" if parts else None


def _cutting(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a ``tokenizer.json`` by which a text is cut into tokens."""
    model = tokenizer["model"]
    found = {key: value for key, value in model.items() if key != "vocab"}
    if isinstance(merges := model.get("merges"), list):  # as text in files of earlier versions
        found["merges"] = [each.split(" ", 1) if isinstance(each, str) else each for each in merges]
    return found | {key: tokenizer.get(key) for key in ("normalizer", "pre_tokenizer")}


def _data(path: Path) -> Mapping[str, Any] | None:
    """Return the content of a ``tokenizer.json``; nothing where its vocabulary cannot be read."""
    try:
        found = read_json(path, "")
        return found if token_ids(found, "") else None
    except ModicumError:
        return None


def extended(tokenizer: Mapping[str, Any], added: Mapping[str, int], others: Iterable[Mapping[str, Any]]) -> bytes:
    """Return a tokenizer with tokens appended, which keep the settings that they had in their own."""
    # What was no added token in its own vocabulary stands for text as the normalizer leaves it.
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    settings: dict[str, Mapping[str, Any]] = {}
    for other in others:
        for item in other.get("added_tokens") or []:
            settings.setdefault(str(item["content"]), item)
    entries = [
        {**plain, **settings.get(token, {}), "id": position, "content": token} for token, position in added.items()
    ]
    data = {**tokenizer, "added_tokens": [*(tokenizer.get("added_tokens") or []), *entries]}
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _file(model: Checkpoint, name: str) -> Path | None:
    return next((path for path in model.companions() if path.name == name), None)


def renumbered_ids(config: Any, old: Mapping[int, Any], new: Mapping[Any, int]) -> tuple[Any, list[str]]:
    """Return settings in which ids of tokens are those of another vocabulary, and the settings whose token it lacks.

    An end of texts or a padding that it lacks is none: its id would be that of another token, or of no row at all. Of
    lists such a token is left out.

    Args:
        config: Of a ``config.json`` or ``generation_config.json``.
        old: The token of each id that stands there.
        new: The id of each token in the result.

    Example:
        >>> renumbered_ids({"eos_token_id": [2, 3], "pad_token_id": 9}, {2: "x", 3: "y"}, {"x": 5, "y": 2})
        ({'eos_token_id': [5, 2], 'pad_token_id': None}, ['pad_token_id'])
        >>> renumbered_ids({"bad_words_ids": [[2], [3, 2]]}, {2: "x", 3: "y"}, {"x": 5, "y": 2})
        ({'bad_words_ids': [[5], [2, 5]]}, [])
        >>> renumbered_ids({"bad_words_ids": [[2], [3, 9]]}, {2: "x", 3: "y"}, {"x": 5, "y": 2})
        ({'bad_words_ids': [[5]]}, ['bad_words_ids'])
    """
    lost: list[str] = []

    def change(key: str, value: Any, *, inside: bool = False) -> Any:
        if isinstance(value, dict):
            return {name: change(name, inner) for name, inner in value.items()}
        if not key.endswith(("_token_id", "_token_index", *LISTS_OF_IDS)):
            return value
        if isinstance(value, list):
            changed = [change(key, item, inside=True) for item in value]
            known = [item for item in changed if item is not None]
            return None if inside and len(known) < len(value) else known or None  # part of a sequence is another one
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if value in old and old[value] in new:
            return new[old[value]]
        lost.append(key)
        return None if inside or key in OPTIONAL else value

    return change("", config), lost


def template_of(setting: str, models: Mapping[str, Checkpoint]) -> str:
    """Return the chat template that a mergekit file asks for: by name, by ``auto``, or the template itself.

    Raises:
        RecipeError: There is none of that name, or no model has one.
    """
    shipped = {path.name.removesuffix(".jinja"): path for path in TEMPLATES.iterdir()}
    if setting in shipped:
        return shipped[setting].read_text(encoding="utf-8").removesuffix("\n")
    if setting == "auto":
        texts = [text for model in models.values() for text in _templates(model)]
        if not texts:
            raise RecipeError(
                "chat_template is auto, but no model has a chat template. Name one, or remove the setting."
            )
        return Counter(texts).most_common(1)[0][0]
    if "{" in setting:
        return setting
    raise RecipeError(f"chat_template {setting!r} is not known. {did_you_mean(setting, [*sorted(shipped), 'auto'])}")


def _templates(model: Checkpoint) -> Iterator[str]:
    """Yield a model's chat template, wherever it is kept: a file of its own counts before the tokenizer's settings."""
    file = _file(model, "chat_template.jinja")
    if file:
        yield file.read_text(encoding="utf-8")
        return
    settings = _file(model, "tokenizer_config.json")
    found = read_json(settings, model.name).get("chat_template") if settings else None
    if isinstance(found, list):  # several by name
        found = next((item.get("template") for item in found if item.get("name") == "default"), None)
    if isinstance(found, str):
        yield found


def without_template(text: bytes) -> bytes:
    """Return a ``tokenizer_config.json`` without its chat template, which another one replaces."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.pop("chat_template", None) is None:
        return text
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def spelt(token: str, tokenizer: Mapping[str, Any]) -> bytes | str:
    """Return what a token stands for in a text, so that tokens of two kinds of tokenizer can be compared.

    Added tokens stand for themselves, others for bytes, which byte-level vocabularies and SentencePiece write in
    their own ways.

    Example:
        >>> spelt("\u0120the", {"decoder": {"type": "ByteLevel"}}), spelt("\u2581the", {}), spelt("<0x0A>", {})
        (b' the', b' the', b'\\n')
    """
    if any(token == added.get("content") for added in tokenizer.get("added_tokens") or ()):
        return token
    if "ByteLevel" in json.dumps([tokenizer.get("decoder"), tokenizer.get("pre_tokenizer")]):
        table = _bytes_of_letters()
        return bytes(table[letter] for letter in token) if all(letter in table for letter in token) else token
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


@cache
def _bytes_of_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
