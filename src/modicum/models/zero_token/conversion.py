"""Turn a pre-trained model into a looped one, choose which layers to loop, and change the number of cycles."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, Unpack, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from modicum.errors import RecipeError, UnsupportedError, did_you_mean
from modicum.knobs import guarded, known
from modicum.layout import FIRST_LAYERS, LAYER_NUMBERS
from modicum.models.zero_token import hosts
from modicum.models.zero_token.config import EXITS, TRAINING, ZeroTokenConfig, ZeroTokenKnobs
from modicum.models.zero_token.looped import Looped
from modicum.models.zero_token.model import (
    ZeroTokenForCausalLM,
    ZeroTokenForSequenceClassification,
    ZeroTokenForTokenClassification,
    ZeroTokenModel,
)
from modicum.models.zero_token.trial import compare, decode
from modicum.random import generator
from modicum.registry import model as model_registry
from modicum.types import NonNegativeInt, PositiveInt

Ends: TypeAlias = NonNegativeInt | Literal["auto"]
TieInit: TypeAlias = Literal["stepwise", "average", "lower", "upper", "random"]


@model_registry("zero_token", paper="arXiv:2502.12214")
def convert_to_zero_token(
    model: PreTrainedModel,
    *,
    n_head: Ends = 1,
    n_tail: Ends = 1,
    mode: Literal["loop", "tie"] = "loop",
    tie_init: TieInit = "stepwise",
    **knobs: Unpack[ZeroTokenKnobs],
) -> ZeroTokenForCausalLM:
    r"""Loop the middle layers of a pre-trained model, with a zero token in each visit.

    .. math::
        h \leftarrow f_{L-1} \circ (f_{L-2} \circ \dots \circ f_1)^N \circ f_0\,(h), \qquad
        o = \sigma(\mathrm{lse} - s\,q \cdot k_0^{(c, l)})\; o_{\mathrm{standard}}

    Args:
        model: A causal language model of one of the known architectures; it is left as it is. One that is looped
            already takes the knobs of running and training alone, which no checkpoint holds.
        n_head: First layers that run once; ``"auto"`` is a third of all layers, which a deep pre-trained model needs.
        n_tail: Last layers that run once; ``"auto"`` as above.
        mode: ``"loop"`` keeps all layers and makes the model deeper; ``"tie"`` keeps the depth and drops layers; the
            low-rank terms of ``lora_rank`` then start at the truncated singular value decomposition of what is lost.
        tie_init: Which of the tied layers gives the weights, or their average.
        **knobs: Fields of :class:`~modicum.models.ZeroTokenConfig`, which explains them: ``n_cycles``, ``order``,
            ``zero_token``, …

    Returns:
        A new model, in evaluation mode and with the base model's dtype. One cycle without zero token gives the base
        model's logits bit for bit.

    Raises:
        RecipeError: The numbers of layers do not fit.
        UnsupportedError: The architecture is not known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=4, num_attention_heads=2))
        >>> looped = convert_to_zero_token(base, n_cycles=3)
        >>> looped.config.num_hidden_layers, looped.zero_token.zero_key.shape
        (8, torch.Size([6, 2, 4]))

    Cost:
        N (L - head - tail) + head + tail layer visits in place of L; (L - head - tail) N key-value heads times head
        width new parameters; a key-value cache for every visit.

    Deviates:
        The text of the paper that could be consulted fixes the structure alone. Ours are: cycling the middle as a
        block, a key for each layer and cycle, no rotation of the key, the initial standard deviation, the exit score
        and its scope, ``"auto"``, the modes ``"tie"`` and ``"rezero"``.

    Reference:
        Li, Jiang, Shen, Tang, Yuan, "Zero Token-Driven Deep Thinking in LLMs: Unlocking the Full Potential of Existing
        Parameters via Cyclic Refinement", 2025, arXiv:2502.12214. Mode ``"tie"``: Bae et al., "Relaxed Recursive
        Transformers", 2024, arXiv:2410.20672.
    """
    knobs = known(convert_to_zero_token, knobs)
    if isinstance(model, Looped):
        return _run_otherwise(model, dict(knobs), ends=(n_head, n_tail), mode=mode)
    if tie_init not in get_args(TieInit):
        raise RecipeError(f"There is no tie_init {tie_init!r}. {did_you_mean(tie_init, get_args(TieInit))}")
    hosts.check_config(model.config)
    depth = model.config.num_hidden_layers
    config = ZeroTokenConfig(host=model.config, n_head=ends(depth, n_head), n_tail=ends(depth, n_tail), **knobs)
    if mode == "loop":
        looped = _loop(model, config)
        if model.config.model_type not in hosts.TESTED:
            compare(model, looped)
            decode(looped)
        return looped
    if mode == "tie":
        if config.order != "cycle":
            raise UnsupportedError("mode 'tie' needs order 'cycle'.")
        tied = _tie(model, config, tie_init)
        if model.config.model_type not in hosts.TESTED:
            decode(tied)
        return tied
    raise RecipeError(f"There is no mode {mode!r}. {did_you_mean(mode, ['loop', 'tie'])}")


def _run_otherwise(model: Any, knobs: dict[str, Any], **others: Any) -> Any:
    """Return a looped model with other knobs of running and training, which need no other weights."""
    if not knobs or set(knobs) - {*EXITS, *TRAINING} or others != {"ends": (1, 1), "mode": "loop"}:
        raise UnsupportedError(
            f"The model is looped already: it takes {', '.join((*EXITS, *TRAINING))}. For other cycles use "
            "resize_pool(model, n_cycles)."
        )
    again = copy.deepcopy(model)
    for name, value in knobs.items():
        setattr(again.config, name, value)
    again.config.check()
    again.zero_token.follow(again.config)
    return again.eval()


def ends(n_layers: int, asked: int | Literal["auto"]) -> int:
    """Return how many layers stay free at one end; ``"auto"`` is a third, at least one."""
    if isinstance(asked, str) and asked != "auto":
        raise RecipeError(f"n_head or n_tail is {asked!r}, expected a number of layers or 'auto'.")
    return max(1, round(n_layers / 3)) if asked == "auto" else asked


_KINDS: dict[str, type[Looped]] = {
    kind.kind: kind
    for kind in (
        ZeroTokenModel, ZeroTokenForCausalLM, ZeroTokenForSequenceClassification, ZeroTokenForTokenClassification
    )
}  # fmt: skip


def _fresh(config: ZeroTokenConfig, model: PreTrainedModel, kind: str) -> Any:
    config.dtype = model.dtype
    if model.config._attn_implementation == "eager":  # other kernels sum in another order
        config._attn_implementation_internal = "eager"
    with no_init_weights():
        looped = _KINDS[kind](config)
    looped.to(device=model.device, dtype=model.dtype)
    # The pool's buffers hold whatever memory held: nothing but its own initialisation may fill them.
    looped.zero_token.initialize()
    if getattr(model, "generation_config", None) is not None:
        looped.generation_config = copy.deepcopy(model.generation_config)
    return looped.eval()


def _loop(model: PreTrainedModel, config: ZeroTokenConfig) -> Any:
    looped = _fresh(config, model, hosts.kind_of(model))
    report = looped.load_state_dict(model.state_dict(), strict=False)
    _complete(report)
    looped.tie_weights()
    return looped


def _complete(report: Any) -> None:
    missing = [name for name in report.missing_keys if not name.startswith("zero_token.")]
    if missing or report.unexpected_keys:
        raise UnsupportedError(
            f"The model's tensors do not fit its configuration: {(missing + report.unexpected_keys)[:3]}."
        )


def _tie(model: PreTrainedModel, config: ZeroTokenConfig, tie_init: TieInit) -> Any:
    depth, n_cycles, head, tail = model.config.num_hidden_layers, config.n_cycles, config.n_head, config.n_tail
    width = (depth - head - tail) // n_cycles  # physical layers in the middle
    if width < 1:
        raise RecipeError(f"{depth} layers less {head} and {tail} are too few to tie {n_cycles} times.")
    # The visit (k, c) stands for this layer; where the cycles do not divide the layers, some are passed over.
    stands = torch.linspace(head, depth - tail - 1, width * n_cycles).round().long().view(n_cycles, width)
    middle = tied_layers(head, depth - tail - 1, stands, tie_init, config.seed)
    kept = [*range(head), *middle, *range(depth - tail, depth)]
    keep_layers(config.host, kept)
    looped = _fresh(config, model, hosts.kind_of(model))
    path = hosts.layers_path(model)
    layers: Any = model.get_submodule(path)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{path}.")}
    for new, old in enumerate(kept):
        chosen, is_middle = layers[old].state_dict(), head <= new < head + width
        replaced = [layers[i] for i in stands[:, new - head]] if is_middle else []
        if replaced and (tie_init == "average" or config.lora_rank):
            _check_alike([layers[old], *replaced])
        if replaced and tie_init == "average":
            chosen = _mean([layer.state_dict() for layer in replaced])
        state |= _named(chosen, path, new)
        if replaced and config.lora_rank:
            _fit_lora(looped, new, chosen, replaced)
    _complete(looped.load_state_dict(state, strict=False))
    looped.tie_weights()
    return looped


def keep_layers(host: Any, kept: Sequence[int]) -> None:
    """Give a host's configuration these of its layers, in this order, with what it says of each by its number.

    Raises:
        UnsupportedError: It says that the first layers are of another kind, and they would no longer be the first.
    """
    hosts.keep_lists(host, kept)
    for name in LAYER_NUMBERS:
        if getattr(host, name, None):
            setattr(host, name, [new for new, old in enumerate(kept) if old in getattr(host, name)])
    for name in FIRST_LAYERS:
        if getattr(host, name, None):
            first = [old < getattr(host, name) for old in kept]
            if first != sorted(first, reverse=True):
                raise UnsupportedError(
                    f"{name} says that the first {getattr(host, name)} layers are of another kind, and the loop "
                    "repeats some of them. Raise n_head to that number."
                )
            setattr(host, name, sum(first))
    host.num_hidden_layers = len(kept)


def _named(state: dict[str, Tensor], path: str, layer: int) -> dict[str, Tensor]:
    return {f"{path}.{layer}.{name}": tensor for name, tensor in state.items()}


def tied_layers(first: int, last: int, stands: Tensor, tie_init: TieInit, seed: int) -> list[int]:
    """Return which of the layers ``first`` to ``last`` gives each physical layer its weights and its kind of attention.

    ``lower`` and ``upper`` take the first and last ones, ``stepwise`` evenly spaced ones from end to end, ``random`` a
    sorted sample. ``average`` means the weights of those that it stands for, and takes the first one's kind.
    """
    width = stands.shape[1]
    if tie_init == "average":
        found = stands[0]
    elif tie_init == "lower":
        found = torch.arange(first, first + width)
    elif tie_init == "upper":
        found = torch.arange(last - width + 1, last + 1)
    elif tie_init == "stepwise":
        found = torch.linspace(first, last, width).round().long()
    else:
        order = torch.randperm(last - first + 1, generator=generator(seed, "tie_init"))
        found = first + order[:width].sort().values
    return [int(layer) for layer in found]


def _check_alike(layers: Sequence[nn.Module]) -> None:
    shapes = [{name: tensor.shape for name, tensor in layer.state_dict().items()} for layer in layers]
    if any(found != shapes[0] for found in shapes):
        raise UnsupportedError(
            "The layers that are tied are of several kinds, which have neither an average nor a low-rank difference. "
            "Use another tie_init than average, and no lora_rank."
        )


def _mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: torch.stack([s[n].double() for s in states]).mean(0).to(t.dtype) for n, t in states[0].items()}


@torch.no_grad()
def _fit_lora(
    looped: ZeroTokenForCausalLM, layer: int, tied: dict[str, Tensor], originals: Sequence[nn.Module]
) -> None:
    for name, module in hosts.linear_maps(looped.layers[layer]).items():
        for cycle, original in enumerate(originals):
            residual = original.get_submodule(name).weight - tied[f"{name}.weight"]  # type: ignore[operator]
            residual = residual.mT if isinstance(module, Conv1D) else residual
            key = f"{layer}:{name.replace('.', '/')}"
            a, b = low_rank(residual, rank=looped.config.lora_rank)
            looped.zero_token.lora[f"{key}:A"][cycle].zero_()[: a.shape[0]] = a.to(residual.dtype)
            looped.zero_token.lora[f"{key}:B"][cycle].zero_()[:, : b.shape[1]] = b.to(residual.dtype)


def low_rank(residual: Float[Tensor, "m n"], *, rank: PositiveInt) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Return A and B with B A the best approximation of ``residual`` of that rank, in float64."""
    u, s, v = torch.linalg.svd(residual.double(), full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


@guarded
@torch.no_grad()
def resize_pool(model: ZeroTokenForCausalLM, n_cycles: PositiveInt) -> ZeroTokenForCausalLM:
    """Return the model with another number of cycles; new cycles copy the parameters of the last one.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=3, num_attention_heads=2))
        >>> resize_pool(convert_to_zero_token(base), 4).zero_token.zero_key.shape[0]
        4
    """
    if not isinstance(model.config.order, str):
        raise UnsupportedError("An explicit schedule fixes the number of cycles. Convert again with another order.")
    config = copy.deepcopy(model.config)
    config.n_cycles = n_cycles
    config.min_cycles = min(config.min_cycles, n_cycles)
    if config.cycle_loss_weights is not None:
        config.cycle_loss_weights = (config.cycle_loss_weights + config.cycle_loss_weights[-1:] * n_cycles)[:n_cycles]
    config.check()
    resized: ZeroTokenForCausalLM = _fresh(config, model, model.kind)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("zero_token.")}
    resized.load_state_dict(state, strict=False)
    old, last = model.config.rows, model.config.depth - 1
    old_pool = model.zero_token()
    for name, parameter in resized.zero_token().items():
        source = old_pool[name]
        if name in ("zero_key", "zero_bias"):
            for (layer, cycle), row in config.rows.items():
                parameter[row] = source[old[layer, min(cycle, last)]]
        elif name in ("cycle_gate", "exit_gate"):  # between cycles: one fewer than there are
            if len(source):
                parameter.copy_(source[torch.arange(n_cycles - 1).clamp(max=len(source) - 1)])
        else:
            parameter.copy_(source[torch.arange(n_cycles).clamp(max=last)])
    resized.tie_weights()
    return resized


@dataclass(frozen=True)
class CycleRange:
    """Which layers to loop: those between the first ``n_head`` and the last ``n_tail``.

    Attributes:
        n_head: Layers that stay free in front.
        n_tail: Layers that stay free behind.
        distances: By the number of free layers in front, how far the looped layers would turn the state, as a share of
            half a turn.
    """

    n_head: int
    n_tail: int
    distances: tuple[float, ...]


@guarded
@torch.no_grad()
def choose_cycle_range(
    model: PreTrainedModel, batches: Iterable[Int[Tensor, "b t"]], *, width: PositiveInt | None = None
) -> CycleRange:
    r"""Choose the layers whose output looks most like their input, so that running them again does least harm.

    .. math::
        d_a = \frac{1}{\pi} \operatorname{mean} \arccos \cos(h_a, h_{a + w})

    Args:
        model: A pre-trained model.
        batches: Token ids of text that it knows.
        width: How many layers to loop; a third when not given.

    Returns:
        The range of that width with the smallest mean angle, and the angles.

    Raises:
        RecipeError: There are too few layers, or no batches.
    """
    n_layers = model.config.num_hidden_layers
    width = max(1, round(n_layers / 3)) if width is None else width
    starts = n_layers - width
    if starts < 1:
        raise RecipeError(f"width is {width}, but the model has {n_layers} layers. Lower it to at most {n_layers - 1}.")
    total, tokens = torch.zeros(starts, dtype=torch.float64), 0
    for input_ids in batches:
        # The last state comes after the final norm, so that the last layer always stays free.
        states = model(input_ids.to(model.device), output_hidden_states=True, use_cache=False).hidden_states[:-1]
        for a in range(starts):
            cosine = torch.cosine_similarity(states[a].double(), states[a + width].double(), dim=-1)
            total[a] += cosine.clamp(-1, 1).acos().sum().cpu() / torch.pi
        tokens += input_ids.numel()
    if not tokens:
        raise RecipeError("choose_cycle_range got no batches.")
    n_head = int(total.argmin())
    return CycleRange(n_head, n_layers - width - n_head, tuple((total / tokens).tolist()))
