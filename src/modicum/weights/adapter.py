"""A PEFT LoRA adapter seen as changes to its base's tensors: low-rank deltas, and tensors replaced whole."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modicum.architectures import is_turned
from modicum.borders import border
from modicum.borders import read_json as read_json
from modicum.errors import CheckpointError, ModicumError, UnsupportedError, first_line
from modicum.layout import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_PREFIX,
    ADAPTER_WEIGHTS,
    copies,
    inner,
    module_in,
    role,
)
from modicum.patterns import Pattern
from modicum.references import pinned
from modicum.weights.adapter_targets import is_named
from modicum.weights.files import MappedFile, read_header

if TYPE_CHECKING:
    from modicum.weights.checkpoint import Checkpoint

FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?$")

# Fields of PEFT's configuration under which an adapter is still a sum of low-rank deltas and whole tensors. Any other
# field must be off: PEFT gains new ones, and what they do to the weights is not to be guessed.
UNDERSTOOD = frozenset(
    {
        # Which base and modules it belongs to, and how it was made.
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
        "init_lora_weights", "megatron_config", "megatron_core", "runtime_config",
        # Read only by a start or a variant that is named in a field of its own.
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
        # Changes the backward pass alone.
        "velora_config",
        # Factors, their scale, and tensors that are stored whole; `lora_bias` shows in the tensors' names.
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "modules_to_save",
        "ensure_weight_tying", "target_parameters",
        # Written by PEFT before 0.4, or by the tools that sit on it.
        "enable_lora", "merge_weights", "unsloth_version",
    }
)  # fmt: skip
# Under `bias: all`, PEFT also writes the biases of modules that are stored whole by the names of its own wrapper.
WRAPPED = re.compile(r"\.(?:modules_to_save|original_module)\.(?=bias$)")
# Types of PEFT that learn what stands before or beside the text.
PROMPTS = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
                     "CARTRIDGE"})  # fmt: skip
_WAY = "Merge it into its base with PEFT first."
UNSHIFTED = ("gaussian", "eva", "orthogonal", "mica")  # starts that leave the base as it is
REBUILT = ("pissa", "olora")  # starts whose shift follows from the base's weight alone
GAP = 1e-5  # of the largest singular value: between closer ones, rounding decides which directions PiSSA takes


@dataclass(frozen=True)
class LowRank:
    """A low-rank change ``scale * B @ A`` of one weight; ``transposed`` when the weight is stored ``(in, out)``.

    ``start`` names the start whose first factors were taken out of the base's weight, which the change adds to.
    ``parameter`` marks a change of a parameter that is no module of its own; of a stack of experts, ``A`` and ``B`` are
    stacks of factors.
    """

    A: Tensor
    B: Tensor
    scale: float
    transposed: bool = False
    start: str | None = None
    parameter: bool = False

    @property
    def plain(self) -> bool:
        """Whether it adds a product of two matrices to the base's weight, in a module of its own."""
        return self.start is None and not self.parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes."""
        rows, columns = self.B.shape[-2], self.A.shape[-1]
        return (*self.A.shape[:-2], columns, rows) if self.transposed else (*self.A.shape[:-2], rows, columns)

    def delta(self) -> Tensor:
        """Return the change in float32."""
        product = self.scale * (self.B.float() @ self.A.float())
        return product.mT if self.transposed else product


class Adapter:
    """The changes in one adapter folder, by the names of the base's tensors."""

    def __init__(self, folder: Path, *, owner: str, allow_pickle: bool = False) -> None:
        self.owner = owner
        self.notes: list[str] = []
        self._pattern = cache(Pattern)  # the time of all its matches is bounded together
        self.config = read_json(folder / ADAPTER_CONFIG, owner)
        self._refuse_unknown()
        self.file = folder / ADAPTER_WEIGHTS
        pickled = folder / ADAPTER_PICKLE
        if not self.file.exists() and pickled.exists():
            if not allow_pickle:
                raise CheckpointError(
                    f"{owner}: the adapter is pickled ({ADAPTER_PICKLE}), which can run code when it is read. Save it "
                    "again as safetensors with PEFT, or set allow_pickle: true if you trust its source."
                )
            self.file, tensors = pickled, load_pickle(pickled, owner)
            self._check_names(tensors)
        else:
            slots = read_header(self.file, owner=owner)
            self._check_names(slots)  # before each of what may be very many is mapped
            file = MappedFile(self.file)
            tensors = {name: file.tensor(slot) for name, slot in slots.items()}
        self._tables: set[str] = set()
        self.parameters: dict[str, dict[int, dict[str, Tensor]]] = {}  # by module and depth of nesting
        self.factors, self.replaced = self._sort(tensors)

    @property
    def base(self) -> str:
        """What the adapter says it was trained on."""
        return pinned(str(self.config.get("base_model_name_or_path") or ""), self.config.get("revision"))

    def fit(self, base: Checkpoint) -> None:
        """Call each weight what the base calls it, and turn the factors the way in which it is stored there.

        ``fan_in_fan_out`` says it for the adapter as a whole, and PEFT corrects it by each module's class.
        """
        from modicum.weights.parameter_factors import resolve

        called, made = name_in(base), {}
        for module, levels in self.parameters.items():
            names = list(dict.fromkeys(each.rpartition(".")[2] for each in self._targets(module)))
            pairs = [levels[depth] for depth in sorted(levels, reverse=True)]  # the innermost first
            found = resolve(base, module, pairs, names, called=called, scale=self._scale, owner=self.owner)
            if found is None:  # a module like others
                self.factors[f"{module}.weight"] = self._factors(module, False, levels[0])
            made.update(found or {})
        self.factors = {called(name): change for name, change in self.factors.items()}
        self.replaced = {called(name): tensor for name, tensor in self.replaced.items()}
        self._tables = {called(name) for name in self._tables}
        kind = str(base.config.get("model_type") or "")
        if kind and "auto_map" not in base.config:
            self.factors = {
                name: replace(factors, transposed=name in self._tables or is_turned(name, kind))
                for name, factors in self.factors.items()
            }
        self.factors |= made
        for name, factors in self.factors.items():
            if factors.start and (name in self._tables or (factors.transposed and factors.start == "olora")):
                raise UnsupportedError(
                    f"{self.owner}: init_lora_weights {factors.start!r} is not defined for {name!r}. "
                    "Merge it into its base with PEFT first."
                )

    def tie(self, head: str) -> None:
        """Leave out the output layer of a base whose output layer is its embedding, where both change alike.

        Raises:
            UnsupportedError: The embedding is stored anew and the output layer stays: a tied model cannot hold both.
        """
        for copy, table in copies(self.replaced):
            if torch.equal(self.replaced[copy], self.replaced[table]):
                del self.replaced[copy]
        for table in [name for name in {**self.replaced, **self.factors} if role(name) == "embedding"]:
            if (
                head in self.replaced
                and table in self.replaced
                and torch.equal(self.replaced[head], self.replaced[table])
            ):
                del self.replaced[head]
            elif table in self.replaced and table not in self.factors:
                raise UnsupportedError(
                    f"{self.owner}: the adapter stores {table!r} anew and leaves the output layer {head!r} as it was, "
                    "and the base ties both. Train it with ensure_weight_tying: true, or on a base that is untied."
                )
            elif table in self.factors and head not in self.factors:
                self.notes.append(
                    f"{self.owner} changes the embedding {table!r}, to which its base ties the output layer, without "
                    "ensure_weight_tying: both change, as in PEFT's merged model, while in training the output layer "
                    "stayed as it was"
                )
            if head in self.factors and table in self.factors:
                a, b = self.factors[head], self.factors[table]
                if a.scale == b.scale and torch.equal(a.A, b.B.T) and torch.equal(a.B, b.A.T):
                    del self.factors[head]

    def _refuse_unknown(self) -> None:
        if (kind := self.config.get("peft_type")) != "LORA":
            way = "It changes no weights and cannot be merged." if kind in PROMPTS else _WAY
            raise UnsupportedError(f"{self.owner}: adapter of type {kind}, expected LORA. {way}")
        for option, value in self.config.items():
            if value and option not in UNDERSTOOD:
                raise UnsupportedError(
                    f"{self.owner}: adapter with {option}, which is more than a low-rank delta. "
                    "Merge it into its base with PEFT first."
                )
        start = self.config.get("init_lora_weights", True)
        if start not in (True, False, None) and str(start).lower() not in UNSHIFTED and start not in REBUILT:
            raise UnsupportedError(
                f"{self.owner}: adapter with init_lora_weights {start!r}, which changes the base's weights, to which "
                "the factors are added. Save it for the original base, by save_pretrained(folder, "
                "path_initial_model_for_weight_conversion=…) in PEFT, or merge it into its base with PEFT first."
            )

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if not name.startswith(ADAPTER_PREFIX):
                raise CheckpointError(
                    f"{self.owner}: tensor {name!r} of the adapter does not begin with {ADAPTER_PREFIX!r}, so that "
                    "PEFT leaves it out. Rename it, or save the adapter again with PEFT."
                )

    def _sort(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
        pairs: dict[tuple[str, bool], dict[str, Tensor]] = {}
        replaced: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(ADAPTER_PREFIX)
            match = FACTOR.match(name)
            if match:
                pairs.setdefault((match["module"], bool(match["kind"])), {})[match["side"]] = tensor
            elif ".lora_" in name:
                raise UnsupportedError(
                    f"{self.owner}: tensor {key!r} is more than a low-rank delta. "
                    "Merge it into its base with PEFT first."
                )
            elif (plain := WRAPPED.sub(".", key)) == key or plain not in tensors:  # else it stands there once more
                replaced[name.replace(".base_layer.", ".")] = tensor
        for module, embedding in list(pairs):
            own = module.removesuffix(".base_layer")
            while own.endswith(".base_layer"):
                own = own.removesuffix(".base_layer")
            if not embedding and self._targets(own):
                pair = pairs.pop((module, embedding))
                self._whole_pair(module, pair)
                self.parameters.setdefault(own, {})[module.count(".base_layer")] = pair
            elif not self.config.get("ensure_weight_tying") and not self._names(own):
                raise CheckpointError(
                    f"{self.owner}: the adapter has factors of {own!r}, which its {ADAPTER_CONFIG} does not name, so "
                    "that PEFT leaves them out. Correct target_modules, exclude_modules or layers_to_transform there."
                )
        self._tables = {f"{module}.weight" for module, embedding in pairs if embedding}
        factors = {
            f"{module}.weight": self._factors(module, embedding, pair) for (module, embedding), pair in pairs.items()
        }
        return factors, replaced

    def _names(self, module: str) -> bool:
        with border(f"{self.owner}: {ADAPTER_CONFIG}", "Correct it."):
            return is_named(module, self.config, self._pattern)

    def _targets(self, module: str) -> list[str]:
        """Return those of ``target_parameters`` that may be a module's."""
        named = self.config.get("target_parameters") or []
        owned = ((target, f"{module}.{target.rpartition('.')[2]}") for target in map(str, named))
        return [target for target, name in owned if name == target or name.endswith(f".{target}")]

    def _whole_pair(self, module: str, pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if set(pair) != {"A", "B"}:
            missing = "lora_B" if "A" in pair else "lora_A"
            raise CheckpointError(f"{self.owner}: {module} has no {missing}. Save the adapter again.")
        A, B = pair["A"], pair["B"]
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
            raise CheckpointError(
                f"{self.owner}: {module} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, "
                "expected (r, in) and (out, r) with r of at least 1. Convolutions must be merged with PEFT first."
            )
        return A, B

    def _number(self, patterns: str, key: str, module: str, default: float) -> float:
        try:
            for pattern, value in (self.config.get(patterns) or {}).items():
                if self._pattern(rf"(.*\.)?({pattern})$", patterns).begins(module):
                    return float(value)
            return float(self.config.get(key, default))
        except ModicumError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise CheckpointError(
                f"{self.owner}: {key} or {patterns} is no number or table of numbers. Correct {ADAPTER_CONFIG}."
            ) from None

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._number("alpha_pattern", "lora_alpha", module, 8)
        if (said := self._number("rank_pattern", "r", module, rank)) != rank:
            raise CheckpointError(
                f"{self.owner}: {module} has factors of rank {rank}, its {ADAPTER_CONFIG} says r {said:g}. Correct it "
                "there: the factor on the change depends on it."
            )
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        if not math.isfinite(scale):
            raise CheckpointError(
                f"{self.owner}: {module} has lora_alpha {alpha}, expected a finite number. Correct {ADAPTER_CONFIG}."
            )
        return scale

    def _factors(self, module: str, embedding: bool, pair: Mapping[str, Tensor]) -> LowRank:
        A, B = self._whole_pair(module, pair)
        scale = self._scale(module, A.shape[0])
        # An embedding's table is (vocabulary, width), while its factors multiply the other way round.
        start = self.config.get("init_lora_weights")
        return LowRank(
            A,
            B,
            scale,
            transposed=embedding or bool(self.config.get("fan_in_fan_out")),
            start=start if start in REBUILT else None,
        )


def name_in(names: Iterable[str]) -> Callable[[str], str]:
    """Return what finds a tensor of a model's class among ``names``, where files call it otherwise.

    GPT-2 is published without its prefix, and models of text and more with other ones than their classes have now. A
    tower's layer is never taken for the text's, though both have the same name but for its prefix.
    """
    known = set(names)
    module = module_in(known)
    by_inner: dict[str, list[str]] = {}
    for name in known:
        by_inner.setdefault(inner(name), []).append(name)
    several = len({module(name) for name in known}) > 1

    def find(name: str) -> str:
        alike = by_inner.get(inner(name), [])
        if name in known or len(alike) != 1 or (several and module(name) != module(alike[0])):
            return name
        return alike[0]

    return find


def load_pickle(path: Path, owner: str) -> dict[str, Tensor]:
    """Return the tensors in a pickled file, which is read in a way that runs no code.

    Raises:
        CheckpointError: There is more in it than tensors by their names.
    """
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises several kinds for a file that is not a plain state dict
        raise CheckpointError(f"{owner}: {path.name} cannot be read safely: {first_line(error)}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{owner}: {path.name} is not a mapping of names to tensors. Convert it to safetensors.")
    return loaded


def residual(weight: Tensor, change: LowRank, name: str = "a weight") -> Tensor:
    """Return what a start that takes its first factors out of the base's weight left of it.

    The factors are found in the way that PEFT finds them, and their product does not depend on the signs of its
    columns. The result has the weight's dtype, as it had in training.

    Args:
        weight: Of the base, as it is stored.
        change: The adapter's factors, which give rank, scale and start.
        name: For messages.

    Raises:
        UnsupportedError: The start's directions are not determined by the weight.
    """
    matrix = weight.float().T if change.transposed else weight.float()
    rank = min(change.A.shape[0], *matrix.shape)
    if change.start == "olora":
        Q, R = torch.linalg.qr(matrix)
        first = change.scale * (Q[:, :rank] @ R[:rank])
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        if rank < len(S) and float(S[rank - 1] - S[rank]) < GAP * float(S[0]):
            raise UnsupportedError(
                f"{name}: two singular values of the base nearly coincide at the adapter's rank {rank}, so that the "
                "first factors of PiSSA cannot be found again. Save it for the original base, by save_pretrained("
                "folder, path_initial_model_for_weight_conversion=…) in PEFT."
            )
        first = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    left = (matrix - first).to(weight.dtype)
    return left.T if change.transposed else left


def fold_delta(weight: Tensor, change: LowRank, name: str = "a weight") -> Tensor:
    """Return ``weight`` with the adapter's change added, in float32 so that nothing of a small change is lost."""
    if change.start:
        return residual(weight, change, name).float().add_(change.delta())
    return weight.to(torch.float32).add_(change.delta()) if weight.dtype != torch.float32 else weight + change.delta()
