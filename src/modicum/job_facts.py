"""Facts of jobs, and of what jobs read: data sources and kinds of rows; see :mod:`modicum.facts`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modicum.facts import Facts


@dataclass(frozen=True, kw_only=True)
class JobFacts(Facts):
    """Facts of a job.

    Attributes:
        plan: Says what a recipe would read, compute and write, a line each.
        distributed: It runs on several processes.
        incremental: It keeps what is done when its recipe changes: ``(old recipe, new recipe)`` tells whether the one
            is an earlier form of the other.
        shared: Several processes may run it in one folder: who comes second helps the first.
        spreads: It runs stages, which an executor may spread over processes and machines.
        makes_like: ``recipe -> reference or None``: a model of the shape of its first output, or a reference to the
            stage that makes one; a later stage is checked on it.
        outputs: ``recipe -> names``: what later stages may ask of it, first what they get without asking for a name;
            ``None`` where only its run tells. A model is called ``model``, an adapter ``adapter``.
        needs_whole: ``recipe -> references``: the models that it reads and that may be no adapters.
        foreseeable: ``recipe -> bool``: its plan takes a whole model where it will be given an adapter.
        lighter: What makes it take less memory, as a sentence; told to whom memory ran out.
    """

    plan: Callable[..., list[str]] | None = None
    distributed: bool = False
    incremental: Callable[[Mapping[str, Any], Any], bool] | None = None
    shared: bool = False
    spreads: bool = False
    makes_like: Callable[[Any], str | None] | None = None
    outputs: Callable[[Any], Sequence[str] | None] = lambda _: None
    needs_whole: Callable[[Any], Iterable[str]] = lambda _: ()
    foreseeable: Callable[[Any], bool] | None = None
    lighter: str = "Lower batch_size or max_length, or free some memory."


def _nothing(*_: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class SourceFacts(Facts):
    """Facts of a data source.

    Attributes:
        open_config: ``data.config`` goes to another library, which checks it; else its keys are the source's knobs.
        inputs: ``(section, name) -> files``: what of this machine is read, which identifies a run.
    """

    supplied: Collection[str] = frozenset({"seed", "note"})
    open_config: bool = False
    inputs: Callable[[Any, str], Iterable[str]] = _nothing


@dataclass(frozen=True, kw_only=True)
class RowKindFacts(Facts):
    """Facts of a kind of rows.

    Attributes:
        fields: Fields that a row has; one that has them all is of this kind.
        order: Where a row could be of two kinds, it is of that with the smaller number.
        tokenize: ``(rows, tokenizer, section, note) -> data set`` of token ids and labels.
        surrounds: Keys of a data section whose text it puts around a prompt; the others are refused.
    """

    fields: tuple[str, ...]
    order: int
    tokenize: Callable[..., Any]
    surrounds: Collection[str] = ("template", "system")
