"""The host's body runs the loop: its own forward is handed a list of layers in which every visit is an entry.

The entries do not compute. Each notes what the host calls it with (masks, positions, the rotation of its kind of
attention) and passes the state on; the last one runs head, loop and tail with what was noted. So the host's code makes
embeddings, masks and rotations, norms and scales the result, and the loop may hold tokens back, leave early or look
ahead. The list belongs to one call: nothing about it stays on a module.
"""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from functools import cache as cached
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import logging

from modicum.errors import RecipeError, UnsupportedError
from modicum.models.zero_token import loop
from modicum.models.zero_token.cache import prepare_cache
from modicum.models.zero_token.config import CAUSAL_SCOPES
from modicum.models.zero_token.visit import PlainConfig, within

logger = logging.get_logger(__name__)

CACHE_NAMES = ("cache", "past_key_values", "layer_past")


class Call:
    """What a call asks of the loop beyond what the host takes, and the trace that it gets back.

    Args:
        n_cycles: Cycles to run, or how many each sequence (b,) or token (b, t) runs; None for the model's own.
        exit: Fields of :class:`~modicum.models.zero_token.loop.Exit` that replace the configuration's.
        plain: Leave the zero tokens out.
        skip: Visits, as (layer, cycle), to leave out; without a cache.
        stay: Run all cycles, whatever the configuration says.
        result: Last state, when the layers are not to run at all.

    Its ``trace`` is the record of the visits.
    """

    def __init__(
        self,
        n_cycles: int | Tensor | None = None,
        *,
        exit: dict[str, Any] | None = None,  # noqa: A002 - what forward calls exit_…
        plain: bool = False,
        stay: bool = False,
        skip: frozenset[tuple[int, int]] = frozenset(),
        result: Tensor | None = None,
    ) -> None:
        self.n_cycles, self.exit = n_cycles, exit or {}
        self.plain, self.stay, self.skip, self.result = plain, stay, skip, result
        self.trace = loop.Trace()


class View:
    """A module with one attribute replaced, for one call; everything else is read from it and written to it."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self.__dict__["_module"] = module
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_module"], name, value)


def view_of(host: type) -> type[View]:
    """Return the class of views of a host's body; capture_outputs knows the host by its name."""
    return type("View", (View,), {"__module__": host.__module__, "__qualname__": host.__qualname__})


class Entry:
    """Stands in the list for a visit of ``block``: notes its arguments, and passes the state on."""

    def __init__(self, block: nn.Module, slot: int, arguments: dict[int, Any]) -> None:
        self.block, self.slot, self.arguments = block, slot, arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Note the arguments; return the state."""
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        # The visit keeps the cache: its slot is no layer's own.
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {name: None if name in CACHE_NAMES else value for name, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        self.arguments[self.slot] = (args, kwargs)
        state: Tensor = hidden
        return state


class Last(Entry):
    """The last entry, which knows the arguments of all and runs them."""

    def __init__(self, block: nn.Module, slot: int, run: loop.LoopRun, result: Tensor | None) -> None:
        super().__init__(block, slot, run.arguments)
        self.run, self.result = run, result

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the visits, or return the state that is there already."""
        hidden = super().__call__(*args, **kwargs)
        if self.result is not None:
            return self.result
        self.run.trace.first = hidden
        return loop.run_visits(self.run, hidden)


def by_name(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the host's forward, all by their ``names``; the cache under its name of today."""
    named = dict(zip(names, args)) | kwargs
    if "past_key_values" in named:
        warnings.warn("`past_key_values` is deprecated, use `cache`.", FutureWarning, stacklevel=4)
        named["cache"] = named.pop("past_key_values")
    return named


def run_body(body: Any, host: type, kwargs: dict[str, Any]) -> Any:
    """Run the host's body over the visits; return what it returns, with the states and attentions of the visits."""
    owner, config = body.looped_by[0], body.config
    owner.check_made()
    call: Call = kwargs.pop("looping", None) or Call()
    asked = {
        what: kwargs.pop(f"output_{what}", None)
        for what in ("hidden_states", "attentions")
    }  # fmt: skip
    return_dict = kwargs.pop("return_dict", None)
    use_cache = config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in owner.layers)
    if checkpointing and body.training and torch.is_grad_enabled() and (use_cache or kwargs.get("cache") is not None):
        logger.warning_once("A cache cannot be filled under gradient checkpointing; use_cache is off.")
        use_cache = kwargs["cache"] = None
    cache = kwargs.get("cache")
    if use_cache and cache is None:
        cache = DynamicCache(config=config)
    if cache is not None:
        cache = prepare_cache(cache, owner.schedule)
    kwargs |= {"use_cache": bool(use_cache), "cache": cache}
    run = _begin_run(owner, config, call, cache, kwargs)
    slots = [layer for layer, _ in owner.schedule]
    blocks = [run.layers[layer] for layer in slots]
    entries: list[Entry] = [Entry(block, slot, run.arguments) for slot, block in enumerate(blocks)]
    entries[-1] = Last(blocks[-1], len(blocks) - 1, run, call.result)
    view = body.view_class(body, owner.layers_name, entries)
    kwargs |= {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
    out = host.forward(view, **kwargs)  # type: ignore[attr-defined]
    if len(run.arguments) < len(entries):
        raise UnsupportedError(f"{host.__name__} ran {len(run.arguments)} of {len(entries)} visits.")
    trace = call.trace
    trace.run = run
    if call.result is None:
        normed = out.last_hidden_state
        states = [trace.first, *trace.states[:-1], normed]
        found = {"hidden_states": states, "attentions": [visit.weights for visit in trace.visits]}
        for what, value in asked.items():
            chosen = _asked(getattr(config, f"output_{what}", False) if value is None else value, found[what])
            if chosen is not None:
                out[what] = chosen
        if body.training and (run.n_cycles < config.depth or "exit_gate" in run.pool) and run.pool:
            # Parameters of cycles that were not drawn, and of a gate, take part with weight zero: DDP waits for every
            # gradient.
            nothing = 0 * torch.stack([x.sum() for x in run.pool.values()]).sum()
            out["last_hidden_state"] = normed + nothing.to(normed.dtype)
    plain = config.return_dict if return_dict is None else return_dict
    return out if plain else out.to_tuple()


def _asked(asked: bool | int | list[int] | None, found: list[Any]) -> tuple[Any, ...] | None:
    """Return ``found`` when it is asked for; with None for those not in a list."""
    if isinstance(asked, bool) or asked is None:
        return tuple(found) if asked else None
    kept = {index % len(found) for index in ([asked] if isinstance(asked, int) else asked)}
    return tuple(x if index in kept else None for index, x in enumerate(found))


def _begin_run(owner: Any, config: Any, call: Call, cache: Cache | None, kwargs: dict[str, Any]) -> loop.LoopRun:
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or (kwargs.get("input_ids") is not None and kwargs.get("inputs_embeds") is not None):
        raise RecipeError("Give exactly one of input_ids and inputs_embeds.")
    b, t = tokens.shape[:2]
    plain = PlainConfig(config)
    settings = {
        name: getattr(plain, f"exit_{name}") for name in ("threshold", "criterion", "score", "scope")
    } | {"min_cycles": plain.min_cycles}  # fmt: skip
    if owner.training or call.stay:
        settings["threshold"] = None  # a threshold was chosen for the trained model; a call may still ask for one
    settings |= {name: value for name, value in call.exit.items() if value is not None}
    if (
        settings["threshold"] is not None
        and settings["scope"] not in CAUSAL_SCOPES
        and owner.kind == "causal"
        and t > 1
    ):
        logger.warning_once(
            f"exit_scope {settings['scope']!r} lets later tokens, and in a packed row other texts, choose the depth of "
            f"earlier ones: these logits give no likelihood of a text. Use exit_scope {' or '.join(CAUSAL_SCOPES)}."
        )
    _check_exit(settings, owner.depth)
    n_cycles, depths = _cycles(owner, call.n_cycles, b, t)
    return loop.LoopRun(
        config=plain,
        stages=owner._stages.without(call.skip) if call.skip else owner._stages,
        layers=owner.layers,
        rows={} if call.plain else owner._rows,
        pool=owner.zero_token(),
        cache=cache,
        real=_real(kwargs.get("attention_mask"), t),
        # As transformers does, a mask of padding says that each row is one text.
        position_ids=kwargs.get("position_ids") if kwargs.get("attention_mask") is None else None,
        past=0 if cache is None else cache.get_seq_length(),
        predict=owner.read_out,
        n_cycles=n_cycles,
        exit=loop.Exit(**settings),
        trace=call.trace,
        depths=depths,
        arguments={},
        seen={},
    )


def _real(mask: Any, t: int) -> Tensor | None:
    """Return which of the new tokens are no padding (b, t), or None for all."""
    if isinstance(mask, dict):  # by kind of attention
        mask = next(iter(mask.values()))
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -t:].bool()
    # What was made beforehand for a static cache: padding in front sees nothing.
    return (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)[:, 0].any(-1)


def _cycles(owner: Any, n_cycles: int | Tensor | None, b: int, t: int) -> tuple[int, Tensor | None]:
    """Return how many cycles to run at most, and how many each token runs if they differ."""
    depth = owner.depth
    if isinstance(n_cycles, Tensor) and n_cycles.dim() > 0:
        whole = not n_cycles.is_floating_point() and n_cycles.dtype is not torch.bool
        fits = n_cycles.shape in ((b,), (b, t), (b, 1), (1, t), (1, 1))
        read = not torch.compiler.is_compiling()  # a graph cannot depend on what the numbers are
        if not (whole and fits) or (read and not bool(((n_cycles >= 1) & (n_cycles <= depth)).all())):
            raise _wrong_cycles(n_cycles, depth)
        if len(owner._stages.cycles) < depth:
            raise UnsupportedError(f"The order {owner.config.order!r} runs all tokens equally deep. Use order: cycle.")
        depths = (n_cycles[:, None] if n_cycles.dim() == 1 else n_cycles).expand(b, t)
        return depth, depths
    if n_cycles is None:
        return (owner.training_cycles() if owner.training else depth), None
    cycles = _whole_number(n_cycles)
    if cycles is None or not 1 <= cycles <= depth:
        raise _wrong_cycles(n_cycles, depth)
    return cycles, None


def _wrong_cycles(n_cycles: object, depth: int) -> RecipeError:
    came = repr(n_cycles)
    if isinstance(n_cycles, Tensor):  # whose repr takes several lines
        came = f"a tensor of shape {tuple(n_cycles.shape)} and {n_cycles.dtype}"
        came += f", from {n_cycles.min()} to {n_cycles.max()}" if n_cycles.numel() else ""
    return RecipeError(
        f"n_cycles is {came}, expected 1 to {depth}, or a tensor of such numbers for each sequence or token: the "
        f"model has zero tokens for {depth} cycles."
    )


def _whole_number(value: Any) -> int | None:
    """Return a whole number, or None of what is none: fractions, truth values, lists."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _check_exit(settings: dict[str, Any], depth: int) -> None:
    """Refuse what a call asked of its exits, as a configuration would."""
    threshold, least = settings["threshold"], settings["min_cycles"]
    try:
        number = threshold is None or not math.isnan(threshold)
    except TypeError:
        number = False
    if not number:
        raise RecipeError(f"exit_threshold is {threshold!r}, expected a number.")
    if not 1 <= (_whole_number(least) or 0) <= depth:
        raise RecipeError(f"min_cycles is {least!r}, expected 1 to {depth}.")


@cached
def looped_body(host: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of a body that runs the loop: the host's own, with another forward."""
    signature = inspect.signature(host.forward)
    names = list(signature.parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_body(self, host, by_name(names, args, kwargs))

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = host.forward.__doc__
    view = view_of(host)
    name = f"{host.__name__}[{host.__module__.replace('.', ':')}]"
    return type(
        host.__name__, (host,), {"forward": forward, "view_class": view, "__module__": __name__, "__qualname__": name}
    )


@cached
def looped_layer(layer: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a layer whose parts know which visit is under way: the host's own, with another forward."""

    @wraps(layer.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return within(layer.forward, self, args, kwargs)

    name = f"{layer.__name__}[{layer.__module__.replace('.', ':')}]"
    return type(layer.__name__, (layer,), {"forward": forward, "__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> Any:
    """Return the class of a body or of a layer by its name, which is how pickle finds it."""
    if name.endswith("]") and "[" in name:
        import importlib

        host, module = name[:-1].split("[")
        found = getattr(importlib.import_module(module.replace(":", ".")), host)
        return looped_body(found) if issubclass(found, PreTrainedModel) else looped_layer(found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
