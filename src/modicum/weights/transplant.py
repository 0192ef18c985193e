r"""Another tokenizer for a model: its tables get the rows of new tokens from what both vocabularies share.

A token that both have keeps the model's own row. A new token's row in the donor, :math:`e`, is written as a combination
of the donor's rows of shared tokens, and the same combination of the model's rows of these tokens is its row:

.. math::
    e \approx \sum_{j \in S} c_j d_j, \qquad m = \sum_{j \in S} c_j m_j

Orthogonal matching pursuit (``omp``) picks one shared token after the other, the one that the rest points to most, and
fits all coefficients anew by least squares; ``nearest`` takes the closest ones by angle, weighed by their cosines.

Reference:
    Pati, Rezaiifar and Krishnaprasad, "Orthogonal Matching Pursuit: Recursive Function Approximation with Applications
    to Wavelet Decomposition", Asilomar 1993. Goddard and Fernandes Neto, "Training-Free Tokenizer Transplantation via
    Orthogonal Matching Pursuit", 2025, arXiv:2506.06607.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.layout import TOKENIZER_FILES, role, token_axis
from modicum.vocabulary import token_ids
from modicum.weights.adapter import read_json
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.companions import companion_files
from modicum.weights.configs import rewritten, text_of
from modicum.weights.files import Spec, digest_tensor
from modicum.weights.mergekit.tokenizers import ENDS, Converter, read_tokenizer, spelt
from modicum.weights.mergekit.vocabulary import Result, companions_with
from modicum.weights.plan import Plan, Source, kept, parse_dtype
from modicum.weights.retabled import Retabled, rows_of

# What a token stands for, and whether it is a byte for texts without a token: ``<0x41>`` is seldom read, ``A`` often.
Spelling = tuple[bytes | str, bool]
Way = Literal["omp", "nearest", "mean", "zero"]
BLOCK = 512  # new tokens at a time
GENERATION = "generation_config.json"
SHARED = 16  # tokens that both vocabularies must have at least


class Combination(NamedTuple):
    """Which atoms make up each target ``(targets, k)``, and how much of each."""

    places: Tensor
    coefficients: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """Return the same combination of other rows, in float32."""
        return torch.einsum("tk,tkd->td", self.coefficients.float(), rows[self.places].float())


def pursue(targets: Tensor, atoms: Tensor, *, k: int) -> Combination:
    """Write each target as a combination of at most ``k`` atoms by orthogonal matching pursuit.

    Args:
        targets: ``(n, width)``.
        atoms: ``(m, width)``.
        k: Atoms of each; at most the width and ``m``.

    Returns:
        Places of the atoms in the order in which they were picked, and their coefficients by least squares.

    Example:
        >>> found = pursue(torch.tensor([[3.0, 4.0]]), torch.eye(2), k=2)
        >>> found.places.tolist(), found.coefficients.round().tolist()
        ([[1, 0]], [[4.0, 3.0]])

    Cost:
        ``k`` products of all targets with all atoms.
    """
    targets, atoms = targets.double(), atoms.double()
    n, k = len(targets), min(k, *atoms.shape)
    directions = atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-12)
    places = torch.zeros(n, 0, dtype=torch.long)
    rest, coefficients = targets, torch.zeros(n, 0, dtype=torch.float64)
    taken = torch.zeros(n, len(atoms), dtype=torch.bool)
    for _ in range(k):
        towards = (rest @ directions.T).abs().masked_fill_(taken, -1)
        best = towards.argmax(1, keepdim=True)
        taken.scatter_(1, best, True)
        places = torch.cat([places, best], 1)
        chosen = atoms[places]  # (n, picked, width)
        gram = chosen @ chosen.mT
        # Of atoms that are nearly dependent the least squares are damped, so that no coefficient runs away.
        ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(places.shape[1])
        coefficients = torch.linalg.solve(
            gram + ridge + 1e-30 * torch.eye(places.shape[1]), chosen @ targets[..., None]
        )[..., 0]
        rest = targets - (coefficients[:, None] @ chosen)[:, 0]
    return Combination(places, coefficients)


def neighbours(targets: Tensor, atoms: Tensor, *, k: int) -> Combination:
    """Write each target as the mean of its ``k`` closest atoms by angle, weighed by their cosines.

    Example:
        >>> neighbours(torch.tensor([[1.0, 0.1]]), torch.eye(2), k=1).places.tolist()
        [[0]]
    """
    unit = torch.nn.functional.normalize
    cosines, places = (unit(targets.double()) @ unit(atoms.double()).T).topk(min(k, len(atoms)), dim=1)
    weights = cosines.clamp_min(1e-6)
    return Combination(places, weights / weights.sum(1, keepdim=True))


class Transplanted(Retabled):
    """A model with the tables of another vocabulary.

    Args:
        model: The model.
        donor: Whose vocabulary it gets.
        rows: For each row of the result the model's own row of that token, -1 where there is none.
        tokens: Whether a row of the result has a token at all.
        way: How rows of new tokens are made.
        k: Shared tokens of each combination.
    """

    def __init__(self, model: Checkpoint, donor: Checkpoint, rows: Tensor, tokens: Tensor, *, way: Way, k: int) -> None:
        super().__init__(model, len(rows), [donor])
        self.donor, self.rows, self.tokens, self.way, self.k = donor, rows, tokens, way, k

    @property
    def identity(self) -> list[object]:
        """What its tensors depend on."""
        return [self.model.identity, self.donor.identity, digest_tensor(self.rows), self.way, self.k]

    @cached_property
    def new(self) -> Tensor:
        """Rows of the result that are made."""
        return (self.tokens & (self.rows < 0)).nonzero().view(-1)

    def table(self, name: str, own: Tensor) -> Tensor:
        """Return the rows of shared tokens, and those made for new ones."""
        shared = (self.rows >= 0).nonzero().view(-1)
        kept_rows = own.index_select(0, self.rows[shared])
        mean = kept_rows.mean(0, dtype=torch.float32)
        out = mean.to(own.dtype).expand(self.size, *own.shape[1:]).clone()
        out[shared] = kept_rows
        if self.way == "zero":
            out[self.new] = 0
        elif self.way != "mean" and own.ndim == 2:
            source = self._like(name)
            atoms = source.index_select(0, shared)
            for block in torch.split(self.new, BLOCK):
                targets = source.index_select(0, block)
                make = pursue if self.way == "omp" else neighbours
                out[block] = make(targets, atoms, k=self.k).of(kept_rows).to(own.dtype)
        return out

    def _like(self, name: str) -> Tensor:
        """Return the donor's table of the same role; its embedding where it has no such one."""
        tables = [other for other in self.donor if token_axis(other) == 0 and self.donor.spec(other).shape[1:]]
        same = [other for other in tables if role(other) == role(name)]
        return self.donor[(same or tables)[0]]


@dataclass(frozen=True)
class Found:
    """The plan of a transplant, and how many tokens are shared and new."""

    plan: Plan
    shared: int
    new: int


def plan_transplant(
    model: Checkpoint,
    donor: Checkpoint,
    *,
    way: Way = "omp",
    k: int = 64,
    dtype: str | torch.dtype | None = None,
    convert: Converter | None = None,
) -> Found:
    """Return the plan of giving ``model`` the tokenizer of ``donor``.

    Args:
        model: The model.
        donor: Whose tokenizer it gets; its embedding says what new tokens are like.
        way: ``omp``, ``nearest``, or ``mean`` and ``zero`` for rows that are to be trained.
        k: Shared tokens of each combination.
        dtype: Of the result; that of the model when not given.
        convert: See :func:`.mergekit.tokenizers.read_tokenizer`.

    Raises:
        RecipeError: The vocabularies share hardly a token.
        UnsupportedError: A model has no tokenizer, or the donor no embedding.
    """
    tokenizers = [read_tokenizer(each, convert) for each in (model, donor)]
    for each, tokenizer in zip((model, donor), tokenizers):
        if tokenizer is None:
            raise UnsupportedError(f"{each.name} has no tokenizer. Save it beside the model with transformers first.")
    mine, theirs = (_spelt(t, each.name) for each, t in zip((model, donor), tokenizers) if t is not None)
    size, limit, known = rows_of(donor), rows_of(model), _rows_by_spelling(mine)
    rows, tokens = torch.full((size,), -1), torch.zeros(size, dtype=torch.bool)
    for row, token in theirs.items():
        if row < size:
            tokens[row] = True
            rows[row] = own if (own := known.get(token, limit)) < limit else -1
    shared = int((rows >= 0).sum())
    if shared < min(SHARED, len(theirs)):
        raise RecipeError(
            f"{model.name} and {donor.name} share {shared} tokens, too few to make others of. Choose another donor."
        )
    table, wanted = Transplanted(model, donor, rows, tokens, way=way, k=k), parse_dtype(dtype)
    steps = [kept(Spec(spec.shape, wanted) if wanted and spec.dtype.is_floating_point else spec,
                  Source(model.name, table, name))
             for name in model for spec in [table.spec(name)]]  # fmt: skip
    files = {path.name: path.read_bytes() for path in donor.companions() if path.name in TOKENIZER_FILES}
    removed = [name for name in TOKENIZER_FILES if name not in files]
    ends = {key: value for key, value in text_of(donor.config).items() if key in ENDS}
    told = Result({}, files, removed, ids=(mine, _rows_by_spelling(theirs)))
    before = companion_files(model, wanted, vocab_size=size, **dict.fromkeys(ends))  # these are the donor's
    if GENERATION in before:
        settings = {key: value for key, value in json.loads(before[GENERATION]).items() if key not in ENDS}
        before[GENERATION] = json.dumps(settings).encode()
    companions = companions_with(told, before)
    if "config.json" in companions:
        config = rewritten(json.loads(companions["config.json"]), **ends)
        companions["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    if GENERATION in companions:
        settings = json.loads(companions[GENERATION])
        file = next((path for path in donor.companions() if path.name == GENERATION), None)
        given = {} if file is None else read_json(file, donor.name)
        settings |= ends | {key: value for key, value in given.items() if key in ENDS}
        companions[GENERATION] = (json.dumps(settings, indent=2) + "\n").encode()
    return Found(Plan(steps, [model, donor], companions, told.notes), shared, len(table.new))


def _spelt(tokenizer: Mapping[str, Any], name: str) -> dict[int, Spelling]:
    """Return what a vocabulary's tokens stand for, by their rows."""
    added = {**tokenizer, "added_tokens": []}
    special = {str(each.get("content")) for each in tokenizer.get("added_tokens") or ()}
    ids = token_ids(tokenizer, name)
    return {
        row: (token, False) if token in special else (spelt(token, added), bool(re.fullmatch("<0x[0-9A-F]{2}>", token)))
        for token, row in ids.items()
    }


def _rows_by_spelling(spellings: Mapping[int, Spelling]) -> dict[Spelling, int]:
    """Return the row of each token; of a byte that is spelt in one way only, that row for both."""
    found = {spelling: row for row, spelling in spellings.items()}
    return {(text, not byte): row for (text, byte), row in found.items()} | found
