"""What looping adds to a class of transformers: the host's own, whatever its head."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager
from functools import cache as cached
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.models.zero_token import hosts, loop
from modicum.models.zero_token.body import Call, by_name, looped_body, looped_layer, run_body, view_of
from modicum.models.zero_token.config import EXITS, LABELS, ZeroTokenConfig, check_choice
from modicum.models.zero_token.pool import OTHER_CYCLES, ZeroTokenPool
from modicum.models.zero_token.spent import Spent, counted, counting
from modicum.models.zero_token.visit import ATTENTION, add_gate, add_lora
from modicum.random import generator

logger = logging.get_logger(__name__)

_MADE = (  # fields that decide which parameters and visits there are, which is settled once
    "n_cycles", "n_head", "n_tail", "order", "skip", "zero_token", "zero_kind", "zero_layers", "pool", "zero_bias",
    "ffn_gate", "cycle_embedding", "cycle_gate", "lora_rank",
)  # fmt: skip
# What forward takes beyond what the host takes; generate and GenerationConfig take all but the last.
OWN_KNOBS = ("n_cycles", *EXITS, "output_zero_attention")


class Looped(PreTrainedModel):
    """What looping adds to a class of the host, whatever its head.

    ``ZeroTokenForCausalLM(config)`` makes an object of a class that derives from both ``ZeroTokenForCausalLM`` and the
    host's class. Physical weights have the names that they have in the host; what looping adds is in ``zero_token``.
    """

    config_class = ZeroTokenConfig
    host_class: ClassVar[type[PreTrainedModel] | None] = None
    kind: ClassVar[str] = "base"
    _supports_flash_attn = False
    _supports_flex_attn = False
    _keys_to_ignore_on_load_unexpected = [r"zero_token\.draws"]  # noqa: RUF012 - counts passes of a training

    def __new__(cls, config: ZeroTokenConfig | None = None, *_: Any, **__: Any) -> Any:
        if cls.host_class is None and config is not None:
            cls = looped_class(cls, hosts.host_class(config.host, cls.kind))  # type: ignore[arg-type]
        return super().__new__(cls)

    def __init__(self, config: ZeroTokenConfig) -> None:
        host = copy.deepcopy(config.host)
        for label in LABELS:  # a head's labels may be given when a model is loaded
            setattr(host, label, getattr(config, label))
        host._attn_implementation_internal = ATTENTION
        try:
            super().__init__(host)
        except KeyError as error:  # a table of attention classes that has no place for ours
            raise hosts.refused(config.host, "its attention cannot be replaced") from error
        name: Any = config._attn_implementation
        config._attn_implementation_internal = self._check_and_adjust_attn_implementation(name, is_init_check=True)
        body, self.layers_name = hosts.find_layers(self, config.host.num_hidden_layers)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
            elif hasattr(module, "config"):
                module.config._attn_implementation_internal = ATTENTION
        self._body = (body,)  # no module of its own: the host's names it already
        if body is not self:
            body.__class__ = looped_body(type(body))  # type: ignore[arg-type]
        body.looped_by = (self,)
        layers = self.layers
        hosts.scale_residual_init(layers, config.host, config.num_hidden_layers)
        maps = {layer: hosts.linear_maps(layers[layer]) for layer in config.middle} if config.lora_rank else {}
        shapes = {layer: {n: hosts.linear_shape(m) for n, m in found.items()} for layer, found in maps.items()}
        self.zero_token = ZeroTokenPool(config, shapes)
        if config.zero_key_rope == "relative":
            hosts.rotation_of(hosts.attention_of(layers[0]))
        for block in layers if config.lora_rank or config.ffn_gate else ():
            block.__class__ = looped_layer(type(block))  # type: ignore[arg-type]
        for layer in config.middle:
            for path, module in maps.get(layer, {}).items():
                add_lora(module, f"{layer}:{path.replace('.', '/')}")
            if config.ffn_gate:
                add_gate(hosts.feed_forward_of(layers[layer]))
        self.follow_schedule()
        self._progress: float | None = None
        # The host's plan would split the heads among devices, and leave the zero keys of all heads on each.
        self.tp_plan = None
        self.zero_token.initialize()

    def follow_schedule(self) -> None:
        """Read the schedule, which is part of the architecture: once, not at every step of decoding."""
        config: ZeroTokenConfig = self._body[0].config
        self.schedule, self._stages, self._rows, self.depth = config.schedule, config.stages, config.rows, config.depth
        self._made = [copy.copy(config.__dict__[name]) for name in _MADE]

    def check_made(self) -> None:
        """Refuse a configuration that was changed where the model follows it no more.

        Raises:
            RecipeError: It says something else than the model is.
        """
        fields = self._body[0].config.__dict__
        for name, made in zip(_MADE, self._made):
            if fields[name] != made:
                raise RecipeError(
                    f"config.{name} was set to {fields[name]!r}, but the model was made with {made!r}, and its "
                    "configuration cannot change that. Give n_cycles to a call, or make another model: "
                    "resize_pool(model, n_cycles), skip_visits(model, visits) or convert_to_zero_token(base, …)."
                )

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers reads the source of the class's module, which for us is the host's.
        host: Any = cls.host_class
        return bool(host is not None and host._can_set_experts_implementation())

    @property
    def layers(self) -> nn.ModuleList:
        """The physical layers."""
        return self._body[0]._modules[self.layers_name]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroTokenPool):
            module.initialize()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model; see ``transformers.PreTrainedModel.from_pretrained``.

        Raises:
            CheckpointError: The checkpoint was made for another number of cycles, or its tensors have other names and
                nobody asks for ``output_loading_info``.
        """
        try:
            report = bool(kwargs.pop("output_loading_info", False))
            model, info = super().from_pretrained(*args, **kwargs, output_loading_info=True)
            if not report:  # who asks for the report is told by it
                model.check_loaded(info)
            model.take_exits()
            return (model, info) if report else model
        except RuntimeError as error:
            # The report of the tensors that do not fit has been logged; the error itself names none.
            if "ignore_mismatched_sizes" in str(error):
                raise CheckpointError(
                    f"The checkpoint's tensors do not fit the configuration. {OTHER_CYCLES}"
                ) from error
            raise

    def check_loaded(self, info: Any) -> None:
        """Refuse a checkpoint whose tensors have names that transformers translates for the host's own class alone."""
        path = next(f"{name}." for name, module in self.named_modules() if module is self.layers)
        wanted = "" if self.kind == "causal" else path  # a new head starts at random, as it must
        lost = [n for n in info["missing_keys"] if n.startswith(wanted) and not n.startswith("zero_token.")]
        other = [name for name in info["unexpected_keys"] if not name.startswith(("score.", "classifier."))]
        if lost and other:
            raise CheckpointError(
                f"The checkpoint has {min(other)} and lacks {min(lost)}, which would start at random: its tensors are "
                "named as in files of the host's own class. Load it by the host's own class, or its auto class, and "
                "loop it by modicum.models.convert_to_zero_token."
            )

    def take_exits(self) -> None:
        """Let the exits that a loaded ``generation_config`` holds act in every pass, unless they were given."""
        generation, given = getattr(self, "generation_config", None), self.config.exits()
        for name in EXITS:
            if hasattr(generation, name):
                if name not in given:
                    setattr(self.config, name, getattr(generation, name))
                delattr(generation, name)
        self.config.check()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; exits go into ``generation_config.json``."""
        self.check_made()
        generation = getattr(self, "generation_config", None)
        exits = self.config.exits()
        if generation is not None:
            self.generation_config = copy.deepcopy(generation)
            for name, value in exits.items():
                if value is not None and getattr(generation, name, None) is None:
                    setattr(self.generation_config, name, value)
                    # What was made of a model's configuration is read without fields that are no one else's.
                    self.generation_config._from_model_config = False
        elif exits:
            logger.warning_once(f"A model that generates nothing keeps no {', '.join(exits)}: give them to its calls.")
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.generation_config = generation

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay must leave alone: those that looping added.

        Decay would shut a gate, or shrink a key whose length is its meaning.
        """
        pool = {id(parameter) for parameter in self.zero_token.parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in pool}

    def set_training_step(self, step: int, total: int | None = None) -> None:
        """Name the training step, so that its number of cycles does not depend on how it was reached.

        Args:
            step: Optimiser steps done before.
            total: Length of the run, which ``cycle_onset`` and ``train_cycles="grow"`` need to know.
        """
        self.zero_token.count(step << 20)
        self._progress = step / total if total else None

    def training_cycles(self) -> int:
        """Return how many cycles a pass of the current training step runs."""
        depth, onset, kind = self.depth, self.config.cycle_onset, self.config.train_cycles
        if onset or kind == "grow":
            if self._progress is None:
                raise RecipeError(
                    "cycle_onset and train_cycles: grow go by the course of training, which is not known. Call "
                    "model.set_training_step(step, total) before each step, or give the Trainer "
                    "callbacks=[modicum.models.TrainingStep()], which does."
                )
            if self._progress < onset:
                return 1
            if kind == "grow":
                return min(depth, 1 + int(depth * (self._progress - onset) / (1 - onset)))
        return self._drawn_cycles() if kind == "random" else depth

    def _drawn_cycles(self) -> int:
        draw = generator(self.config.seed, "train_cycles", self.zero_token.next_count())
        return int(torch.randint(1, self.depth + 1, (), generator=draw))

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the model; the class of each host has its host's arguments, and those above."""
        return self.looped_forward({"input_ids": input_ids} | kwargs)

    def _call(self, named: dict[str, Any]) -> tuple[Call, bool]:
        """Take what is ours out of the arguments; return it, and whether to report the zero attention."""
        own = {name: named.pop(name, None) for name in OWN_KNOBS}
        exits = {name.removeprefix("exit_"): own[name] for name in EXITS}
        for name in ("exit_criterion", "exit_score", "exit_scope"):
            if own[name] is not None:
                check_choice(name, own[name])
        call: Call = named.pop("looping", None) or Call(n_cycles=own["n_cycles"], exit=exits)
        return call, bool(own["output_zero_attention"])

    def decides(self, call: Call) -> bool:
        """Whether a call finds out for each token how many cycles it runs."""
        asked = call.exit.get("threshold")
        threshold = asked if self.training or call.stay or asked is not None else self.config.exit_threshold
        return threshold is not None or (isinstance(call.n_cycles, Tensor) and call.n_cycles.dim() > 0)

    @staticmethod
    def counted(every: int = 8) -> AbstractContextManager[Spent]:
        """Count what looped models spend within; one pass in ``every`` that may leave is timed with all cycles too.

        Example:
            >>> with Looped.counted() as spent:
            ...     pass
            >>> spent.tokens
            0
        """
        return counted(every)

    def _run_host(self, named: dict[str, Any], call: Call) -> Any:
        """Run the host's forward with the loop in its body."""
        host: Any = self.host_class
        if self._body[0] is self:
            return run_body(self, host, named | {"looping": call})
        return host.forward(self, **named, looping=call)

    def looped_forward(self, named: dict[str, Any]) -> Any:
        """Run the model on arguments by name."""
        call, report = self._call(named)
        return (_eagerly if self.decides(call) else Looped._pass)(self, named, call, report)

    def _pass(self, named: dict[str, Any], call: Call, report: bool) -> Any:
        plain = named.pop("return_dict", None)
        named["return_dict"] = True
        out = counting(self, lambda call: self._run_host(dict(named), call), named, call)
        if out.get("loss") is not None:
            out["loss"] = self._weighted_loss(out["loss"], call.trace, named)
        out = self._reported(out, call.trace, report)
        return out if (self.config.return_dict if plain is None else plain) else out.to_tuple()

    def _weighted_loss(self, loss: Tensor, trace: loop.Trace, named: dict[str, Any]) -> Tensor:
        """Return the sum of the losses after each cycle that ran; fewer cycles share the weights of all."""
        weights, run = self.config.cycle_loss_weights, trace.run
        if weights is None or not self.training or run is None:
            return loss
        ran = len(trace.cycle_states)
        share = sum(weights[:ran]) / sum(weights)
        if not share > 0:
            raise RecipeError(f"cycle_loss_weights are {weights}, which leaves a pass of {ran} cycles without a loss.")
        tail = run.without_cache()  # these passes through the tail come after the one that filled the cache
        left_out = ("inputs_embeds", "cache", "attention_mask", "position_ids", "use_cache")
        kept = {name: value for name, value in named.items() if name not in left_out}
        terms = [self._read_out(tail.tail(s), **kept).loss for s in trace.cycle_states[:-1]] + [loss]
        return torch.stack([w / share * term for w, term in zip(weights, terms)]).sum()

    def _reported(self, out: Any, trace: loop.Trace, report: bool) -> Any:
        for name, value in report_of(trace, report).items():
            setattr(out, name, value)
        return out

    def read_out(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Return the logits of a state that comes after the last layer, by the host's norm and head."""
        if self.kind == "sequence":
            raise UnsupportedError(
                "A classifier of sequences predicts nothing for a token to leave by. Use another exit_criterion than "
                "confidence, entropy and kl."
            )
        logits: Tensor = self._read_out(hidden).logits
        return logits

    def _read_out(self, hidden: Tensor, **kwargs: Any) -> Any:
        if self.kind == "base":
            raise UnsupportedError("A body without head predicts nothing to leave by. Use another exit_criterion.")
        kwargs |= {"use_cache": False, "return_dict": True}
        if kwargs.get("input_ids") is None:  # a head that reads them gets them
            width = self.get_input_embeddings().weight.shape[-1]
            kwargs["inputs_embeds"] = hidden.new_zeros(*hidden.shape[:2], width)
        if "output_router_logits" in inspect.signature(self.host_class.forward).parameters:  # type: ignore[union-attr]
            kwargs["output_router_logits"] = False  # no layer runs, so no router does
        return self._run_host(kwargs, Call(n_cycles=1, result=hidden))


# Who goes on is read off tensors, which no graph can do: the compiler is kept out of such passes.
_eagerly: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
    Looped._pass,
    reason="A pass that may leave early compiles to no single graph. Leave out fullgraph, or the exits.",
)


def report_of(trace: loop.Trace, report: bool) -> dict[str, Any]:
    """Return what a pass adds to the host's output."""
    zero = {(v.layer, v.cycle): v.p0 for v in trace.visits if v.p0 is not None} if report else None
    return {
        "cycles": trace.cycles, "layer_calls": trace.calls, "exit_scores": tuple(trace.scores) or None,
        "zero_attention": zero,
    }  # fmt: skip


@cached
def looped_class(kind: type[Looped], host: type[PreTrainedModel]) -> type[Looped]:
    """Return the class of a looped model of this host: both a ``kind`` and the host's class."""
    signature = inspect.signature(host.forward)
    names = list(signature.parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.looped_forward(by_name(names, args, kwargs))

    *given, rest = signature.parameters.values()
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_KNOBS]
    forward.__signature__ = signature.replace(parameters=[*given, *own, rest])  # type: ignore[attr-defined]
    forward.__doc__ = kind.__doc__
    qualname = f"{kind.__name__}[{host.__module__.replace('.', ':')}:{host.__name__}]"
    namespace = {"forward": forward, "host_class": host, "__module__": kind.__module__, "__qualname__": qualname}
    return type(kind.__name__, (kind, host), namespace | {"view_class": view_of(host)})
