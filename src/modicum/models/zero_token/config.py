"""The configuration of a looped model: the host architecture, and the fields that looping adds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Lt
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from modicum.errors import RecipeError, UnsupportedError
from modicum.knobs import check_among, fields_of
from modicum.models.zero_token.attention import Route
from modicum.models.zero_token.hosts import check_config, of_layers
from modicum.models.zero_token.schedule import Order, Stages, VisitId, cycle_schedule, stages
from modicum.types import NonNegative, NonNegativeInt, PositiveInt

logger = logging.get_logger(__name__)

ZeroKind: TypeAlias = Literal["key", "off_by_one", "sink"]
Pool: TypeAlias = Literal["layer_cycle", "cycle", "layer"]
ExitCriterion: TypeAlias = Literal["zero_attention", "confidence", "gate", "latent", "entropy", "kl", "random"]
ExitScore: TypeAlias = Literal["cycle_mean", "first_layer", "last_layer", "cycle_max", "layer"]
ExitScope: TypeAlias = Literal["sequence", "token", "last_token", "prefix", "batch"]
LABELS = ("id2label", "label2id", "problem_type")  # what a head with labels needs
# How a model is run and trained is no part of what it is: config.json holds none of these.
EXITS = ("exit_threshold", "exit_criterion", "exit_score", "exit_scope", "min_cycles")  # kept in generation_config.json
TRAINING = ("train_cycles", "cycle_onset", "cycle_loss_weights", "route", "seed")  # kept in the recipe
CAUSAL_SCOPES = ("token", "prefix")
TrainCycles: TypeAlias = Literal["fixed", "random", "grow"]
CachePolicy: TypeAlias = Literal["latest", "propagate", "share_first", "select"]


class ZeroTokenConfig(PreTrainedConfig):
    """Configuration of :class:`~modicum.models.ZeroTokenForCausalLM`.

    What is not listed here (``vocab_size``, ``hidden_size``, ``eos_token_id``, …) is read from ``host`` and written to
    it. ``num_hidden_layers`` is the number of layer visits, which is what a key-value cache needs to know.

    How the model is run and trained (``exit_threshold`` to ``min_cycles``, and ``train_cycles`` to ``seed``) is no part
    of ``config.json``: exits are saved in ``generation_config.json``, the rest is given anew to whatever trains it.

    Args:
        host: Configuration of the architecture whose layers are looped, or its fields with ``model_type``.
        n_cycles: How often the middle layers run.
        n_head: First layers that run once.
        n_tail: Last layers that run once.
        order: ``cycle``, ``sequence``, ``cycle_rev`` or a list of physical layers; see
            :func:`~modicum.models.zero_token.schedule.cycle_schedule`.
        skip: Visits, as (layer, cycle), that are left out of this order: see ``modicum.models.visit_importance``.
        zero_token: Add a zero token to the attention calls.
        zero_kind: ``key`` is a trainable key; ``off_by_one`` a key fixed at zero; ``sink`` a trainable logit per head.
        zero_layers: Give zero tokens to the middle layers or to all.
        pool: One key for each middle layer and cycle, for each cycle, or for each layer.
        zero_key_rope: ``relative`` turns the zero key by the query's own position, so that shifting all positions
            changes nothing; ``none`` leaves it as it is.
        zero_key_norm: Apply the host's key norm, if it has one, to the zero key too.
        zero_key_init_std: Standard deviation of a new zero key.
        zero_bias: Add a trainable bias per head to the zero token's logit.
        ffn_gate: ``zero_attention`` also multiplies the feed-forward branch by 1 - p0.
        cycle_embedding: A trainable vector for each cycle, added to the state or multiplied with it.
        cycle_gate: ``rezero`` scales what cycles after the first one change by a trainable number, at first 0.
        loop_connection: Add the state before the loop (``anchor``) or before the cycle (``residual``) after each cycle.
        lora_rank: Rank of the low-rank terms that untie the cycles of a layer; 0 for none.
        exit_gate: There is a linear gate by which tokens may leave; ``modicum.models.fit_exit_gate`` adds and fits it.
        exit_threshold: Leave the loop when the score is above it; ``None`` never does. For the criteria ``latent``,
            ``entropy`` and ``kl``, when the change is below it; for ``random`` it is the chance to leave.
        exit_criterion: What the score is: the attention on the zero token, the probability of the likeliest next token
            (``confidence``, which runs tail and head after each cycle), what a ``gate`` that was fitted says of the
            state, or by how much a cycle changed the state, the entropy of the prediction, or the prediction.
        exit_score: How the zero attention of a cycle's layers becomes one score.
        exit_scope: Over which tokens the score is averaged, and who leaves together.
        min_cycles: Cycles that always run.
        cache_policy: Which keys and values a token that left has in the cycles it did not run.
        train_cycles: ``random`` draws the number of cycles of each training step; ``grow`` raises it in even steps
            from 1 to all of them in the course of training.
        cycle_onset: Share of the training, from 0 up to but not including 1, that runs one cycle before the others
            join; it costs what the plain model does. Like ``grow`` it needs to know the length of the run: see
            :meth:`~modicum.models.ZeroTokenForCausalLM.set_training_step`, which modicum's trainer calls.
        cycle_loss_weights: Train the prediction after each cycle, with these weights; ``None`` only the last. A step of
            fewer cycles raises the weights of those that run to the same sum.
        route: How the zero attention is computed; see :func:`~modicum.models.zero_token.attention.zero_attention`.
        seed: Seed of what is drawn: new zero keys, random cycles, random exits.
    """

    model_type = "zero_token"
    # What Trainer must not gather: all that is no prediction. transformers declares it so.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "cache", "past_key_values", "cycles", "layer_calls", "exit_scores", "zero_attention",
    ]  # fmt: skip

    host: Any = None
    n_cycles: int = 2
    n_head: int = 1
    n_tail: int = 1
    order: Any = "cycle"
    skip: Any = None
    zero_token: bool = True
    zero_kind: str = "key"
    zero_layers: str = "middle"
    pool: str = "layer_cycle"
    zero_key_rope: str = "none"
    zero_key_norm: bool = True
    zero_key_init_std: float = 0.02
    zero_bias: bool = False
    ffn_gate: str | None = None
    cycle_embedding: str | None = None
    cycle_gate: str | None = None
    loop_connection: str | None = None
    lora_rank: int = 0
    exit_gate: bool = False
    exit_threshold: float | None = None
    exit_criterion: str = "zero_attention"
    exit_score: str = "cycle_mean"
    exit_scope: str = "token"
    min_cycles: int = 1
    cache_policy: str = "latest"
    train_cycles: str = "fixed"
    cycle_onset: float = 0.0
    cycle_loss_weights: list[float] | None = None
    route: Any = "auto"
    seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        # Tools write what they know of a model into its configuration; these are ours to compute.
        kwargs = {k: v for k, v in kwargs.items() if k not in ("num_hidden_layers", "layer_types")}
        if self.host is None:
            self.host = {"model_type": "llama"}
        if isinstance(self.host, dict):
            fields = dict(self.host)
            kind = str(fields.pop("model_type", None))
            self.host = AutoConfig.for_model(kind, **fields)
        check_config(self.host)
        check_kinds(self)
        self.host = copy.deepcopy(self.host)  # what is set here must not reach the model it was taken from
        super().__post_init__(**kwargs)
        plain = PreTrainedConfig()
        for name in LABELS:
            if getattr(self, name) == getattr(plain, name):
                setattr(self, name, getattr(self.host, name))
        self.check()

    def __getattr__(self, name: str) -> Any:
        host = self.__dict__.get("host")
        if name.startswith("_") or name == "host" or not isinstance(host, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if name == "auto_map":  # tools read it of any class that transformers does not know, and write into it
            return self.__dict__.setdefault(name, {})
        # Lists of the physical layers become lists of the visits, as the number of layers did.
        return of_layers(host, name, (layer for layer, _ in self.schedule))

    def __setattr__(self, name: str, value: Any) -> None:
        host = self.__dict__.get("host")
        own = name in _own_names() or name.startswith("_") or isinstance(getattr(type(self), name, None), property)
        if not own and isinstance(host, PreTrainedConfig) and hasattr(host, name):
            setattr(host, name, value)
        else:
            super().__setattr__(name, value)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: the architecture, without how it is run and trained."""
        left_out = {*EXITS, *TRAINING, "_given"} | (set() if self.__dict__.get("auto_map") else {"auto_map"})
        return {name: value for name, value in super().to_diff_dict().items() if name not in left_out}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of a dictionary; see ``transformers.PreTrainedConfig.from_dict``."""
        plain = {name: cls.__dataclass_fields__[name].default for name in (*EXITS, *TRAINING)}
        found = [n for n, value in plain.items() if config_dict.get(n, value) != value]
        if found:
            logger.warning_once(
                f"This configuration holds {', '.join(found)}, which belong to running and training a model. They act, "
                "but config.json will not hold them again: exits are saved in generation_config.json, the rest in the "
                "recipe."
            )
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made)._given = [name for name in EXITS if name in kwargs]
        return made

    def exits(self) -> dict[str, Any]:
        """Return the fields of the exit that differ from their defaults, or were given when this was loaded."""
        plain, given = type(self).__dataclass_fields__, self.__dict__.get("_given", ())
        return {n: getattr(self, n) for n in EXITS if n in given or getattr(self, n) != plain[n].default}

    def check(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            RecipeError: A value is unknown or out of range.
        """
        check_kinds(self)
        schedule = self.schedule
        unknown = {tuple(visit) for visit in self.skip or ()} - set(self.whole_schedule)
        if unknown or {cycle for _, cycle in schedule} != set(range(self.depth)):
            wrong = f"names {sorted(unknown)[0]}, which is no visit" if unknown else "leaves a cycle without any visit"
            raise RecipeError(f"skip {wrong}. Visits are (layer, cycle), and every cycle keeps one.")
        if self.skip and self.cache_policy == "share_first" and any(cycle == 0 for _, cycle in map(tuple, self.skip)):
            raise UnsupportedError(
                "cache_policy: share_first reads the keys of cycle 0: none of its visits can be skipped."
            )
        if self.exit_threshold is not None and not is_number(self.exit_threshold):
            raise RecipeError(f"exit_threshold is {self.exit_threshold!r}, expected a number, or null to never exit.")
        if not 1 <= self.min_cycles <= max(1, self.depth):
            raise RecipeError(f"min_cycles is {self.min_cycles}, expected 1 to {self.depth}.")
        if not 0 <= self.cycle_onset < 1:
            raise RecipeError(f"cycle_onset is {self.cycle_onset}, expected a share of the training: 0 <= share < 1.")
        if self.cycle_loss_weights is not None and len(self.cycle_loss_weights) != self.depth:
            raise RecipeError(f"cycle_loss_weights has {len(self.cycle_loss_weights)} entries for {self.depth} cycles.")
        weights = self.cycle_loss_weights
        if weights is not None and not (all(is_number(w) and 0 <= w < math.inf for w in weights) and sum(weights) > 0):
            raise RecipeError(f"cycle_loss_weights are {weights}, expected numbers from 0 up that are not all 0.")
        if weights is not None and weights[0] == 0 and (self.train_cycles != "fixed" or self.cycle_onset):
            raise RecipeError(
                f"cycle_loss_weights are {weights}: a training step of one cycle would have no loss. Raise the first "
                "weight, or set train_cycles to fixed and cycle_onset to 0."
            )
        for name in ("lora_rank", "zero_key_init_std"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        if self.ffn_gate and not self.zero_token:
            raise RecipeError("ffn_gate needs zero_token: true.")
        if len(self.stages.cycles) < self.depth and self.stages.cycles:
            what = [
                n
                for n in ("cycle_embedding", "cycle_gate", "loop_connection", "cycle_loss_weights")
                if getattr(self, n)
            ]
            if what or self.exit_threshold is not None:
                raise UnsupportedError(
                    f"{(what or ['exit_threshold'])[0]} needs cycles that run one after the other, "
                    f"but the order {self.order!r} mixes them ({len(schedule)} visits). Use order: cycle."
                )

    @property
    def depth(self) -> int:
        """Cycles of the middle layers; an explicit order decides it itself."""
        return 1 + max(cycle for _, cycle in self.whole_schedule)

    @property
    def whole_schedule(self) -> list[VisitId]:
        """The visits, as (physical layer, cycle), before any are skipped."""
        n_layers = self.host.num_hidden_layers
        return cycle_schedule(n_layers, self.n_cycles, n_head=self.n_head, n_tail=self.n_tail, order=self.order)

    @property
    def schedule(self) -> list[VisitId]:
        """The visits, as (physical layer, cycle)."""
        skipped = set(map(tuple, self.skip or ()))
        return [visit for visit in self.whole_schedule if visit not in skipped]

    @property
    def middle(self) -> list[int]:
        """The layers that may run several times."""
        if isinstance(self.order, str):
            return list(range(self.n_head, self.host.num_hidden_layers - self.n_tail))
        return sorted({layer for layer, cycle in self.whole_schedule if cycle})

    @property
    def stages(self) -> Stages:
        """The schedule cut into head, cycles and tail."""
        return stages(self.schedule, self.middle)

    @property
    def num_hidden_layers(self) -> int:
        """Layer visits of a full pass, each with keys and values of its own."""
        return len(self.schedule)

    @property
    def layer_types(self) -> list[str]:
        """The kind of attention of each visit, which decides its mask and its cache."""
        host = self.host
        types = getattr(host, "layer_types", None)
        if types is None:
            kind = "full_attention" if getattr(host, "sliding_window", None) is None else "sliding_attention"
            types = [kind] * host.num_hidden_layers
        return [types[layer] for layer, _ in self.schedule]

    @property
    def rows(self) -> dict[VisitId, int]:
        """Which row of the pool each visit with a zero token takes."""
        if not self.zero_token:
            return {}
        found: dict[Any, int] = {}
        layers = set(self.middle) if self.zero_layers == "middle" else set(range(self.host.num_hidden_layers))
        visits = sorted((v for v in self.whole_schedule if v[0] in layers), key=lambda v: (v[1], v[0]))
        part: dict[str, Callable[[VisitId], Any]] = {
            "layer_cycle": lambda v: v,
            "cycle": lambda v: v[1],
            "layer": lambda v: v[0],
        }
        return {visit: found.setdefault(part[self.pool](visit), len(found)) for visit in visits}


@fields_of(ZeroTokenConfig)
class ZeroTokenKnobs(TypedDict, total=False):
    """Fields of :class:`ZeroTokenConfig` that a conversion takes as they are, with their types and ranges."""

    n_cycles: PositiveInt
    order: Order | list[int]
    skip: list[tuple[int, int]] | None
    zero_token: bool
    lora_rank: NonNegativeInt
    exit_gate: bool
    zero_kind: ZeroKind
    zero_layers: Literal["middle", "all"]
    pool: Pool
    zero_key_rope: Literal["none", "relative"]
    zero_key_norm: bool
    zero_key_init_std: NonNegative
    zero_bias: bool
    ffn_gate: Literal["zero_attention"] | None
    cycle_embedding: Literal["add", "multiply"] | None
    cycle_gate: Literal["rezero"] | None
    loop_connection: Literal["anchor", "residual"] | None
    exit_threshold: float | None
    exit_criterion: ExitCriterion
    exit_score: ExitScore
    exit_scope: ExitScope
    min_cycles: PositiveInt
    cache_policy: CachePolicy
    train_cycles: TrainCycles
    cycle_onset: Annotated[float, Ge(0), Lt(1)]
    cycle_loss_weights: list[float] | None
    route: Route
    seed: int


@cache
def _choices() -> dict[str, tuple[str | None, ...]]:
    """Return the values of each knob that has a few, ``None`` among them where it may be left out."""
    found = {}
    for name, hint in get_type_hints(ZeroTokenKnobs).items():
        parts = get_args(hint) if get_origin(hint) is UnionType or get_origin(hint) is Union else (hint,)
        values = [value for part in parts for value in (get_args(part) or (part,))]
        if all(isinstance(value, str) or value is NoneType for value in values):
            found[name] = tuple(None if value is NoneType else value for value in values)
    return found


def check_kinds(config: ZeroTokenConfig) -> None:
    """Refuse unknown values of the knobs, and those of another kind: text or a fraction for a count, NaN for a number.

    Raises:
        RecipeError: There is one.
    """
    for name in _choices():
        check_choice(name, getattr(config, name))
    for name in (*ZeroTokenKnobs.__annotations__, "n_head", "n_tail"):
        value, kind = getattr(config, name), type(ZeroTokenConfig.__dataclass_fields__[name].default)
        if kind not in (bool, int, float):
            continue
        if kind is float:
            fits, expected = is_number(value), "a number"
        else:
            fits, expected = type(value) is kind, "true or false" if kind is bool else "an integer"
        if not fits:
            raise RecipeError(f"{name} is {value!r}, expected {expected}.")
    if any(isinstance(visit, (str, int)) for visit in config.skip or ()):
        raise RecipeError(f"skip is {config.skip}, expected visits as (layer, cycle).")


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python's or NumPy's kinds, and not NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _own_names() -> frozenset[str]:
    return frozenset(ZeroTokenConfig.__dataclass_fields__) | {"num_hidden_layers", "layer_types"}


def check_choice(name: str, value: object) -> None:
    """Refuse a value that the knob ``name`` does not know.

    Raises:
        RecipeError: The value is unknown.
    """
    check_among(name, value, _choices()[name])
