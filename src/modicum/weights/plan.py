"""What a merge will do, tensor by tensor: decided and checked before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.content import fingerprint, is_old, old_fingerprint
from modicum.errors import CheckpointError, RecipeError, did_you_mean
from modicum.facts import MergeFacts
from modicum.layout import is_linear_map
from modicum.record import NUMERICS
from modicum.references import find_model
from modicum.registry import SUPPLIED, Entry, merge_method
from modicum.weights.aliases import aligned
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.companions import companion_files, unified
from modicum.weights.compatibility import (
    Tensors,
    check_agreement,
    check_remaining,
    excluded,
    is_weight,
    label,
    labels,
    notes_on_configs,
    notes_on_exclusion,
    notes_on_idle,
    notes_on_left_out,
    notes_on_zeros,
    spec_of,
)
from modicum.weights.files import Spec, digest_tensor
from modicum.weights.kernels.accelerator import workers_on
from modicum.weights.memory import needed
from modicum.weights.mergekit.tokenizers import Converter, notes_on_tokenizers
from modicum.weights.mergekit.vocabulary import Result, companions_with
from modicum.weights.rehearsal import rehearse
from modicum.weights.statistics import check_origin, check_statistics, shape_of
from modicum.weights.stream import cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Source:
    """A tensor of one of the models."""

    model: str
    tensors: Tensors = field(repr=False)
    name: str

    def read(self) -> Tensor:
        """Return the tensor."""
        return self.tensors[self.name]


@dataclass(frozen=True)
class Step:
    """How one tensor of the result is made; ``compared`` says whether its experts are measured beside each other."""

    name: str
    spec: Spec
    method: str
    base: Source | None
    experts: tuple[Source, ...]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    statistics: tuple[Source, ...] = ()
    diagnosed: bool = False
    compared: bool = True

    @property
    def models(self) -> tuple[Source, ...]:
        """The base, when there is one, and the experts."""
        return (*((self.base,) if self.base else ()), *self.experts)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every tensor that is read to make this one.

        The identity of an unfinished merge rests on it, so nothing may be read by another way.
        """
        return (*self.models, *self.statistics)

    @property
    def entry(self) -> Entry[MergeFacts]:
        """The method."""
        return merge_method[self.method]

    @property
    def averaged(self) -> bool:
        """Whether a method for matrices gives way to the mean of the deltas here."""
        return bool(self.entry.facts.matrix) and not self.is_linear_map

    @property
    def is_linear_map(self) -> bool:
        """Whether it is a matrix, or a stack of them: no vector, convolution, embedding, head or router."""
        return is_linear_map(self.name, len(self.spec.shape))

    @property
    def draws(self) -> bool:
        """Whether the method draws random numbers."""
        return not SUPPLIED.isdisjoint(self.entry.asks)

    @property
    def memory(self) -> int:
        """Bytes of anonymous memory that making the tensor takes at most."""
        return needed(self)

    @property
    def on_device(self) -> int:
        """Bytes that making the tensor takes on a device, where what is read and what is made lie too."""
        read = sum(spec_of(source.tensors, source.name).nbytes for source in self.sources)
        return self.memory + read + 2 * self.spec.nbytes


@dataclass(frozen=True)
class Plan:
    """All steps of a merge, the other files of its result, and what else its bytes depend on."""

    steps: Sequence[Step]
    models: Sequence[Tensors]
    companions: Mapping[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seed: int = 0
    device: str = "cpu"

    @property
    def identity(self) -> dict[str, Any]:
        """All that the result and what is measured on the way depend on; only under the same one does a merge go on.

        It is read off the steps and their sources: a new kind of source, or a new field of a step, is part of it
        without anybody thinking of it.
        """
        read = {id(source.tensors): source.tensors for step in self.steps for source in step.sources}
        number = {key: position for position, key in enumerate(read)}

        def told(value: object) -> object:
            if isinstance(value, Source):
                return [value.model, number[id(value.tensors)], value.name]
            if isinstance(value, tuple | list):
                return [told(item) for item in value]
            return dict(value) if isinstance(value, Mapping) else value

        return {
            "sources": [identity_of(tensors) for tensors in read.values()],
            "steps": [[told(getattr(step, part.name)) for part in fields(step)] for step in self.steps],
            "companions": {name: hashlib.sha256(text).hexdigest() for name, text in self.companions.items()},
            "seed": self.seed,
            "device": self.device,
            "versions": [version("modicum"), NUMERICS, torch.__version__],
        }

    def check(self) -> None:
        """Raise unless every model that a step reads is still what it was when the plan was made.

        Raises:
            CheckpointError: A file was written to since.
        """
        read = {id(source.tensors): source.tensors for step in self.steps for source in step.sources}
        for tensors in read.values():
            look: Callable[[], None] | None = getattr(tensors, "check", None)
            if look is not None:
                look()

    def diagnosed(self) -> Plan:
        """Return the same plan, with everything measured that :mod:`modicum.weights.kernels.diagnose` knows.

        Raises:
            RecipeError: There is no base to measure differences from.
        """
        steps = [replace(s, diagnosed=s.base is not None and s.spec.dtype.is_floating_point) for s in self.steps]
        if not any(step.diagnosed for step in steps):
            raise RecipeError("diagnostics measures differences from a base model, and none is given. Set base.")
        return replace(self, steps=steps)

    @property
    def workers(self) -> int:
        """How many tensors are made at a time: one for each core, on a device no more than fit into its memory."""
        return workers_on(self.device, (step.on_device for step in self.steps), cores())

    def memory_bound(self, workers: int | None = None) -> int:
        """Return how many bytes of anonymous memory the merge takes at most, besides the libraries."""
        return sum(sorted((step.memory for step in self.steps), reverse=True)[: workers or cores()])

    def describe(self) -> list[str]:
        """Return the plan in words, a line each."""
        statistics = {id(s.tensors): s.tensors for step in self.steps for s in step.statistics}
        read = sum(model.nbytes for model in [*self.models, *statistics.values()] if isinstance(model, Checkpoint))
        written = sum(step.spec.nbytes for step in self.steps)
        averaged = [step.name for step in self.steps if step.averaged and len(step.spec.shape) >= 2]
        lines = [
            f"{len(self.steps)} tensors from {len(self.models)} models"
            + (f" and {len(statistics)} statistics" if statistics else ""),
            f"reads {_size(read)}, writes {_size(written)}",
            f"takes at most {_size(self.memory_bound())} of memory besides the libraries, on {cores()} cores",
        ]
        if averaged:
            told = "mean of the deltas, since these are no matrices that map inputs to outputs"
            lines.append(f"{', '.join(averaged)}: {told}")
        return [*lines, *self.notes]


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def check_count(entry: Entry[MergeFacts], n: int) -> None:
    """Refuse more or fewer experts than a method takes."""
    least, most = entry.facts.experts, entry.facts.most
    if n < least:
        raise RecipeError(f"{entry.name} needs at least {least} experts, got {n}. Add some.")
    if most is not None and n > most:
        raise RecipeError(f"{entry.name} takes at most {most} experts, got {n}. Remove some.")


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype called ``name``."""
    if name is None or isinstance(name, torch.dtype):
        return name
    known = str(name).removeprefix("torch.")  # as mergekit's files may say it
    if not isinstance(name, str) or known not in DTYPES:
        raise RecipeError(f"dtype {name!r} is not known. {did_you_mean(known, DTYPES)}")
    return DTYPES[known]


def plan_merge(
    base: Tensors | None,
    experts: Sequence[Tensors],
    *,
    method: str,
    knobs: Mapping[str, Any],
    dtype: str | torch.dtype | None = None,
    statistics: Sequence[Tensors] = (),
    exclude: str | None = None,
    base_fingerprint: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    tokenizer: str | Mapping[str, Any] | None = None,
    find: Callable[[str], Path] = find_model,
    convert: Converter | None = None,
) -> Plan:
    """Return the plan of a plain merge, having checked that the models fit together.

    ``tokenizer``, ``find`` and ``convert`` bring vocabularies together; see
    :func:`modicum.weights.mergekit.vocabulary.with_vocabulary`.

    Raises:
        CheckpointError: The models differ, or the base is not the one of the fingerprint.
        RecipeError: The method cannot take them, or a knob is wrong.
    """
    entry = merge_method[method]
    if entry.facts.base and base is None:
        raise RecipeError(f"{method} merges differences from a base model, and none is given. Set base.")
    check_count(entry, len(experts))
    checked, wanted = entry.knobs(knobs), parse_dtype(dtype)
    models = aligned([*([base] if base is not None else []), *experts])
    names = [*(["base"] if base is not None else []), *(f"experts[{i}]" for i in range(len(experts)))]
    names = labels(models, names)
    if base_fingerprint is not None:
        check_fingerprint(base, base_fingerprint)
    vocabulary = Result() if tokenizer is None else unified(tokenizer, models, names, find, convert)
    plain, models = models, [vocabulary.tables.get(name, model) for name, model in zip(names, models)]
    untouched = excluded(models, exclude)
    shared = check_agreement(models[0], models[1:], names=names, apart=untouched)
    if untouched and base is None:
        raise RecipeError("exclude leaves tensors as they are in the base model, and none is given. Set base.")
    check_remaining([name for name in shared if name not in untouched and is_weight(models[0], name)], exclude)
    steps = []
    for name in shared:
        spec = spec_of(models[0], name)
        sources = [Source(model, tensors, name) for model, tensors in zip(names, models)]
        out = Spec(spec.shape, wanted if wanted and spec.dtype.is_floating_point else spec.dtype)
        if name in untouched:
            steps.append(kept(out, sources[0]))
            continue
        head = sources[0] if base is not None else None
        tail = tuple(sources[1:] if base is not None else sources)
        steps.append(with_statistics(Step(name, out, method, head, tail, checked), statistics))
    check_origins(method, experts, statistics)
    rehearse(steps)
    first = plain[0]
    companions = companion_files(first, wanted, **vocabulary.config) if isinstance(first, Checkpoint) else {}
    companions = companions_with(vocabulary, companions)
    notes = [*vocabulary.notes, *_foreign_adapters(base, experts), *notes_on_statistics(method, steps)]
    notes += [*notes_on_exclusion(models, exclude), *(notes_on_idle(base, experts) if entry.facts.base else [])]
    notes += notes_on_zeros(steps)
    notes += [*notes_on_configs(plain, names), *notes_on_left_out(models, names, untouched)]
    if not vocabulary.tables:
        notes += notes_on_tokenizers(dict(zip(names, plain)))
    return Plan(steps, plain, companions, notes, seed, device)


def with_statistics(step: Step, statistics: Sequence[Tensors]) -> Step:
    """Return the step with what was measured of each expert; the plain average where nothing was.

    Raises:
        CheckpointError: A tensor was measured of some experts only, or its statistics have another shape.
        RecipeError: The method needs statistics and has none, or needs none, or their number is wrong.
    """
    check_statistics(step.method, len(step.experts), len(statistics))
    if not statistics or not step.spec.dtype.is_floating_point:
        return step
    pairs = enumerate(zip(statistics, step.experts))
    sources = [Source(label(found, f"statistics[{i}]"), found, expert.name) for i, (found, expert) in pairs]
    known = [source for source in sources if source.name in source.tensors]
    if not known:
        knobs = merge_method["linear"].knobs({"weights": step.knobs.get("weights")})
        return replace(step, method="linear", knobs=knobs)
    for source in sources:
        if source not in known:
            raise CheckpointError(
                f"{source.model} has no statistics of {step.name!r} ({known[0].model} has). Measure all experts alike."
            )
        shape = spec_of(source.tensors, source.name).shape
        expected = shape_of(step.entry.facts.measure, step.spec.shape)
        if shape != expected:
            raise CheckpointError(
                f"{source.model}: the statistics of {step.name!r} have shape {list(shape)}, {step.method} expects "
                f"{list(expected) if expected else 'none'}. Measure with kind: {step.entry.facts.measure}."
            )
    return replace(step, statistics=tuple(known))


def attach_statistics(plan: Plan, statistics: Sequence[Tensors]) -> Plan:
    """Return the plan with what was measured of each expert; refuse it where its method needs and has none."""
    steps = [with_statistics(step, statistics) for step in plan.steps]
    if not statistics:
        return plan
    first = plan.steps[0]
    check_origins(first.method, [source.tensors for source in first.experts], statistics)
    return replace(plan, steps=steps, notes=[*plan.notes, *notes_on_statistics(first.method, steps)])


def check_origins(method: str, experts: Sequence[Tensors], statistics: Sequence[Tensors]) -> None:
    """Refuse statistics that were measured of another model than the expert in their place."""
    for expert, measured in zip(experts, statistics):
        if isinstance(expert, Checkpoint) and isinstance(measured, Checkpoint):
            check_origin(expert, measured, method)


def notes_on_statistics(method: str, steps: Sequence[Step]) -> list[str]:
    """Name the tensors that are averaged because nothing was measured of them."""
    names = [step.name for step in steps if step.method == "linear" != method]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{len(names)} of {len(steps)} tensors have no statistics and are averaged: {', '.join(names[:3])}{more}"]


def identity_of(tensors: Tensors) -> object:
    """Return what a model's tensors depend on: its files, or where it lies in memory its very bytes."""
    known: object = getattr(tensors, "identity", None)
    return {name: digest_tensor(tensor) for name, tensor in tensors.items()} if known is None else known


def kept(out: Spec, source: Source) -> Step:
    """Return the step of a tensor that stays as it is."""
    return Step(source.name, out, "passthrough", None, (source,), {"scale": 1.0})


def check_fingerprint(base: Tensors | None, expected: str) -> None:
    """Refuse a base whose files are not those that the experts were trained from.

    Raises:
        CheckpointError: The fingerprint differs.
        RecipeError: There is no folder to take one of.
    """
    if not isinstance(base, Checkpoint):
        raise RecipeError("base_fingerprint is that of a base model's folder, and none is given. Set base.")
    found = old_fingerprint(base.folder) if is_old(expected) else fingerprint(base.folder)
    if found != expected:
        raise CheckpointError(
            f"{base.name} has the fingerprint {found}, expected {expected}: it is not what the experts were trained "
            "from. Use that one, or remove base_fingerprint."
        )


def _foreign_adapters(base: Tensors | None, experts: Sequence[Tensors]) -> list[str]:
    """Name the adapters of another model than ``base``: their delta holds all that the two models differ by."""
    if not isinstance(base, Checkpoint):
        return []
    adapters = [expert for expert in experts if isinstance(expert, Checkpoint) and expert.adapter]
    others = [a for a in adapters if a.base.folder.resolve() != base.base.folder.resolve()]
    return [
        f"{a.name} is an adapter of {a.base.name}, not of {base.name}: its difference holds that of the two models too"
        for a in others
        if fingerprint(a.base.folder) != fingerprint(base.base.folder)
    ]
