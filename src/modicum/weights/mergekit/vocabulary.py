"""Models of different vocabularies brought to one: every row of an embedding finds its token's place.

Rows are gathered with one indexed selection for each model, never token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.borders import check_plain_folder
from modicum.errors import CheckpointError, RecipeError, UnsupportedError, did_you_mean
from modicum.layout import TOKENIZER_FILES, VOCABULARY_FILES, VOCABULARY_PARTS
from modicum.references import find_model
from modicum.vocabulary import TOKENIZER, token_ids
from modicum.weights.adapter import read_json
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import digest_tensor
from modicum.weights.mergekit.document import Reference
from modicum.weights.mergekit.tokenizers import (
    Converter,
    extended,
    read_tokenizer,
    renumbered_ids,
    template_of,
    without_template,
)
from modicum.weights.retabled import Retabled, by_token, rows_of
from modicum.weights.whole import inside

LARGEST_MULTIPLE = 65_536  # to which rows of a vocabulary are filled up

MISSING, ZEROS, PADDING = -1, -2, -3  # in place of a model's own row


@dataclass(frozen=True)
class Result:
    """What a tokenizer setting makes of the models: their tables, and what changes in the result's files."""

    tables: Mapping[str, Vocabulary] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    removed: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # Where another model's settings are renumbered: its tokens by their rows, and the rows of the result's tokens.
    ids: tuple[Mapping[int, Any], Mapping[Any, int]] | None = None


class Vocabulary(Retabled):
    """A checkpoint whose embedding tables have the rows of another vocabulary.

    Args:
        model: The checkpoint.
        size: Rows of the result.
        rows: For each row of the result, the model's own row, −1 where it has none, −2 for zeros, −3 where there is no
            token at all: the mean of all others.
        donors: Where such a row comes from: for each, a checkpoint and its rows or −1; the mean of all that have it.
    """

    def __init__(self, model: Checkpoint, size: int, rows: Tensor, donors: Sequence[tuple[Checkpoint, Tensor]]) -> None:
        super().__init__(model, size, [donor for donor, _ in donors])
        self.rows, self.donors = rows, donors

    @property
    def identity(self) -> list[object]:
        """What its tensors depend on."""
        gifts = [[donor.identity, digest_tensor(rows)] for donor, rows in self.donors]
        return [self.model.identity, self.size, digest_tensor(self.rows), gifts]

    def table(self, name: str, own: Tensor) -> Tensor:
        """Return the model's rows in their new places, those that donors give, and padding."""
        out = own.index_select(0, self.rows.clamp_min(0))
        out[self.rows == ZEROS] = 0
        missing = (self.rows == MISSING).nonzero().view(-1)
        if len(missing):
            out[missing] = self._donated(name, missing).to(out.dtype)
        padding = self.rows == PADDING
        if bool(padding.any()):
            out[padding] = out[~padding].mean(0, dtype=torch.float32).to(out.dtype)
        return out

    def _donated(self, name: str, missing: Tensor) -> Tensor:
        """Return the rows of ``missing``: of each the mean over the donors that have it."""
        own = by_token(self.model, name)
        shape = (len(missing), *own.shape[1:])
        total, count = torch.zeros(shape), torch.zeros(len(missing))
        for donor, rows in self.donors:
            if name in donor:
                wanted = rows[missing]
                have = wanted >= 0
                total[have] += by_token(donor, name).index_select(0, wanted[have]).float()
                count[have] += 1
        count = count.view(-1, *(1 for _ in shape[1:]))
        # A row that nobody has gets the mean of the model's own.
        mean = own.mean(0, dtype=torch.float32)
        return torch.where(count > 0, total / count.clamp_min(1), mean)


@dataclass(frozen=True)
class _Owner:
    """Whose tokenizer the result gets: its ``tokenizer.json`` and all its files."""

    name: str
    tokenizer: Mapping[str, Any]
    files: Mapping[str, bytes]


def with_vocabulary(
    document: Mapping[str, Any],
    models: Mapping[str, Checkpoint],
    base: str,
    *,
    find: Callable[[str], Path] = find_model,
    convert: Converter | None = None,
) -> Result:
    """Read the tokenizer and chat template settings of a mergekit document.

    Args:
        document: The document.
        models: The opened models by reference.
        base: Which of them is the base, or the first.
        find: From a reference to the folder of a tokenizer that none of the models has.
        convert: See :func:`.tokenizers.read_tokenizer`.

    Raises:
        RecipeError: The settings contradict each other or name what is not there.
    """
    setting, short = document.get("tokenizer"), document.get("tokenizer_source")
    if setting and short:
        raise RecipeError("tokenizer and tokenizer_source are both set. Keep one.")
    result = Result()
    if setting or short:
        full = dict(setting) if isinstance(setting, Mapping) else {"source": setting or short}
        for key in full:
            if key not in ("source", "tokens", "pad_to_multiple_of"):
                raise RecipeError(f"tokenizer: unknown key {key!r}. {did_you_mean(str(key), ['source', 'tokens'])}")
        result = _unify(full, models, base, find, convert)
    if not document.get("chat_template"):
        return result
    files = dict(result.files)
    settings = "tokenizer_config.json"
    if not result.tables and (path := next((p for p in models[base].companions() if p.name == settings), None)):
        files[settings] = path.read_bytes()
    if settings in files:
        files[settings] = without_template(files[settings])
    files["chat_template.jinja"] = template_of(str(document["chat_template"]), models).encode()
    return replace(result, files=files)


def _unify(
    setting: Mapping[str, Any],
    models: Mapping[str, Checkpoint],
    base: str,
    find: Callable[[str], Path],
    convert: Converter | None,
) -> Result:
    source = str(Reference.parse(setting.get("source") or "union", "tokenizer.source"))
    folder = None if source in ("union", "base", *models) else _found(source, find)
    read = {name: read_tokenizer(model, convert) for name, model in models.items()}
    notes = []
    for name in [name for name, tokenizer in read.items() if tokenizer is None and read[base] is not None]:
        read[name] = read[base]
        notes.append(f"{name} has no tokenizer: its rows are taken for those of {base}'s tokens")
    tokenizers = {name: tokenizer for name, tokenizer in read.items() if tokenizer is not None}
    if len(tokenizers) < len(models):
        raise UnsupportedError(f"{models[base].name} has no tokenizer, whose tokens tokenizer could bring together.")
    if folder is None:
        name = base if source in ("union", "base") else source
        paths = [path for path in models[name].companions() if path.name in TOKENIZER_FILES]
        owner = _Owner(models[name].name, tokenizers[name], {path.name: path.read_bytes() for path in paths})
    else:
        owner = _stranger(source, folder, convert)
    known = {name: token_ids(tokenizer, models[name].name) for name, tokenizer in tokenizers.items()}
    forced: dict[str, Mapping[str, Any]] = setting.get("tokens") or {}
    if not isinstance(forced, Mapping):
        raise RecipeError(f"tokenizer.tokens is {forced!r:.60}, expected a mapping of tokens to their sources.")
    for token, choice in forced.items():
        if not isinstance(token, str):
            raise RecipeError(f"tokenizer.tokens: {token!r:.60} is no text. Write the token in quotes.")
        if not isinstance(choice, Mapping):
            raise RecipeError(f"tokenizer.tokens[{token!r}] is {choice!r}, expected {{source: …}}, perhaps with force.")
    tokens = token_ids(owner.tokenizer, owner.name)
    # Models in their order, and their tokens in the order of their rows.
    others = [token for ids in known.values() for token in sorted(ids, key=ids.__getitem__)]
    wanted = dict.fromkeys([*(others if source == "union" else []), *forced])
    added = dict(zip((token for token in wanted if token not in tokens), count(max(tokens.values(), default=-1) + 1)))
    tokens |= added
    multiple = setting.get("pad_to_multiple_of") or 1
    if not isinstance(multiple, int) or not 1 <= multiple <= LARGEST_MULTIPLE:
        raise RecipeError(f"pad_to_multiple_of is {multiple!r:.40}, expected a whole number up to {LARGEST_MULTIPLE}.")
    size = -(-(max(tokens.values()) + 1) // multiple) * multiple
    rows = {name: _rows(tokens, known[name], size, rows_of(model)) for name, model in models.items()}
    chosen = {tokens[token]: _choice(token, choice, models, known) for token, choice in forced.items()}
    always = [tokens[token] for token, choice in forced.items() if choice.get("force")]
    tables = {name: _vocabulary(name, models, rows, base, chosen, always) for name in models}
    notes.insert(0, f"vocabulary: {size} rows, {len(added)} tokens added to {owner.name}'s")
    unknown = [token for token, row in tokens.items() if row not in chosen and all(r[row] < 0 for r in rows.values())]
    if unknown:
        notes.append(f"no model has a row for {len(unknown)} tokens, such as {unknown[0]!r}: they get the mean row")
    files = dict(owner.files)
    if added or TOKENIZER not in files:
        # Only tokenizer.json learns of the new tokens, so that no older form of the vocabulary may stay beside it.
        files = {name: text for name, text in files.items() if name not in (*VOCABULARY_FILES, *VOCABULARY_PARTS)}
        files[TOKENIZER] = extended(owner.tokenizer, added, tokenizers.values())
    removed = [name for name in TOKENIZER_FILES if name not in files]
    ids = None if owner.name == models[base].name else ({row: token for token, row in known[base].items()}, tokens)
    return Result(tables, files, removed, {"vocab_size": size}, notes, ids)


def _found(source: str, find: Callable[[str], Path]) -> Path:
    try:
        return find(source)
    except CheckpointError as error:
        raise RecipeError(
            f"tokenizer.source is {source!r}, expected union, base, a model of the file or another model. {error}"
        ) from None


def _stranger(name: str, folder: Path, convert: Converter | None) -> _Owner:
    """Return the tokenizer of a model that is not merged."""
    check_plain_folder(folder)
    paths = [inside(path, name) for path in sorted(folder.iterdir()) if path.name in TOKENIZER_FILES]
    files = {path.name: path.read_bytes() for path in paths}
    if TOKENIZER in files:
        return _Owner(name, read_json(folder / TOKENIZER, name), files)
    if convert is None or not any(older in files for older in VOCABULARY_FILES):
        raise UnsupportedError(f"{name} has no {TOKENIZER}. Save its tokenizer with transformers first.")
    return _Owner(name, json.loads(convert(folder)), files)


def companions_with(result: Result, companions: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a result's files with those of its vocabulary, ids of tokens in its settings being of that vocabulary."""
    made = {**{name: text for name, text in companions.items() if name not in result.removed}, **result.files}
    if result.ids is None:
        return made
    for name in ("config.json", "generation_config.json"):
        if name in made:
            changed, lost = renumbered_ids(json.loads(made[name]), *result.ids)
            made[name] = (json.dumps(changed, indent=2) + "\n").encode()
            if lost:
                result.notes.append(
                    f"{name}: {', '.join(lost)} name tokens that the vocabulary lacks; ends and padding are left out "
                    "there, other settings keep their ids"
                )
    return made


def _rows(tokens: Mapping[str, int], ids: Mapping[str, int], size: int, limit: int) -> Tensor:
    """Return a model's own row for each row of the result; −1 where its tokenizer or its tables do not have it."""
    rows = torch.full((size,), PADDING)
    rows[torch.tensor(list(tokens.values()), dtype=torch.long)] = MISSING
    shared = [(place, ids[token]) for token, place in tokens.items() if ids.get(token, limit) < limit]
    if shared:
        places, own = torch.tensor(shared).T
        rows[places] = own
    return rows


def _vocabulary(
    name: str,
    models: Mapping[str, Checkpoint],
    rows: Mapping[str, Tensor],
    base: str,
    chosen: Mapping[int, tuple[str, int] | None],
    always: Sequence[int],
) -> Vocabulary:
    """Give one model the unified rows: its own, else the base's, else the mean of the others'.

    Args:
        name: Of the model.
        models: All models.
        rows: Of each model, its own row for each row of the result.
        base: The model whose row goes before those of the others.
        chosen: Rows for which the file names a donor and its row, or ``None`` for zeros.
        always: Of these, the rows that replace even the model's own.
    """
    mine = rows[name].clone()
    mine[torch.tensor(always, dtype=torch.long)] = MISSING
    named = {place: gift for place, gift in chosen.items() if mine[place] == MISSING}
    mine[torch.tensor([place for place, gift in named.items() if gift is None], dtype=torch.long)] = ZEROS
    # Each row of the result is kept for one tier of donors: those that the file names, the base, all others.
    taken = torch.zeros(len(mine), dtype=torch.bool)
    taken[torch.tensor(list(named), dtype=torch.long)] = True
    donors = [(models[base], rows[base].masked_fill(taken, MISSING))]
    taken |= rows[base] >= 0
    donors += [(models[other], own.masked_fill(taken, MISSING)) for other, own in rows.items() if other != base]
    for donor in models:
        gifts = [(place, gift[1]) for place, gift in named.items() if gift and gift[0] == donor]
        if gifts:
            only = torch.full_like(mine, MISSING)
            places, own = torch.tensor(gifts).T
            only[places] = own
            donors.append((models[donor], only))
    return Vocabulary(models[name], len(mine), mine, donors)


def _choice(
    token: str, choice: Mapping[str, Any], models: Mapping[str, Checkpoint], known: Mapping[str, Mapping[str, int]]
) -> tuple[str, int] | None:
    """Return whose row, and which, the file gives to a token; ``None`` for zeros."""
    source = choice.get("source")
    if isinstance(source, Mapping) and source.get("kind") == "zero":
        return None
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        model, other = str(source.get("model")), source.get("token", token)
        row = source.get("token_id", known.get(model, {}).get(str(other)))
    else:
        model = str(source)
        row = known.get(model, {}).get(token)
    if model not in models or not isinstance(row, int):
        raise RecipeError(f"tokenizer.tokens[{token!r}]: {source!r} names no token of a model of the file.")
    limit = rows_of(models[model])
    if not 0 <= row < limit:
        raise RecipeError(f"tokenizer.tokens[{token!r}]: {model} has {limit} rows, so there is no row {row!s:.40}.")
    return model, row
