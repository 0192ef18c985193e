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

from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from modicum.errors import UnsupportedError
from modicum.models.zero_token import loop
from modicum.models.zero_token.config import CAUSAL_SCOPES, EXITS, ZeroTokenConfig
from modicum.models.zero_token.looped import Looped, looped_class, report_of
from modicum.models.zero_token.speculation import CycleCandidates
from modicum.models.zero_token.spent import counted


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

    ``generate(assistant_early_exit=n)`` drafts tokens with ``n`` cycles and verifies them with all.

    It returns a :class:`ZeroTokenOutput`.

    Example:
        >>> import torch
        >>> config = ZeroTokenConfig(host={"model_type": "llama", "vocab_size": 16, "hidden_size": 8,
        ...     "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1})
        >>> model = ZeroTokenForCausalLM(config).eval()
        >>> model(torch.tensor([[1, 2, 3]])).layer_calls
        4
    """

    kind = "causal"

    def _reported(self, out: Any, trace: loop.Trace, report: bool) -> Any:
        found = {name: value for name, value in out.items() if name in _REPORTED}
        return ZeroTokenOutput(**found, **report_of(trace, report))

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; what is returned as an object says in ``spent`` what the passes cost."""
        with counted(every=32, reading=False) as spent:
            out = super().generate(*args, **kwargs)
        if isinstance(out, ModelOutput):
            out.spent = spent
        return out

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Let a ``GenerationConfig`` hold our knobs; refuse what would not be what it says."""
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name in ("n_cycles", *EXITS):
            value = getattr(config, name, None)
            if value is not None:
                model_kwargs.setdefault(name, value)
        if self.training and model_kwargs.get("n_cycles") is None:
            model_kwargs["n_cycles"] = self.depth  # what a training step draws is no depth to generate with
        asked = {name: model_kwargs.get(name) for name in ("exit_threshold", "exit_scope")}
        threshold, scope = (getattr(self.config, n) if v is None else v for n, v in asked.items())
        if threshold is not None and scope not in CAUSAL_SCOPES:
            raise UnsupportedError(
                f"exit_scope: {scope} lets later tokens choose the depth of earlier ones, so that text cannot be "
                f"generated with it. Use exit_scope: {' or '.join(CAUSAL_SCOPES)}."
            )
        return config, model_kwargs

    def _get_candidate_generator(self, generation_config: Any, **kwargs: Any) -> Any:
        """Draft with the first cycles alone where ``assistant_early_exit`` says with how many."""
        cycles = generation_config.assistant_early_exit
        if cycles is None:
            return super()._get_candidate_generator(generation_config=generation_config, **kwargs)
        return CycleCandidates(self, cycles, generation_config, kwargs["logits_processor"])

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """Make the masks of a static cache beforehand, as the host takes them."""
        masks = getattr(super(), "create_masks_for_generate", create_masks_for_generate)(**kwargs)
        if isinstance(masks, dict) and getattr(self.config.host, "layer_types", None) is None:
            (masks,) = masks.values()  # all layers of this host attend alike
        return masks

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refuse: continuous batching keys its cache by the physical layer."""
        raise UnsupportedError(
            "Continuous batching keeps keys by the physical layer, and a looped model keeps them by visit. "
            "Use model.generate."
        )


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
