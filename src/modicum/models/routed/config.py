"""The configuration of a routed model: the host architecture, the experts, and how a request is routed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from transformers import AutoConfig, PreTrainedConfig

from modicum.errors import RecipeError, did_you_mean
from modicum.models.router import Kind, Selection
from modicum.weights.expert_plan import Experts


@dataclass(frozen=True)
class Routing:
    """How a request is routed.

    Attributes:
        kind: Of the router.
        tap: Block whose input tells what a prompt is about; 0 is the embeddings. It must not lie behind a routed block,
            unless ``second_prefill`` says that the prompt may be read once more by the dense weights.
        pooling: ``mean`` over the prompt's tokens, or the ``last`` one.
        second_prefill: Read the prompt with the dense weights first, wherever the tap lies.
        temperature: The router's; see :func:`~modicum.models.router.calibrate`.
        threshold: Distance beyond which a prompt is unknown; ``None`` for no gate.
        selection: See :func:`~modicum.models.router.routing_weights`, as for the next four.
        u_lo: Uncertainty up to which the likeliest expert stands alone.
        u_hi: Uncertainty from which on the experts weigh alike.
        nucleus: Mass of the smallest set.
        least: Smallest weight under ``standardised``.
        centred: Add the weights less 1/T in place of the weights; see
            :meth:`~modicum.weights.experts.ExpertSet.state_dict`.
    """

    kind: str = "linear"
    tap: int = 0
    pooling: str = "mean"
    second_prefill: bool = False
    temperature: float = 1.0
    threshold: float | None = None
    selection: str = "entropy_gated"
    u_lo: float = 0.1
    u_hi: float = 0.9
    nucleus: float = 0.9
    least: float = 0.2
    centred: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, get_args(Kind)),
            ("selection", self.selection, get_args(Selection)),
            ("pooling", self.pooling, ("mean", "last")),
        ):
            if value not in known:
                raise RecipeError(f"{name} {value!r} is not known. {did_you_mean(str(value), known)}")
        if not self.temperature > 0:
            raise RecipeError(f"temperature is {self.temperature}, expected a number above 0.")
        if self.tap < 0:
            raise RecipeError(f"tap is {self.tap}, expected the number of a block from 0 on.")


class RoutedConfig(PreTrainedConfig):
    """Configuration of :class:`~modicum.models.RoutedForCausalLM`.

    What is not listed here (``vocab_size``, ``eos_token_id``, …) is read from ``host`` and written to it.

    Args:
        host: Configuration of the architecture that is served, or its fields with ``model_type``.
        experts: Fields of :class:`~modicum.weights.experts.Experts`; ``None`` for the host alone.
        routing: Fields of :class:`Routing`.
        checksums: SHA-256 of the folder's files.
    """

    model_type = "routed"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 - transformers declares it so
    sub_configs = {"host": AutoConfig}  # noqa: RUF012 - how attention is computed is set in both

    host: Any = None
    experts: Any = None
    routing: Any = None
    checksums: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.host is None:
            self.host = {"model_type": "llama"}
        if isinstance(self.host, dict):
            given = dict(self.host)
            self.host = AutoConfig.for_model(given.pop("model_type"), **given)
        self.host = copy.deepcopy(self.host)  # what is set here must not reach the model it was taken from
        self.host._name_or_path = ""  # a folder is the same wherever it was made
        self.experts = None if self.experts is None else _fields(Experts, self.experts)
        self.routing = _fields(Routing, self.routing or {})
        self.checksums = dict(self.checksums or {})
        super().__post_init__(**kwargs)

    @property
    def expert_set(self) -> Experts | None:
        """What is known of the experts."""
        return None if self.experts is None else Experts(**self.experts)

    @property
    def route(self) -> Routing:
        """How a request is routed."""
        return Routing(**self.routing)

    def __getattr__(self, name: str) -> Any:
        host = self.__dict__.get("host")
        if name.startswith("_") or name == "host" or not isinstance(host, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        host = self.__dict__.get("host")
        own = name in _OWN or name.startswith("_") or isinstance(getattr(type(self), name, None), property)
        if not own and isinstance(host, PreTrainedConfig) and hasattr(host, name):
            setattr(host, name, value)
        else:
            super().__setattr__(name, value)


_OWN = frozenset(RoutedConfig.__dataclass_fields__) | {"use_cache"}


def _fields(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass, checked and completed, as JSON holds them."""
    if isinstance(given, kind):
        return asdict(given)
    known = {field.name for field in fields(kind)}
    for name in given:
        if name not in known:
            raise RecipeError(f"{kind.__name__} has no field {name!r}. {did_you_mean(name, known)}")
    return asdict(kind(**given))


AutoConfig.register(RoutedConfig.model_type, RoutedConfig)
