r"""Zero Token Transformer: a deeper model from the same weights, which may leave its loop early.

The first and last layers of the host run once, the layers between them several times. Each visit of a middle layer has
a zero token of its own (a trainable key with value zero), by which a shared layer can tell the cycles apart and attend
to nothing. Where the attention on the zero token is high, the loop may stop.

Looping saves parameters, not decoding bandwidth: every cycle reads the middle weights again. Looped once more, a
pre-trained model is at first much worse; it needs training, several free layers at both ends, or
``cycle_gate="rezero"``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.models.zero_token import hosts, loop
from modicum.models.zero_token.cache import prepare_cache
from modicum.models.zero_token.config import PlainConfig, ZeroTokenConfig
from modicum.models.zero_token.pool import OTHER_CYCLES, ZeroTokenPool
from modicum.models.zero_token.visit import ATTENTION, add_gate, add_lora, watch
from modicum.random import generator

logger = logging.get_logger(__name__)


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
    """

    cycles: Int[Tensor, "b t"] | None = None
    layer_calls: int | None = None
    exit_scores: tuple[Float[Tensor, "b t"], ...] | None = None
    zero_attention: dict[tuple[int, int], Float[Tensor, "b h t"]] | None = None


class ZeroTokenForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose middle layers run several times.

    Its physical weights have the names that the host's checkpoints give them; what looping adds is in ``zero_token``.

    Example:
        >>> config = ZeroTokenConfig(host={"model_type": "llama", "vocab_size": 16, "hidden_size": 8,
        ...     "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1})
        >>> model = ZeroTokenForCausalLM(config).eval()
        >>> model(torch.tensor([[1, 2, 3]])).layer_calls
        4
    """

    config_class = ZeroTokenConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012 - transformers declares it so

    def __init__(self, config: ZeroTokenConfig) -> None:
        super().__init__(config)
        host = hosts.host_of(config.host)
        backbone = hosts.build_backbone(config.host)
        self.base_model_prefix = host.prefix
        self.add_module(host.prefix, backbone)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tied_weights_keys = {"lm_head.weight": f"{host.prefix}.{host.embedding}.weight"}
        self._no_split_modules = list(backbone._no_split_modules)
        hosts.scale_residual_init(backbone, config.num_hidden_layers)
        layers = getattr(backbone, host.layers)
        maps = {layer: hosts.linear_maps(layers[layer]) for layer in config.middle} if config.lora_rank else {}
        shapes = {layer: {n: hosts.linear_shape(m) for n, m in found.items()} for layer, found in maps.items()}
        self.zero_token = ZeroTokenPool(config, shapes)
        for layer in config.middle:
            if config.lora_rank or config.ffn_gate:
                switch = watch(getattr(layers[layer], host.attention))
                for name, module in maps.get(layer, {}).items():
                    add_lora(module, name, switch)
                if config.ffn_gate:
                    add_gate(layers[layer].mlp, switch)
        # The schedule is part of the architecture: it is read once, not at every step of decoding.
        self._stages, self._rows, self._types = config.stages, config.rows, config.layer_types
        self._draws = 0
        self._progress: float | None = None
        self.post_init()
        # The host's plan would split the heads among devices, and leave the zero keys of all heads on each.
        self.tp_plan = None

    @property
    def backbone(self) -> Any:
        """The host without its head."""
        return getattr(self, self.base_model_prefix)

    @property
    def layers(self) -> nn.ModuleList:
        """The physical layers."""
        return getattr(self.backbone, hosts.host_of(self.config.host).layers)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language-model head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the language-model head."""
        self.lm_head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroTokenPool):
            module.initialize()
        else:
            super()._init_weights(module)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Choose how attention is computed; the host's layers go on calling ours, which reads the choice."""
        super().set_attn_implementation(*args, **kwargs)
        self.backbone.config._attn_implementation_internal = ATTENTION

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

    def set_training_step(self, step: int, total: int | None = None) -> None:
        """Name the training step, so that its number of cycles does not depend on how it was reached.

        Args:
            step: Optimiser steps done before.
            total: Length of the run, which ``cycle_onset`` and ``train_cycles="grow"`` need to know.
        """
        self._draws = step << 20
        self._progress = step / total if total else None

    def _training_cycles(self) -> int:
        """Return how many cycles a pass of the current training step runs."""
        depth, onset, kind = self.config.depth, self.config.cycle_onset, self.config.train_cycles
        if onset or kind == "grow":
            if self._progress is None:
                raise RecipeError(
                    "cycle_onset and train_cycles: grow go by the course of training, which is not known. Call "
                    "model.set_training_step(step, total) before each step."
                )
            if self._progress < onset:
                return 1
            if kind == "grow":
                return min(depth, 1 + int(depth * (self._progress - onset) / (1 - onset)))
        return self._drawn_cycles() if kind == "random" else depth

    def _drawn_cycles(self) -> int:
        draw = generator(self.config.seed, "train_cycles", self._draws)
        self._draws += 1
        return int(torch.randint(1, self.config.depth + 1, (), generator=draw))

    # As its hosts do, the model still takes the cache under the name that it had before transformers 5.24.
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | list[int] | None = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
        n_cycles: int | Tensor | None = None,
        exit_threshold: float | None = None,
        output_zero_attention: bool = False,
        **kwargs: Any,
    ) -> ZeroTokenOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: Tokens.
            attention_mask: 1 for real tokens, cached ones included; or a ready 4D mask.
            position_ids: Positions; counted on from the cache when not given.
            cache: Cache with a slot for each layer visit.
            inputs_embeds: Embeddings instead of tokens.
            labels: Targets, shifted inside; -100 is ignored.
            use_cache: Return a cache.
            logits_to_keep: Compute the logits of the last tokens only, or of these positions.
            output_attentions: Return attention weights; needs ``attn_implementation="eager"``.
            output_hidden_states: Return the states, or those of the visits in a list.
            return_dict: Return an output object rather than a tuple.
            n_cycles: Cycles to run, instead of all; or how many each sequence (b,) or token (b, t) runs.
            exit_threshold: Exit threshold, instead of the configuration's.
            output_zero_attention: Return the attention on the zero tokens.
            **kwargs: Passed on to the loss function.

        Raises:
            ValueError: Neither or both of ``input_ids`` and ``inputs_embeds`` were given.
            ModicumError: The cache or the number of cycles does not fit the model.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise RecipeError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        use_cache = config.use_cache if use_cache is None else use_cache
        if (
            use_cache
            and self.training
            and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
        ):
            logger.warning_once("A cache cannot be filled under gradient checkpointing; use_cache is off.")
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        cache = None if cache is None or not use_cache else prepare_cache(cache, config.schedule)
        self._check_checkpointing(n_cycles, exit_threshold)
        hidden, run = self._begin(inputs_embeds, attention_mask, position_ids, cache, n_cycles, exit_threshold)
        first = hidden
        hidden = loop.forward(run, hidden)
        normed = self._norm(hidden)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(normed[:, keep, :])
        loss = None
        if labels is not None:
            loss = self._loss(run, logits, labels, **kwargs)
        output = ZeroTokenOutput(
            loss=loss,
            logits=logits,
            cache=cache,
            hidden_states=self._asked(output_hidden_states, "hidden_states", [first, *run.trace.states[:-1], normed]),
            attentions=self._asked(output_attentions, "attentions", [visit.weights for visit in run.trace.visits]),
            cycles=run.trace.cycles,
            layer_calls=run.trace.calls,
            exit_scores=tuple(run.trace.scores) or None,
        )
        if output_zero_attention:
            output.zero_attention = {(v.layer, v.cycle): v.p0 for v in run.trace.visits if v.p0 is not None}
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check_checkpointing(self, n_cycles: int | Tensor | None, exit_threshold: float | None) -> None:
        function = getattr(self.layers[0], "_gradient_checkpointing_func", None)
        if not self.training or function is None or not function.keywords.get("use_reentrant", True):
            return
        threshold = self.config.exit_threshold if exit_threshold is None else exit_threshold
        if self.config.cache_policy == "share_first" or threshold is not None or isinstance(n_cycles, Tensor):
            raise UnsupportedError(
                "Reentrant checkpointing loses the gradient of keys that a later cycle reads. "
                "Set gradient_checkpointing_kwargs to {'use_reentrant': False}."
            )

    def _asked(self, asked: bool | list[int] | None, what: str, found: list[Any]) -> tuple[Any, ...] | None:
        """Return ``found`` when the call or the configuration asks for it; with None for those not in a list."""
        asked = getattr(self.config, f"output_{what}", False) if asked is None else asked
        if not isinstance(asked, list):
            return tuple(found) if asked else None
        kept = {index % len(found) for index in asked}
        return tuple(x if index in kept else None for index, x in enumerate(found))

    def _norm(self, hidden: Tensor) -> Tensor:
        return getattr(self.backbone, hosts.host_of(self.config.host).norm)(hidden)

    def _begin(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        n_cycles: int | Tensor | None,
        exit_threshold: float | None,
    ) -> tuple[Tensor, loop.LoopRun]:
        config, (b, t) = self.config, inputs_embeds.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = (torch.arange(t, device=inputs_embeds.device) + past)[None]
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        arguments = (config, inputs_embeds, attention_mask, cache, position_ids)
        masks = {kind: make[kind](*arguments) for kind in set(self._types)}
        hidden, call = hosts.embed(self.backbone, inputs_embeds, position_ids)
        real: Bool[Tensor, "b t"] | None = None
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -t:].bool()
        cycles, depths = self._cycles(n_cycles, b, t)
        return hidden, loop.LoopRun(
            config=PlainConfig(config),
            stages=self._stages,
            layers=self.layers,
            call=call,
            masks=masks,
            layer_types=self._types,
            rows=self._rows,
            pool=self.zero_token(),
            cache=cache,
            real=real,
            positions=position_ids,
            predict=lambda state: self.lm_head(self._norm(state)),
            n_cycles=cycles,
            trace=loop.Trace(),
            depths=depths,
            threshold=config.exit_threshold if exit_threshold is None else exit_threshold,
        )

    def _cycles(self, n_cycles: int | Tensor | None, b: int, t: int) -> tuple[int, Tensor | None]:
        """Return how many cycles to run at most, and how many each token runs if they differ."""
        depth = self.config.depth
        if isinstance(n_cycles, Tensor) and n_cycles.dim() > 0:
            if len(self._stages.cycles) < depth:
                raise UnsupportedError(
                    f"The order {self.config.order!r} runs all tokens equally deep. Use order: cycle."
                )
            depths = (n_cycles[:, None] if n_cycles.dim() == 1 else n_cycles).expand(b, t)
            return depth, depths
        if n_cycles is None:
            return (self._training_cycles() if self.training else depth), None
        if isinstance(n_cycles, bool) or not 1 <= int(n_cycles) <= depth:
            raise RecipeError(
                f"n_cycles is {n_cycles!r}, expected 1 to {depth}: the model has zero tokens for {depth} cycles."
            )
        return int(n_cycles), None

    def _loss(self, run: loop.LoopRun, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        def cross_entropy(prediction: Tensor) -> Tensor:
            return self.loss_function(logits=prediction, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        weights = self.config.cycle_loss_weights
        if weights is None or not self.training:
            loss = cross_entropy(logits)
        else:
            tail = replace(run, cache=None)  # these passes through the tail come after the one that filled the cache
            earlier = [run.predict(loop.run_tail(tail, state)) for state in run.trace.cycle_states[:-1]]
            terms = [cross_entropy(prediction) for prediction in [*earlier, logits]]
            loss = torch.stack([w * term for w, term in zip(weights, terms)]).sum()
        if self.training and run.n_cycles < self.config.depth:
            # Parameters of cycles that were not drawn take part with weight zero: DDP waits for every gradient.
            loss = loss + 0 * torch.stack([x.sum() for x in run.pool.values()]).sum() if run.pool else loss
        return loss


AutoConfig.register(ZeroTokenConfig.model_type, ZeroTokenConfig)
AutoModelForCausalLM.register(ZeroTokenConfig, ZeroTokenForCausalLM)
