"""What a seam needs to know of a method, one frozen dataclass for each table.

A decorator's keywords are the fields here: ``@merge_method("tsv", matrix=True)`` makes ``MergeFacts(matrix=True)``. An
unknown keyword, or a law that the table does not know, is a ``TypeError`` when the method's file is imported; mypy sees
it before. A seam reads ``entry.facts.matrix``, and never asks for a method by its name.

Each table also lists the laws that its methods may declare, with what they mean. ``tests/contracts/laws.py`` holds a
checker for every one of them, so what ``modicum show`` prints has been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from modicum.types import MEASURES_GET

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of any method.

    Attributes:
        paper: Where it was published.
        laws: Laws that it obeys, of those in ``known_laws``.
        supplied: Parameters that the seam gives, which are therefore no knobs.
        gather: A dataclass of further knobs: those of collecting the method's data.
    """

    known_laws: ClassVar[Mapping[str, str]] = _NONE

    paper: str | None = None
    laws: Collection[str] = frozenset()
    supplied: Collection[str] = frozenset()
    gather: type | None = None

    @property
    def further(self) -> tuple[Callable[..., Any], ...]:
        """Whose parameters are knobs too, beside those of the method itself."""
        return (self.gather,) if self.gather else ()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.laws) - self.known_laws.keys()):
            raise TypeError(f"{type(self).__name__} knows no law {', '.join(unknown)}; add it to known_laws.")


@dataclass(frozen=True, kw_only=True)
class MergeFacts(Facts):
    """Facts of a merge method.

    Attributes:
        base: It needs a base model.
        experts: How many experts it takes at least.
        most: How many it takes at most.
        two: It goes between two models: a base and one expert, or two experts.
        matrix: It decomposes matrices; all other tensors are averaged.
        factors: It gives the same result in any orthonormal basis of a matrix' outputs (``"left"``), or of outputs and
            inputs (``"both"``), so it can merge LoRA experts without leaving their factors.
        floats: How many float32 numbers it holds for each entry of a tensor at a time, besides blocks and its result,
            or ``(experts, knobs)`` that returns it; for the bound on memory.
        statistics: It weighs the experts by what was measured on their data, and is refused without.
        measure: What the job ``statistics`` measures for it: squared gradients, or Gram matrices of layers' inputs.
        survey: Looks at the whole model first: ``(each, **knobs) -> knobs``.
        bound: The multiple of the law ``bounded``; times one over the share that is kept, where entries are dropped.
    """

    known_laws = MappingProxyType(
        {
            "bounded": "the merged delta, or the result where there is no base, is no longer than `bound` times all "
            "experts' together, in the sum of squares or of magnitudes; knobs that extrapolate are excepted",
            "copies": "with default knobs, and nothing dropped, experts that are all equal are returned as they are",
            "propagates": "a NaN or an infinity in a model is one in the result, unless its weight, or `scale`, is 0",
            "permutation": "the order of the experts, and of their weights, does not matter",
            "scale": "multiplying every delta, or `scale` where it applies, multiplies the merged delta",
            "shift": "adding one tensor to base and experts adds it to the result",
            "transpose": "merging transposed matrices gives the transposed result",
            "zero_delta": "experts that equal the base return the base",
        }
    )

    base: bool = True
    experts: int = 1
    most: int | None = None
    two: bool = False
    matrix: bool = False
    factors: Literal["left", "both"] | None = None
    floats: float | Callable[[int, Mapping[str, Any]], float] = 0.0
    statistics: Literal["required"] | None = None
    measure: Literal["fisher", "gram"] | None = None
    survey: Callable[..., Mapping[str, Any]] | None = None
    bound: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AveragerFacts(Facts):
    """Facts of an averager.

    Attributes:
        learns: It searches the coefficients by a loss: of its values, or of its gradients too.
        work: ``(n, batches, **knobs) -> (gradients, least, most)``: how many passes over a batch it takes with so many
            checkpoints and batches, with a gradient, and from how many to how many without.
    """

    learns: Literal["value", "gradient"] | None = None
    work: Callable[..., tuple[int, int, int]] | None = None


@dataclass(frozen=True, kw_only=True)
class GradientFacts(Facts):
    """Facts of a gradient rule.

    Attributes:
        acts: It looks into single tensors, ``"before"`` the optimiser's step or ``"after"`` it; ``None`` for a rule on
            the norms of all tensors.
        state: The type of its memory.
        weight_sized_state: The knob that makes it remember a number for each weight.
        advice: ``(knobs, *, steps)`` returns what to tell the user of a run of so many steps.
    """

    known_laws = MappingProxyType(
        {
            "factor_at_most_one": "no gradient or update gets longer",
            "local": "after any warm-up, what happens to a tensor depends on that tensor alone",
            "permutation": "the order of the tensors does not matter",
            "scale": "multiplying all gradients of a run multiplies what comes out, but for `eps` and any warm-up",
        }
    )

    acts: Literal["before", "after"] | None = None
    state: type | None = None
    weight_sized_state: str | None = None
    advice: Callable[..., Collection[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveFacts(Facts):
    """Facts of an objective.

    Attributes:
        acts_on: What it changes (``input_ids``, ``inputs_embeds``, ``hidden_states``), judges (``answers``), compares
            (``pairs``), or reads: ``reasoning``, or an answer to be turned away (``contrasts``). The training part that
            serves the objective goes by this; a recipe that no part serves is refused.
        differentiable: Its loss has a gradient.
        loss_head: It labels a small share of its tokens, or weighs them, so that its loss is taken at these positions
            alone.
        whole_rows: It copies whole rows, so a row must not pack several documents.
        answers: How an objective over answers gets them: the logits of label words that all rows share, the
            likelihoods of each row's own candidates, or a text that the model generates and a scorer judges.
        right_alone: Knobs under which training reads the right candidate alone.
    """

    known_laws = MappingProxyType(
        {
            "clean_rows_kept": "the clean rows stand in the batch as they came",
            "identity": "the batch is returned as it came",
            "labels_untouched": "labels stay as they are",
            "mask_share": "the share of masked tokens is `ratio`",
        }
    )

    acts_on: str = "input_ids"
    differentiable: bool = True
    loss_head: bool = False
    whole_rows: bool = False
    answers: Literal["words", "candidates", "generated"] = "candidates"
    right_alone: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdapterFacts(Facts):
    """Facts of an adapter initialisation.

    A method's positional parameters name the data that the seam collects for each module: ``weight``, ``gradient``,
    ``moment``, or ``A`` and ``B`` of a preheated adapter.

    Attributes:
        shape_only: It needs the shape of a weight, not its values.
        most_rank: ``(outputs, inputs)`` gives the highest rank at which it can start a module of this shape, to which
            higher ones are clipped; ``None`` where there is no bound.
        preheated: It starts from an adapter of higher rank that is trained first, as HRP does; the mapping holds the
            knobs of ``hrp_factors`` that it fixes.
        shifts_base: The base's weights change by the initial product, which is taken out of the saved adapter.
        frozen: The factor that is not trained.
        core: It trains a small matrix between two frozen factors.
        stock: PEFT draws the first factors itself; the function documents them.
        requires: Raises ``UnsupportedError`` where the machine lacks something that the method needs.
        config: Fields of ``peft.LoraConfig``, or ``(knobs, *, rank, **fields)`` that makes another of PEFT's
            configurations.
        schedule: ``(config, knobs, *, total_steps)`` tells the adapter's configuration the length of the run.
        optimizer: ``(peft_model, knobs, *, lr, weight_decay)`` makes the optimiser that the method brings along.
        after_backward: ``(peft_model, step)`` sees the gradients of every optimiser step.
        memory: ``(peft_model)`` gives, as tensors by name, what it remembers of the steps before; a resumed run gives
            them to ``recall``.
        recall: ``(peft_model, tensors)``.
        before_save: ``(config)`` takes out of the adapter's configuration what PEFT cannot save.
        plain: ``(tensors, config)`` makes the tensors and configuration of a saved adapter those of plain LoRA.
    """

    known_laws = MappingProxyType(
        {
            "best_rank": "with default knobs, the product is the best approximation of its rank",
            "orthogonal_rows": "the rows of A are orthogonal",
            "zero_product": "with default knobs, the adapter changes nothing before it is trained",
        }
    )

    shape_only: bool = False
    most_rank: Callable[[int, int], int] | None = None
    preheated: Mapping[str, Any] | None = None
    shifts_base: bool = False
    frozen: Literal["A", "B"] | None = None
    core: bool = False
    stock: bool = False
    requires: Callable[[], None] | None = None
    config: Mapping[str, Any] | Callable[..., Any] = field(default_factory=dict)
    schedule: Callable[..., None] | None = None
    optimizer: Callable[..., Any] | None = None
    after_backward: Callable[[Any, int], None] | None = None
    memory: Callable[[Any], dict[str, Any]] | None = None
    recall: Callable[[Any, Mapping[str, Any]], None] | None = None
    before_save: Callable[[Any], None] | None = None
    plain: Callable[..., tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None


@dataclass(frozen=True, kw_only=True)
class ZerothOrderFacts(Facts):
    """Facts of a zeroth-order optimiser."""


@dataclass(frozen=True, kw_only=True)
class PolicyFacts(Facts):
    """Facts of a policy of submodular coordination.

    Attributes:
        step: The knob that scales its step, which a grid tunes; ``None`` where there is none.
        grid: Gives the values of that knob to try, from the sizes of the agents' blocks, where a recipe's grid of steps
            is not meant.
        hints: What its ``act`` makes of a predicted objective: ``rounds`` played on it, a choice on the ``whole``, the
            ``truth`` that it must be shown, or ``None``.
    """

    step: str | None = None
    grid: Callable[[Sequence[int]], Sequence[float]] | None = None
    hints: Literal["rounds", "whole", "truth"] | None = None


@dataclass(frozen=True, kw_only=True)
class AttackFacts(Facts):
    """Facts of an attack.

    Attributes:
        licence: Of the wrappers that it reads from installed packages, or of its own words.
        source: Where the wrappers come from.
        needs_model: It asks a model of the user's own to reword the goal.
        wrappers: Family of templates in installed packages from which a recipe takes its own where it names none.
        decode: ``(prompt, **knobs)`` reads the goal out of a prompt again.
        example: A value for a knob that has no default, for tests of laws.
    """

    known_laws = MappingProxyType(
        {
            "reversible": "the goal can be read out of the prompt again",
            "verbatim": "the prompt holds the goal word for word",
        }
    )

    licence: str = "Apache-2.0"
    source: str = "this package"
    needs_model: bool = False
    wrappers: str | None = None
    decode: Callable[..., str] | None = None
    example: str | None = None


@dataclass(frozen=True, kw_only=True)
class JudgeFacts(Facts):
    """Facts of a judge.

    Attributes:
        answers: What it tells: ``unsafe``, ``refusal`` or both.
        approximate: It goes by words, not by meaning; reports say so beside every figure.
        asks_model: Its first parameter is a chat model.
        learns: It learns from answers that people have labelled, and measures its errors on those it held out.
    """

    answers: Collection[str] = frozenset({"unsafe"})
    approximate: bool = False
    asks_model: bool = True
    learns: bool = False


@dataclass(frozen=True, kw_only=True)
class PartFacts(Facts):
    """Facts of a training part.

    Attributes:
        section: Type of the recipe's key that asks for the part and has its name; ``None`` for a part that looks at
            other keys.
        description: What ``modicum show train`` says of the key.
        order: Parts are called, and keys are shown, from the smallest number to the largest.
    """

    section: Any = None
    description: str | None = None
    order: int = 50


@dataclass(frozen=True, kw_only=True)
class MeasureFacts(Facts):
    """Facts of a measure of models.

    Its functions get by keyword what their signatures name: knobs, which keyword-only parameters of ``estimate`` and
    ``prepare`` are too, and what the job supplies (:mod:`modicum.jobs.task`): confidence, seed, readers, other models.

    Attributes:
        rows: Kind of the rows of data that it needs.
        better: Which values are the better ones.
        estimate: ``(items, …) -> Estimate``: what the items sum up to.
        difference: ``(items of a, items of b, …) -> Estimate`` of a − b on the same items.
        unit: ``share`` for shares of one, which read better as percentages.
        metric: Name of its values; the measure's own when not given. A knob called ``metric`` chooses another.
        compares: Metric of the differences, where it is not that of the values.
        data: The data section where a recipe has none.
        prepare: ``(load, …) -> rows``: makes what is asked out of the data, which ``load()`` reads.
        details: ``(items, …) -> mapping``: what else of a cell is kept, ``beside`` by label what is shown with it.
        work: ``(count, …) -> text``: what is done with so many rows, for the plan.
        check: ``(…)``: refuses knobs that do not fit together.
        reads: Knobs that name files or models, whose content identifies a run.
        brings: ``(…) -> references``: what the data names in turn, whose content identifies a run too.
    """

    known_laws = MappingProxyType(
        {"right_is_better": "who answers as expected, or finds it likelier, has the better value"}
    )

    rows: str
    better: Literal["higher", "lower"]
    estimate: Callable[..., Any]
    difference: Callable[..., Any]
    unit: Literal["share", "number"] = "number"
    metric: str | None = None
    compares: str | None = None
    data: Mapping[str, Any] | None = None
    prepare: Callable[..., Any] | None = None
    details: Callable[..., Mapping[str, Any]] | None = None
    work: Callable[..., str] | None = None
    check: Callable[..., None] | None = None
    reads: tuple[str, ...] = ()
    brings: Callable[..., Iterable[str]] | None = None
    supplied: Collection[str] = MEASURES_GET

    @property
    def further(self) -> tuple[Callable[..., Any], ...]:
        """Whose parameters are knobs too, beside those of the method itself."""
        return (*super().further, self.estimate, *([self.prepare] if self.prepare else []))
