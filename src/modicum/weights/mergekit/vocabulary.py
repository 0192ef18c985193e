"""Models of different vocabularies brought to one: every row of an embedding finds its token's place.

Rows are gathered with one indexed selection for each model, never token by token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError, did_you_mean
from modicum.layout import TOKENIZER_FILES, VOCABULARY_FILES, VOCABULARY_PARTS, is_vocabulary
from modicum.weights.adapter import read_json
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import Spec, digest_tensor

MISSING, ZEROS = -1, -2  # in place of a model's own row
TEMPLATES = resources.files("modicum.weights.mergekit") / "templates"


@dataclass(frozen=True)
class Result:
    """What a tokenizer setting makes of the models: their tables, and what changes in the result's files."""

    tables: Mapping[str, Vocabulary] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    removed: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Vocabulary(Mapping[str, Tensor]):
    """A checkpoint whose embedding tables have the rows of another vocabulary.

    Args:
        model: The checkpoint.
        size: Rows of the result.
        rows: For each row of the result, the model's own row, or −1 where it has none, or −2 for zeros.
        donors: Where such a row comes from: for each, a checkpoint and its rows or −1; the mean of all that have it.
    """

    def __init__(self, model: Checkpoint, size: int, rows: Tensor, donors: Sequence[tuple[Checkpoint, Tensor]]) -> None:
        self.model, self.size, self.rows, self.donors = model, size, rows, donors
        self.name, self.config = model.name, model.config

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)

    def spec(self, name: str) -> Spec:
        """Return shape and dtype of a tensor."""
        spec = self.model.spec(name)
        return Spec((self.size, *spec.shape[1:]), spec.dtype) if is_vocabulary(name) else spec

    @property
    def identity(self) -> list[object]:
        """What its tensors depend on; see :attr:`modicum.weights.checkpoint.Checkpoint.identity`."""
        gifts = [[donor.identity, digest_tensor(rows)] for donor, rows in self.donors]
        return [self.model.identity, self.size, digest_tensor(self.rows), gifts]

    def check(self) -> None:
        """Raise unless the models are what they were; see :meth:`modicum.weights.checkpoint.Checkpoint.check`."""
        for model in (self.model, *(donor for donor, _ in self.donors)):
            model.check()

    def __getitem__(self, name: str) -> Tensor:
        table = self.model[name]
        if not is_vocabulary(name):
            return table
        out = table.index_select(0, self.rows.clamp_min(0))
        out[self.rows == ZEROS] = 0
        missing = (self.rows == MISSING).nonzero().view(-1)
        if len(missing):
            out[missing] = self._donated(name, missing).to(out.dtype)
        return out

    def _donated(self, name: str, missing: Tensor) -> Tensor:
        """Return the rows of ``missing``: of each the mean over the donors that have it."""
        shape = (len(missing), *self.model.spec(name).shape[1:])
        total, count = torch.zeros(shape), torch.zeros(len(missing))
        for donor, rows in self.donors:
            if name in donor:
                wanted = rows[missing]
                have = wanted >= 0
                total[have] += donor[name].index_select(0, wanted[have]).float()
                count[have] += 1
        count = count.view(-1, *(1 for _ in shape[1:]))
        # A row that nobody has, such as padding, gets the mean of the model's own.
        mean = self.model[name].mean(0, dtype=torch.float32)
        return torch.where(count > 0, total / count.clamp_min(1), mean)


def with_vocabulary(document: Mapping[str, Any], models: Mapping[str, Checkpoint], base: str) -> Result:
    """Read the tokenizer and chat template settings of a mergekit document.

    Args:
        document: The document.
        models: The opened models by reference.
        base: Which of them is the base, or the first.

    Raises:
        RecipeError: The settings contradict each other or name what is not there.
    """
    setting, short = document.get("tokenizer"), document.get("tokenizer_source")
    if setting and short:
        raise RecipeError("tokenizer and tokenizer_source are both set. Keep one.")
    files: dict[str, bytes] = {}
    result = Result()
    if setting or short:
        full = {"source": short} if short else dict(setting or {})
        for key in full:
            if key not in ("source", "tokens", "pad_to_multiple_of"):
                raise RecipeError(f"tokenizer: unknown key {key!r}. {did_you_mean(key, ['source', 'tokens'])}")
        result = _unify(full, models, base)
        files |= result.files
    if document.get("chat_template"):
        files["chat_template.jinja"] = _template(str(document["chat_template"]), models).encode()
    return Result(result.tables, files, result.removed, result.config, result.notes)


def notes_on_tokenizers(models: Mapping[str, object]) -> list[str]:
    """Say where models give a row to different tokens, as tokenizers of one size may.

    Args:
        models: By what to call them; the first one gives the result its tokenizer.
    """
    found: dict[str, bytes] = {}
    for name, model in models.items():
        if isinstance(model, Checkpoint) and (path := _tokenizer_of(model)):
            found[name] = path.read_bytes()
    if len(set(found.values())) < 2:
        return []
    first, *others = found
    mine = _tokens_by_row(found[first])
    notes = []
    for other in others:
        theirs = _tokens_by_row(found[other])
        rows = [row for row, token in mine.items() if theirs.get(row, token) != token]
        if rows:
            notes.append(
                f"{other} has other tokens than {first} in {len(rows)} rows, such as {theirs[rows[0]]!r} for "
                f"{mine[rows[0]]!r}, and they are merged all the same; tokenizer: {{source: union}} in a mergekit file "
                "brings equal tokens together"
            )
    return notes


def _tokens_by_row(text: bytes) -> dict[int, str]:
    """Return the token of each row in a ``tokenizer.json``; nothing where it cannot be read."""
    try:
        return {row: token for token, row in _token_ids(json.loads(text), "").items()}
    except (ValueError, UnsupportedError):
        return {}


def _unify(setting: Mapping[str, Any], models: Mapping[str, Checkpoint], base: str) -> Result:
    source = str(setting.get("source") or "union")
    if source not in ("union", "base", *models):
        raise RecipeError(f"tokenizer.source is {source!r}, expected union, base or a model of the file.")
    owner = base if source in ("union", "base") else source
    tokenizers = {name: read_json(_tokenizer_path(model), model.name) for name, model in models.items()}
    known = {name: _token_ids(tokenizer, models[name].name) for name, tokenizer in tokenizers.items()}
    forced: dict[str, Mapping[str, Any]] = dict(setting.get("tokens") or {})
    for token, choice in forced.items():
        if not isinstance(choice, Mapping):
            raise RecipeError(f"tokenizer.tokens[{token!r}] is {choice!r}, expected {{source: …}}, perhaps with force.")
    tokens = dict(known[owner])
    others = sorted({token for ids in known.values() for token in ids} - tokens.keys()) if source == "union" else []
    wanted = dict.fromkeys([*others, *forced])
    added = dict(zip((token for token in wanted if token not in tokens), count(max(tokens.values(), default=-1) + 1)))
    tokens |= added
    multiple = int(setting.get("pad_to_multiple_of") or 1)
    size = -(-(max(tokens.values()) + 1) // multiple) * multiple
    rows = {name: _rows(tokens, known[name], size, _table_rows(model)) for name, model in models.items()}
    chosen = {tokens[token]: _choice(token, choice, models, known) for token, choice in forced.items()}
    always = [tokens[token] for token, choice in forced.items() if choice.get("force")]
    tables = {name: _vocabulary(name, models, rows, base, chosen, always) for name in models}
    notes = [f"vocabulary: {size} rows, {len(added)} tokens added to {models[owner].name}'s"]
    files = {path.name: path.read_bytes() for path in models[owner].companions() if path.name in TOKENIZER_FILES}
    if added:
        # Only tokenizer.json learns of the new tokens, so that no older form of the vocabulary may stay beside it.
        files = {name: text for name, text in files.items() if name not in (*VOCABULARY_FILES, *VOCABULARY_PARTS)}
        files["tokenizer.json"] = _extended(tokenizers[owner], added, tokenizers)
    return Result(tables, files, [name for name in TOKENIZER_FILES if name not in files], {"vocab_size": size}, notes)


def _rows(tokens: Mapping[str, int], ids: Mapping[str, int], size: int, limit: int) -> Tensor:
    """Return a model's own row for each row of the result; −1 where its tokenizer or its tables do not have it."""
    rows = torch.full((size,), MISSING)
    shared = [(place, ids[token]) for token, place in tokens.items() if ids.get(token, limit) < limit]
    if shared:
        places, own = torch.tensor(shared).T
        rows[places] = own
    return rows


def _table_rows(model: Checkpoint) -> int:
    """Return how many rows all vocabulary tables of a model have; its tokenizer may know more tokens."""
    return min((model.spec(name).shape[0] for name in model if is_vocabulary(name)), default=0)


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
    if model not in models or row is None:
        raise RecipeError(f"tokenizer.tokens[{token!r}]: {source!r} names no token of a model of the file.")
    if not 0 <= int(row) < (limit := _table_rows(models[model])):
        raise RecipeError(f"tokenizer.tokens[{token!r}]: {model} has {limit} rows, so there is no row {row}.")
    return model, int(row)


def _token_ids(tokenizer: Mapping[str, Any], owner: str) -> dict[str, int]:
    """Return the vocabulary in a model's ``tokenizer.json``."""
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):
        ids = {str(item[0]): position for position, item in enumerate(vocabulary)}
    elif isinstance(vocabulary, dict):
        ids = {str(token): int(position) for token, position in vocabulary.items()}
    else:
        raise UnsupportedError(f"{owner}: its tokenizer.json holds no vocabulary that can be read.")
    return ids | {str(item["content"]): int(item["id"]) for item in tokenizer.get("added_tokens") or []}


def _tokenizer_of(model: Checkpoint) -> Path | None:
    return next((path for path in model.companions() if path.name == "tokenizer.json"), None)


def _tokenizer_path(model: Checkpoint) -> Path:
    found = _tokenizer_of(model)
    if found is None:
        raise UnsupportedError(f"{model.name} has no tokenizer.json. Save its tokenizer with transformers first.")
    return found


def _extended(tokenizer: Mapping[str, Any], added: Mapping[str, int], others: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return a tokenizer with tokens appended, which keep the settings that they had in their own."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    settings: dict[str, Mapping[str, Any]] = {}
    for other in others.values():
        for item in other.get("added_tokens") or []:
            settings.setdefault(str(item["content"]), item)
    entries = [
        {**plain, **settings.get(token, {}), "id": position, "content": token} for token, position in added.items()
    ]
    data = {**tokenizer, "added_tokens": [*(tokenizer.get("added_tokens") or []), *entries]}
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _template(setting: str, models: Mapping[str, Checkpoint]) -> str:
    shipped = {path.name.removesuffix(".jinja"): path for path in TEMPLATES.iterdir()}
    if setting in shipped:
        return shipped[setting].read_text(encoding="utf-8").removesuffix("\n")
    if setting == "auto":
        texts = [
            path.read_text() for m in models.values() for path in m.companions() if path.name == "chat_template.jinja"
        ]
        if not texts:
            raise RecipeError(
                "chat_template is auto, but no model has a chat template. Name one, or remove the setting."
            )
        return Counter(texts).most_common(1)[0][0]
    if "{" in setting:
        return setting
    raise RecipeError(f"chat_template {setting!r} is not known. {did_you_mean(setting, [*sorted(shipped), 'auto'])}")
