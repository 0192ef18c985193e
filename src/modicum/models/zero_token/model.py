r"""Zero Token Transformer: a deeper model from the same weights, which may leave its loop early.

The first and last layers of the host run once, the layers between them several times. Each visit of a middle layer has
a zero token of its own (a trainable key with value zero), by which a shared layer can tell the cycles apart and attend
to nothing. Where the attention on the zero token is high, the loop may stop.

A looped model *is* its host: its class derives from the host's class with that head, so that embeddings, masks,
positions, norms, scalings and heads are the host's own code; see :mod:`~modicum.models.zero_token.body`.

Looping saves parameters, not decoding bandwidth: every cycle reads the middle weights again. Looped once more, a
pre-trained model is at first much worse; it needs training, several free layers at both ends, or
``cycle_gate="rezero"``.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, fields
from functools import cache as cached
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.models.zero_token import hosts, loop
from modicum.models.zero_token.body import Call, by_name, looped_body, run_body, view_of
from modicum.models.zero_token.config import CAUSAL_SCOPES, LABELS, ZeroTokenConfig, check_choice
from modicum.models.zero_token.pool import OTHER_CYCLES, ZeroTokenPool
from modicum.models.zero_token.visit import ATTENTION, add_gate, add_lora, watch
from modicum.random import generator

logger = logging.get_logger(__name__)

# What forward takes beyond what the host takes; generate and GenerationConfig take all but the last.
EXIT_KNOBS = ("exit_threshold", "exit_criterion", "exit_score", "exit_scope", "min_cycles")
OWN_KNOBS = ("n_cycles", *EXIT_KNOBS, "output_zero_attention")


@dataclass
class ZeroTokenOutput(CausalLMOutputWithPast):
    """What a looped model returns.

    Attributes:
        loss: Mean cross-entropy, when labels were given.
        logits: Logits.
        cache: The cache.
        hidden_states: State before each visit, and the last one after the final norm.
        attentions: Attention on the real tokens in each visit.
        cycles: How many cycles each token ran (b, t).
        layer_calls: How many layer visits the pass made.
        exit_scores: What was compared with the threshold at each decision; minus the change for the criteria that
            measure one.
        zero_attention: Attention on the zero token in each visit that has one, as a mapping from (layer, cycle) to
            (b, h, t); meaningless for tokens that had left.
        aux_loss: What a mixture of experts adds to the loss, when it was asked for.
        router_logits: What its routers decided by.
    """

    cycles: Int[Tensor, "b t"] | None = None
    layer_calls: int | None = None
    exit_scores: tuple[Float[Tensor, "b t"], ...] | None = None
    zero_attention: dict[tuple[int, int], Float[Tensor, "b h t"]] | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


# Read once: the compiler cannot trace it.
_REPORTED = frozenset(field.name for field in fields(ZeroTokenOutput))


class Looped(PreTrainedModel):
    """What looping adds to a class of the host, whatever its head.

    ``ZeroTokenForCausalLM(config)`` makes an object of a class that derives from both ``ZeroTokenForCausalLM`` and the
    host's class. Physical weights have the names that the host's checkpoints give them; what looping adds is in
    ``zero_token``.
    """

    config_class = ZeroTokenConfig
    host_class: ClassVar[type[PreTrainedModel] | None] = None
    kind: ClassVar[str] = "base"
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False

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
        for layer in config.middle if config.lora_rank or config.ffn_gate else ():
            feed_forward = hosts.feed_forward_of(layers[layer])
            for path, module in maps.get(layer, {}).items():
                add_lora(module, f"{layer}:{path.replace('.', '/')}")
            if config.ffn_gate:
                add_gate(feed_forward)
            watch(hosts.attention_of(layers[layer]), feed_forward)
        # The schedule is part of the architecture: it is read once, not at every step of decoding.
        self.schedule, self._stages, self._rows, self.depth = config.schedule, config.stages, config.rows, config.depth
        self._progress: float | None = None
        # The host's plan would split the heads among devices, and leave the zero keys of all heads on each.
        self.tp_plan = None
        self.zero_token.initialize()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers reads the source of the class's module, which for us is the host's.
        host: Any = cls.host_class
        return bool(host is not None and host._can_set_experts_implementation())

    @property
    def layers(self) -> nn.ModuleList:
        """The physical layers."""
        return self._body[0]._modules[self.layers_name]

    @property
    def backbone(self) -> Any:
        """The host without its head."""
        return self.base_model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroTokenPool):
            module.initialize()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model; see ``transformers.PreTrainedModel.from_pretrained``.

        Raises:
            CheckpointError: The checkpoint was made for another number of cycles.
        """
        try:
            return super().from_pretrained(*args, **kwargs)
        except RuntimeError as error:
            # The report of the tensors that do not fit has been logged; the error itself names none.
            if "ignore_mismatched_sizes" in str(error):
                raise CheckpointError(
                    f"The checkpoint's tensors do not fit the configuration. {OTHER_CYCLES}"
                ) from error
            raise

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

    def _call(self, named: dict[str, Any]) -> tuple[Call, bool]:
        """Take what is ours out of the arguments; return it, and whether to report the zero attention."""
        own = {name: named.pop(name, None) for name in OWN_KNOBS}
        exits = {name.removeprefix("exit_"): own[name] for name in EXIT_KNOBS}
        for name in ("exit_criterion", "exit_score", "exit_scope"):
            if own[name] is not None:
                check_choice(name, own[name])
        call: Call = named.pop("looping", None) or Call(n_cycles=own["n_cycles"], exit=exits)
        return call, bool(own["output_zero_attention"])

    def _run_host(self, named: dict[str, Any], call: Call) -> Any:
        """Run the host's forward with the loop in its body."""
        host: Any = self.host_class
        if self._body[0] is self:
            return run_body(self, host, named | {"looping": call})
        return host.forward(self, **named, looping=call)

    def looped_forward(self, named: dict[str, Any]) -> Any:
        """Run the model on arguments by name."""
        call, report = self._call(named)
        plain = named.pop("return_dict", None)
        out = self._run_host(named | {"return_dict": True}, call)
        out = self._reported(out, call.trace, report, named)
        return out if (self.config.return_dict if plain is None else plain) else out.to_tuple()

    def _reported(self, out: Any, trace: loop.Trace, report: bool, _named: dict[str, Any]) -> Any:
        for name, value in _report(trace, report).items():
            setattr(out, name, value)
        return out

    def read_out(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Return the logits of a state that comes after the last layer, by the host's norm and head."""
        logits: Tensor = self._read_out(hidden).logits
        return logits

    def _read_out(self, hidden: Tensor, **kwargs: Any) -> Any:
        if self.kind == "base":
            raise UnsupportedError("A body without head predicts nothing to leave by. Use another exit_criterion.")
        width = self.get_input_embeddings().weight.shape[-1]
        blank = hidden.new_zeros(*hidden.shape[:2], width)
        call = Call(n_cycles=1, result=hidden)
        return self._run_host(kwargs | {"inputs_embeds": blank, "use_cache": False, "return_dict": True}, call)


def _report(trace: loop.Trace, report: bool) -> dict[str, Any]:
    zero = {(v.layer, v.cycle): v.p0 for v in trace.visits if v.p0 is not None} if report else None
    return {
        "cycles": trace.cycles, "layer_calls": trace.calls, "exit_scores": tuple(trace.scores) or None,
        "zero_attention": zero,
    }  # fmt: skip


class ZeroTokenModel(Looped):
    """A looped body: states, no logits."""


class ZeroTokenForSequenceClassification(Looped):
    """A looped model that gives a sequence a label."""

    kind = "sequence"


class ZeroTokenForTokenClassification(Looped):
    """A looped model that gives each token a label."""

    kind = "token"


class ZeroTokenForCausalLM(Looped, GenerationMixin):
    """A causal language model whose middle layers run several times.

    ``forward`` takes what the host's takes, and:

    * ``n_cycles``: cycles to run, instead of all; or how many each sequence (b,) or token (b, t) runs,
    * ``exit_threshold``, ``exit_criterion``, ``exit_score``, ``exit_scope``, ``min_cycles``: instead of the
      configuration's; ``generate`` and ``GenerationConfig`` take them too,
    * ``output_zero_attention``: return the attention on the zero tokens.

    It returns a :class:`ZeroTokenOutput`.

    Example:
        >>> config = ZeroTokenConfig(host={"model_type": "llama", "vocab_size": 16, "hidden_size": 8,
        ...     "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1})
        >>> model = ZeroTokenForCausalLM(config).eval()
        >>> model(torch.tensor([[1, 2, 3]])).layer_calls
        4
    """

    kind = "causal"

    def _reported(self, out: Any, trace: loop.Trace, report: bool, named: dict[str, Any]) -> Any:
        found = {name: value for name, value in out.items() if name in _REPORTED}
        if trace.run is not None and named.get("labels") is not None:
            found["loss"] = self._weighted_loss(found["loss"], trace, named)
        return ZeroTokenOutput(**found, **_report(trace, report))

    def _weighted_loss(self, loss: Tensor, trace: loop.Trace, named: dict[str, Any]) -> Tensor:
        """Return the sum of the losses after each cycle that ran, by their weights."""
        weights, run = self.config.cycle_loss_weights, trace.run
        if weights is None or not self.training or run is None:
            return loss
        tail = run.without_cache()  # these passes through the tail come after the one that filled the cache
        left_out = ("input_ids", "inputs_embeds", "cache", "attention_mask", "position_ids", "use_cache")
        kept = {name: value for name, value in named.items() if name not in left_out}
        terms = [self._read_out(loop.run_tail(tail, s), **kept).loss for s in trace.cycle_states[:-1]] + [loss]
        return torch.stack([w * term for w, term in zip(weights, terms)]).sum()

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Let a ``GenerationConfig`` hold our knobs; refuse what would not be what it says."""
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name in ("n_cycles", *EXIT_KNOBS):
            value = getattr(config, name, None)
            if value is not None:
                model_kwargs.setdefault(name, value)
        asked = {name: model_kwargs.get(name) for name in ("exit_threshold", "exit_scope")}
        threshold, scope = (getattr(self.config, n) if v is None else v for n, v in asked.items())
        if threshold is not None and scope not in CAUSAL_SCOPES:
            raise UnsupportedError(
                f"exit_scope: {scope} lets later tokens choose the depth of earlier ones, so that text cannot be "
                f"generated with it. Use exit_scope: {' or '.join(CAUSAL_SCOPES)}."
            )
        if config.assistant_early_exit is not None:
            raise UnsupportedError(
                "assistant_early_exit counts layers of a model that is not looped. Draft with another model "
                "(assistant_model), or set exit_threshold."
            )
        return config, model_kwargs

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refuse: continuous batching keys its cache by the physical layer."""
        raise UnsupportedError(
            "Continuous batching keeps keys by the physical layer, and a looped model keeps them by visit. "
            "Use model.generate."
        )


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
    namespace = {"forward": forward, "host_class": host, "__module__": __name__, "__qualname__": qualname}
    return type(kind.__name__, (kind, host), namespace | {"view_class": view_of(host)})


def __getattr__(name: str) -> Any:
    """Return a looped class by its name, which is how pickle finds it."""
    if name.endswith("]") and "[" in name:
        import importlib

        kind, host = name[:-1].split("[")
        module, _, host = host.rpartition(":")
        return looped_class(globals()[kind], getattr(importlib.import_module(module.replace(":", ".")), host))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register(ZeroTokenConfig.model_type, ZeroTokenConfig)
for _auto, _kind in (
    (AutoModel, ZeroTokenModel),
    (AutoModelForCausalLM, ZeroTokenForCausalLM),
    (AutoModelForSequenceClassification, ZeroTokenForSequenceClassification),
    (AutoModelForTokenClassification, ZeroTokenForTokenClassification),
):
    _auto.register(ZeroTokenConfig, _kind)
