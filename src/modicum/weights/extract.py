"""A low-rank adapter taken out of two full models: what distinguishes one from the other, as far as a rank holds it."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from modicum.architectures import is_turned
from modicum.errors import CheckpointError
from modicum.knobs import guarded
from modicum.layout import ADAPTER_PREFIX, copies_of, is_linear_map, role
from modicum.linalg import SVD, truncated_svd
from modicum.types import Fraction, PositiveInt
from modicum.weights.aliases import aligned
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import check_agreement, excluded, is_weight
from modicum.weights.kernels.compare import refuse_non_finite, refuse_overflow
from modicum.weights.lora import write_adapter
from modicum.weights.merge import open_checkpoint
from modicum.weights.stream import cores, names_by_size, run_all

BENEATH = ".base_layer"  # where PEFT keeps what a layer with factors was
Called = Callable[[str], str | None]


@dataclass(frozen=True)
class Extracted:
    """What became of one module: its rank, and the share of the delta's squared norm that the adapter holds."""

    module: str
    rank: int
    energy: float


@dataclass(frozen=True)
class Extraction:
    """Two models that fit together, and what is compared of them."""

    tuned: Checkpoint
    origin: Checkpoint
    matrices: Mapping[str, str]  # the module of each, as the adapter calls it
    rest: Mapping[str, str]  # tensors that have no low-rank form, and what the adapter calls them
    homeless: tuple[str, ...]  # tensors that the model's class has no place for, or no module of their own

    def turned(self, name: str) -> bool:
        """Whether a matrix is stored as (inputs, outputs)."""
        return is_turned(name, str(self.origin.config.get("model_type") or ""))


def plan_extraction(
    model: str | Path | Checkpoint,
    base: str | Path | Checkpoint,
    *,
    exclude: str | None = None,
    modules: Called | None = None,
    tensors: Called | None = None,
) -> Extraction:
    """Check that two models fit together, and choose what is compared; reads headers only.

    Args:
        model: The fine-tuned model.
        base: What it was trained from.
        exclude: Regular expression of tensor names to leave as they are in the base.
        modules: From a matrix' module to what the class of the model calls it, ``None`` where it has no such module.
        tensors: The same of tensors that have no low-rank form.

    Raises:
        ModicumError: The models differ, or nothing is left to compare.
    """
    origin, tuned = aligned([open_checkpoint(base), open_checkpoint(model)])
    untouched = excluded([origin, tuned], exclude)
    shared = check_agreement(origin, [tuned], names=[origin.name, tuned.name], apart=untouched)
    names = [name for name in shared if name not in untouched and is_weight(origin, name)]
    found = [name for name in names if len(origin.spec(name).shape) == 2 and is_linear_map(name)]
    called = {name: name.removesuffix(".weight") for name in found if name.endswith(".weight")}
    placed = {name: module if modules is None else modules(module) for name, module in called.items()}
    matrices = {name: module for name, module in placed.items() if module is not None}
    if not matrices:
        raise CheckpointError(f"{origin.name} has no matrix of which an adapter could be made. Exclude less.")
    others = {name: tensors(name) if tensors else None if name in found else name for name in names}
    rest = {name: other for name, other in others.items() if other is not None and name not in matrices}
    homeless = tuple(name for name in names if name not in matrices and name not in rest)
    return Extraction(tuned, origin, matrices, rest, homeless)


@guarded
def extract_lora(
    model: str | Path | Checkpoint,
    base: str | Path | Checkpoint,
    out: str | Path,
    *,
    max_rank: PositiveInt = 32,
    energy: Fraction | None = None,
    exclude: str | None = None,
    save_rest: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> list[Extracted]:
    """Write the PEFT adapter that comes closest to what distinguishes ``model`` from ``base``.

    Args:
        model: The fine-tuned model.
        base: What it was trained from.
        out: Folder to write; it must not hold anything yet.
        max_rank: Largest rank of a module.
        energy: Take the smallest rank that holds this share of a delta's squared norm, up to ``max_rank``.
        exclude: Regular expression of tensor names to leave as they are in the base.
        save_rest: Also store tensors that have no low-rank form (norms, embeddings) whole.
        dtype: Of the factors.
        progress: Show a bar when standard error is a terminal.

    Returns:
        Rank and energy of each module that changed.

    Raises:
        ModicumError: The models differ, nothing changed, or the result cannot be written.
    """
    plan = plan_extraction(model, base, exclude=exclude)
    return run_extraction(
        plan, Path(out), max_rank=max_rank, energy=energy, save_rest=save_rest, dtype=dtype, progress=progress
    )


def check_different(plan: Extraction) -> None:
    """Refuse models of which no adapter can be made; reads matrices until two differ, which the first ones mostly do.

    Raises:
        CheckpointError: No matrix differs.
    """
    tuned, origin = plan.tuned, plan.origin
    if any(_differ(tuned[name], origin[name]) for name in plan.matrices):
        return
    if changed := left_out(plan):  # PEFT opens no adapter that is of no layer
        raise CheckpointError(
            f"{tuned.name} differs from {origin.name} in no matrix that has a low-rank form, but in {changed[0]!r} and "
            "such: that is no adapter. Use the model as it is."
        )
    raise CheckpointError(f"{tuned.name} has the weights of {origin.name}: there is nothing to extract.")


def run_extraction(
    plan: Extraction,
    out: Path,
    *,
    max_rank: int,
    energy: float | None = None,
    save_rest: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    replace: bool = False,
    companions: Mapping[str, bytes] = MappingProxyType({}),
) -> list[Extracted]:
    """Carry out ``plan``; see :func:`extract_lora`, and for the rest :func:`~.stream.map_tensors`."""
    check_different(plan)
    tuned, origin = plan.tuned, plan.origin

    def decompose(name: str) -> tuple[SVD, float] | None:
        models = [tuned[name], origin[name]]
        refuse_non_finite(name, models, [tuned.name, origin.name])
        delta = models[0].float() - models[1].float()
        svd = truncated_svd(delta.T if plan.turned(name) else delta, min(max_rank, *delta.shape))
        total = float(delta.double().square().sum())
        held = svd.S.double().square().cumsum(0)
        k = len(held) if energy is None else min(len(held), int((held < energy * total * (1 - 1e-12)).sum()) + 1)
        k = min(k, int(svd.S.gt(1e-6 * svd.S.max()).sum())) if total else 0
        if not k:
            return None
        return SVD(svd.U[:, :k].clone(), svd.S[:k].clone(), svd.V[:, :k].clone()), float(held[k - 1]) / total

    order = names_by_size({name: origin.spec(name) for name in plan.matrices})
    parts = dict(run_all(decompose, order, workers=cores()))
    found = {name: part for name in plan.matrices if (part := parts[name])}
    others = plan.rest if save_rest else {}
    changed = [name for name in others if _differ(tuned[name], origin[name])]
    tensors = _peft_tensors({plan.matrices[name]: svd for name, (svd, _) in found.items()}, dtype)
    for name in changed:
        refuse_non_finite(name, [tuned[name], origin[name]], [tuned.name, origin.name])
    targets = {plan.matrices[name] for name in found}
    rest = _stored(plan, changed, targets)
    table = next((name for name in changed if role(name) == "embedding"), None)
    if origin.tied and table and origin.tied not in rest:  # PEFT would leave the output layer as it was
        rest[origin.tied] = table
        rest |= dict.fromkeys(copies_of(plan.rest[table]), table)
    tensors |= {f"{ADAPTER_PREFIX}{key}": tuned[name].clone() for key, name in rest.items()}
    ranks = {plan.matrices[name]: len(svd.S) for name, (svd, _) in found.items()}
    for name, tensor in tensors.items():
        refuse_overflow(name, tensor, method="extract_lora")
    write_adapter(
        out,
        tensors,
        ranks,
        origin,
        sorted({module for key in rest if (module := _module(key)) and module.removesuffix(BENEATH) not in targets}),
        progress,
        biases=any(BENEATH in key for key in rest),
        read=[tuned, origin],
        replace=replace,
        companions=companions,
        turned=any(map(plan.turned, found)),
    )
    return [Extracted(plan.matrices[name], len(svd.S), held) for name, (svd, held) in sorted(found.items())]


def _stored(plan: Extraction, changed: Sequence[str], targets: Container[str]) -> dict[str, str]:
    """Return which tensors are stored whole, by their names in the adapter's file.

    PEFT stores modules whole, not tensors: where one of a module's two has changed, the other stands there too. The
    bias of a layer with factors lies beneath them.
    """
    modules = {module for name in changed if (module := _module(plan.rest[name]))}
    rest: dict[str, str] = {}
    for name, called in plan.rest.items():
        module = _module(called)
        if module in targets and name in changed:
            rest[f"{module}{BENEATH}.bias"] = name
        elif module not in targets and (name in changed or module in modules):
            rest[called] = name
    weights = {module: name for name, module in plan.matrices.items() if module in modules and module not in targets}
    return rest | {f"{module}.weight": name for module, name in weights.items()}


def _module(name: str) -> str | None:
    """Return the module that a weight or bias belongs to; ``None`` of a parameter of another name."""
    module, _, leaf = name.rpartition(".")
    return module if leaf in ("weight", "bias") else None


def left_out(plan: Extraction) -> list[str]:
    """Return what the models differ in besides the matrices of which the adapter is made; reads those tensors."""
    names = [*plan.rest, *plan.homeless]
    return [name for name in names if _differ(plan.tuned[name], plan.origin[name])]


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other) if one.dtype == other.dtype else not torch.equal(one.float(), other.float())


def _peft_tensors(parts: Mapping[str, SVD], dtype: torch.dtype) -> dict[str, Tensor]:
    """Share each singular value evenly between the two factors, so that both have the same scale."""
    tensors = {}
    for module, part in parts.items():
        root, at = part.S.sqrt(), ADAPTER_PREFIX + module
        tensors[f"{at}.lora_A.weight"] = (root[:, None] * part.V.T).to(dtype).contiguous()
        tensors[f"{at}.lora_B.weight"] = (part.U * root).to(dtype).contiguous()
    return tensors
