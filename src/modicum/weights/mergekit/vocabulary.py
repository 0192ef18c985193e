"""Models of different vocabularies brought to one: every row of an embedding finds its token's place.

Rows are gathered with one indexed selection for each model, never token by token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError, did_you_mean
from modicum.layout import TOKENIZER_FILES, is_vocabulary
from modicum.weights.adapter import read_json
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import Spec, digest_tensor

MISSING, ZEROS = -1, -2  # in place of a model's own row
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    "alpaca": "{% for m in messages %}### {% if m['role'] == 'user' %}Instruction"
    "{% elif m['role'] == 'assistant' %}Response{% else %}System{% endif %}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}",
    "exaone": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}[|system|][|endofturn|]\n{% endif %}"
    "[|{{ m['role'] }}|]{{ m['content'] }}{{ '\n' if m['role'] == 'user' else '[|endofturn|]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[|assistant|]{% endif %}",
}  # fmt: skip


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
        width = self.model.spec(name).shape[1]
        total, count = torch.zeros(len(missing), width), torch.zeros(len(missing), 1)
        for donor, rows in self.donors:
            if name in donor:
                wanted = rows[missing]
                have = wanted >= 0
                total[have] += donor[name].index_select(0, wanted[have]).float()
                count[have] += 1
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


def _unify(setting: Mapping[str, Any], models: Mapping[str, Checkpoint], base: str) -> Result:
    source = str(setting.get("source") or "union")
    if source not in ("union", "base", *models):
        raise RecipeError(f"tokenizer.source is {source!r}, expected union, base or a model of the file.")
    owner = models[base if source in ("union", "base") else source]
    known = {name: _token_ids(model) for name, model in models.items()}
    tokens = dict(known[next(name for name, model in models.items() if model is owner)])
    added = sorted({token for ids in known.values() for token in ids} - set(tokens)) if source == "union" else []
    for token in added:
        tokens[token] = max(tokens.values()) + 1
    forced = dict(setting.get("tokens") or {})
    for token in forced:
        if token not in tokens:
            tokens[token] = max(tokens.values()) + 1
            added.append(token)
    size = max(tokens.values()) + 1
    multiple = int(setting.get("pad_to_multiple_of") or 1)
    size = -(-size // multiple) * multiple
    rows = {name: _rows(tokens, known[name], size) for name in models}
    donors = {name: (model, rows[name]) for name, model in models.items()}
    tables = {}
    for name, model in models.items():
        mine, gifts = rows[name].clone(), _donors(donors, base, rows)
        for token, choice in forced.items():
            gifts = _redirect(token, choice, tokens[token], mine, gifts, models, known)
        tables[name] = Vocabulary(model, size, mine, gifts)
    files = {path.name: path.read_bytes() for path in owner.companions() if path.name in TOKENIZER_FILES}
    if added:
        files["tokenizer.json"] = _extended(owner, {token: tokens[token] for token in added}, models)
    notes = [f"vocabulary: {size} rows, {len(added)} tokens added to {owner.name}'s"]
    return Result(tables, files, [name for name in TOKENIZER_FILES if name not in files], {"vocab_size": size}, notes)


def _rows(tokens: Mapping[str, int], ids: Mapping[str, int], size: int) -> Tensor:
    rows = torch.full((size,), MISSING)
    shared = [(place, ids[token]) for token, place in tokens.items() if token in ids]
    if shared:
        places, own = torch.tensor(shared).T
        rows[places] = own
    return rows


def _donors(
    donors: Mapping[str, tuple[Checkpoint, Tensor]], base: str, rows: Mapping[str, Tensor]
) -> list[tuple[Checkpoint, Tensor]]:
    """Give the base's row where it has one, else those of all owners."""
    base_rows = rows[base]
    others = [
        (model, torch.where(base_rows >= 0, torch.full_like(own, MISSING), own))
        for name, (model, own) in donors.items()
        if name != base
    ]
    return [donors[base], *others]


def _redirect(
    token: str,
    choice: Mapping[str, Any],
    place: int,
    mine: Tensor,
    gifts: list[tuple[Checkpoint, Tensor]],
    models: Mapping[str, Checkpoint],
    known: Mapping[str, Mapping[str, int]],
) -> list[tuple[Checkpoint, Tensor]]:
    """Make ``token``'s row come from where the file says, for models that lack it or, if forced, for all."""
    source = choice.get("source")
    if mine[place] >= 0 and not choice.get("force"):
        return gifts
    if isinstance(source, Mapping) and source.get("kind") == "zero":
        mine[place] = ZEROS
        return gifts
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        model, other = str(source.get("model")), source.get("token", token)
        row = source.get("token_id", known.get(model, {}).get(str(other)))
    else:
        model = str(source)
        row = known.get(model, {}).get(token)
    if model not in models or row is None:
        raise RecipeError(f"tokenizer.tokens[{token!r}]: {source!r} names no token of a model of the file.")
    mine[place] = MISSING
    only = torch.full_like(mine, MISSING)
    only[place] = int(row)
    silenced = []
    for donor, rows in gifts:
        rest = rows.clone()
        rest[place] = MISSING
        silenced.append((donor, rest))
    return [*silenced, (models[model], only)]


def _token_ids(model: Checkpoint) -> dict[str, int]:
    """Return the vocabulary in a model's ``tokenizer.json``."""
    path = _tokenizer_path(model)
    data = read_json(path, model.name)
    vocabulary = data.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):
        ids = {str(item[0]): position for position, item in enumerate(vocabulary)}
    elif isinstance(vocabulary, dict):
        ids = {str(token): int(position) for token, position in vocabulary.items()}
    else:
        raise UnsupportedError(f"{model.name}: its tokenizer.json holds no vocabulary that can be read.")
    return ids | {str(item["content"]): int(item["id"]) for item in data.get("added_tokens") or []}


def _tokenizer_path(model: Checkpoint) -> Path:
    found = next((path for path in model.companions() if path.name == "tokenizer.json"), None)
    if found is None:
        raise UnsupportedError(f"{model.name} has no tokenizer.json. Save its tokenizer with transformers first.")
    return found


def _extended(owner: Checkpoint, added: Mapping[str, int], models: Mapping[str, Checkpoint]) -> bytes:
    """Return the owner's tokenizer with tokens appended, special where they were special."""
    data = read_json(_tokenizer_path(owner), owner.name)
    special = {
        str(item["content"])
        for model in models.values()
        for item in read_json(_tokenizer_path(model), model.name).get("added_tokens") or []
        if item.get("special")
    }
    entries = [
        {"id": position, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": token in special}
        for token, position in added.items()
    ]  # fmt: skip
    data["added_tokens"] = [*(data.get("added_tokens") or []), *entries]
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _template(setting: str, models: Mapping[str, Checkpoint]) -> str:
    if setting in TEMPLATES:
        return TEMPLATES[setting]
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
    raise RecipeError(f"chat_template {setting!r} is not known. {did_you_mean(setting, [*TEMPLATES, 'auto'])}")
