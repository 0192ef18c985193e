"""Low-rank adapters as weights: extract one from two full models, and merge several without leaving their factors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError
from modicum.linalg import SVD, inv_sqrt_polar, truncated_svd
from modicum.record import fingerprint
from modicum.weights.adapter import PREFIX, Factors
from modicum.weights.agree import check_agreement
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import Spec
from modicum.weights.merge import open_checkpoint
from modicum.weights.plan import VOCABULARY
from modicum.weights.stream import cores, map_tensors, names_by_size, run_all


@dataclass(frozen=True)
class Extracted:
    """What became of one module: its rank, and the share of the delta's squared norm that the adapter holds."""

    module: str
    rank: int
    energy: float


def extract_lora(
    model: str | Path | Checkpoint,
    base: str | Path | Checkpoint,
    out: str | Path,
    *,
    max_rank: int = 32,
    energy: float | None = None,
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
    if max_rank < 1 or (energy is not None and not 0 < energy <= 1):
        raise RecipeError(f"max_rank {max_rank} should be at least 1, and energy {energy} in (0, 1].")
    tuned, origin = open_checkpoint(model), open_checkpoint(base)
    check_agreement(origin, [tuned], names=[origin.name, tuned.name])
    names = [name for name in origin if origin.spec(name).dtype.is_floating_point]
    names = [name for name in names if not (exclude and re.search(exclude, name))]
    matrices = [name for name in names if len(origin.spec(name).shape) == 2 and not VOCABULARY.search(name)]
    found: dict[str, tuple[SVD, float]] = {}

    def decompose(name: str) -> tuple[Tensor, dict[str, Any]]:
        delta = tuned[name].float() - origin[name].float()
        svd = truncated_svd(delta, min(max_rank, *delta.shape))
        total = float(delta.double().square().sum())
        held = svd.S.double().square().cumsum(0)
        k = len(held) if energy is None else min(len(held), int((held < energy * total * (1 - 1e-12)).sum()) + 1)
        k = min(k, int(svd.S.gt(1e-6 * svd.S.max()).sum())) if total else 0
        if k:
            kept = SVD(svd.U[:, :k].clone(), svd.S[:k].clone(), svd.V[:, :k].clone())
            found[name] = kept, float(held[k - 1]) / total
        return torch.empty(0), {}

    run_all(decompose, list(names_by_size({n: origin.spec(n) for n in matrices})), lambda *_: None, workers=cores())
    others = [name for name in names if save_rest and name not in matrices]
    rest = {name: tuned[name] for name in others if not torch.equal(tuned[name], origin[name])}
    if not found and not rest:
        raise CheckpointError(f"{tuned.name} has the weights of {origin.name}: there is nothing to extract.")
    tensors = _peft_tensors({name: svd for name, (svd, _) in found.items()}, dtype)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in rest.items()}
    ranks = {name.removesuffix(".weight"): len(svd.S) for name, (svd, _) in found.items()}
    _write_adapter(Path(out), tensors, ranks, origin, list(rest), [tuned, origin], progress)
    return [Extracted(name.removesuffix(".weight"), len(svd.S), held) for name, (svd, held) in sorted(found.items())]


def _peft_tensors(parts: Mapping[str, SVD], dtype: torch.dtype) -> dict[str, Tensor]:
    """Share each singular value evenly between the two factors, so that both have the same scale."""
    tensors = {}
    for name, part in parts.items():
        root = part.S.sqrt()
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = (root[:, None] * part.V.T).to(dtype).contiguous()
        tensors[f"{module}.lora_B.weight"] = (part.U * root).to(dtype).contiguous()
    return tensors


def _write_adapter(
    out: Path,
    tensors: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    base: Checkpoint,
    whole: Sequence[str],
    models: Sequence[Checkpoint],
    progress: bool,
) -> None:
    r = max(ranks.values(), default=1)
    different = {module: rank for module, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": different,
        "alpha_pattern": different,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted({name.removesuffix(".weight") for name in whole}) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    map_tensors(
        lambda name: (tensors[name], {}),
        {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        out,
        identity=[fingerprint(model.folder) for model in models] + [config],
        companions={"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode()},
        shard_bytes=1 << 62,
        stem="adapter_model",
        progress=progress,
    )


def factor_svd(factors: Factors) -> SVD:
    """Return the exact decomposition of ``scale * B @ A``, at the cost of its rank.

    Example:
        >>> B, A = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> factor_svd(Factors(A, B, scale=1.5)).S
        tensor([3.])
    """
    left, right = factors.B.double(), factors.A.double().T
    if factors.transposed:
        left, right = right, left
    Qa, Ra = torch.linalg.qr(left)
    Qb, Rb = torch.linalg.qr(right)
    U, S, Vh = torch.linalg.svd(Ra @ Rb.T, full_matrices=False)
    return SVD((Qa @ U).float(), (factors.scale * S).float(), (Qb @ Vh.T).float())


def merge_factors(
    experts: Sequence[Factors], *, alpha: float = 1.0, rank: int | None = None, whiten_rtol: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Merge low-rank deltas by their task singular vectors (TSV-M) without forming a matrix of the weight's size.

    Args:
        experts: The deltas.
        alpha: Factor on the merged delta.
        rank: Singular vectors kept of each; all when not given.
        whiten_rtol: As in :func:`modicum.weights.methods.tsv.tsv`.

    Returns:
        Factors ``A (k, in)`` and ``B (out, k)`` with ``B @ A`` the merged delta; ``k`` is the sum of the ranks kept.
    """
    room = max(1, min(experts[0].shape) // len(experts))
    parts = []
    for expert in experts:
        svd = factor_svd(expert)
        k = min(rank or room, room, int(svd.S.gt(1e-6 * svd.S.max()).sum()))
        parts.append(SVD(svd.U[:, :k], svd.S[:k], svd.V[:, :k]))
    U, V = torch.cat([part.U for part in parts], 1), torch.cat([part.V for part in parts], 1)
    S = torch.cat([part.S for part in parts])
    if not len(S):
        return torch.zeros(1, V.shape[0]), torch.zeros(U.shape[0], 1)
    root = S.sqrt()
    return root[:, None] * inv_sqrt_polar(V, rtol=whiten_rtol).T, alpha * inv_sqrt_polar(U, rtol=whiten_rtol) * root


def merge_loras(
    adapters: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    alpha: float = 1.0,
    rank: int | None = None,
    whiten_rtol: float = 1e-4,
    progress: bool = True,
) -> list[str]:
    """Merge LoRA experts of one base into one LoRA by TSV-M in factor space: a 7B model's takes seconds.

    Args:
        adapters: PEFT adapter folders of one base.
        out: Folder to write; it must not hold anything yet.
        alpha: Factor on the merged deltas.
        rank: Singular vectors kept of each expert; all when not given.
        whiten_rtol: As in :func:`modicum.weights.methods.tsv.tsv`.
        progress: Show a bar when standard error is a terminal.

    Returns:
        The modules that were merged.

    Raises:
        ModicumError: One is not an adapter, or their bases differ.
    """
    opened = [open_checkpoint(adapter) for adapter in adapters]
    loras = []
    for checkpoint in opened:
        if checkpoint.adapter is None:
            raise CheckpointError(f"{checkpoint.name} is a full model, expected a LoRA adapter. Use merge instead.")
        if checkpoint.adapter.replaced:
            name = next(iter(checkpoint.adapter.replaced))
            raise CheckpointError(f"{checkpoint.name} also stores {name!r} whole. Use merge, which makes a full model.")
        loras.append(checkpoint.adapter)
    base = opened[0].base
    for checkpoint in opened[1:]:
        if checkpoint.base.folder != base.folder:
            raise CheckpointError(f"{checkpoint.name} is an adapter of {checkpoint.base.name}, expected {base.name}.")
    names = sorted({name for lora in loras for name in lora.factors})
    merged: dict[str, tuple[Tensor, Tensor]] = {}

    def one(name: str) -> tuple[Tensor, dict[str, Any]]:
        factors = [lora.factors[name] for lora in loras if name in lora.factors]
        merged[name] = merge_factors(factors, alpha=alpha, rank=rank, whiten_rtol=whiten_rtol)
        return torch.empty(0), {}

    run_all(one, names, lambda *_: None, workers=cores())
    tensors, ranks = {}, {}
    for name in names:
        A, B = merged[name]
        module = name.removesuffix(".weight")
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B.contiguous()
        ranks[module] = A.shape[0]
    _write_adapter(Path(out), tensors, ranks, base, [], opened, progress)
    return list(ranks)
