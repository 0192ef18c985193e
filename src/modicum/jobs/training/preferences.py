"""The seam of objectives over pairs: from rows of preferences to a Trainer's batches, loss, log and accuracy.

The reference is the model from which the run starts, without its adapter. Its log-probabilities are read from the pairs
(:mod:`modicum.jobs.training.references`), so that no second model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modicum import processes
from modicum.errors import TrainingError, UnsupportedError, first_line
from modicum.jobs.data.pairs import Alternatives, Pair, PairCollator
from modicum.jobs.training.objective import LabelHead
from modicum.jobs.training.references import log_probabilities, token_log_probabilities
from modicum.registry import objective
from modicum.shortage import pass_on

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from modicum.jobs.training.parts import Build

COLUMNS = (
    "accuracy",  # of pairs: the chosen answer gained more on the reference; a tie counts one half
    "margin",  # by how much, in units of the reward
    "reward_chosen",
    "reward_rejected",
    "logp_chosen",  # summed over the answer's tokens
    "logp_rejected",
    "length_chosen",  # tokens
    "length_rejected",
)
TRIED = (
    12  # tokens of prompt and answers with which a model is tried: more than convolutions of state-space models reach
)
EXACT, ROUGH = 1e-4, 0.05  # how far the first loss may lie from that of the reference, in float32 and in 16 bits


def layout(model: Any, pairs: Sequence[Pair | Alternatives], pad: int, note: Callable[[str], object]) -> PairCollator:
    """Return the collator with which the answers to a prompt may share it, if the model can.

    It is tried on tokens of the first pair: both answers must get what they get in rows of their own, and neither may
    notice that the other one is another text.

    Args:
        model: The model itself.
        pairs: All that are to come; the first one gives the tokens.
        pad: Token to fill rows with.
        note: Told where every answer needs a row of its own.
    """
    used = getattr(model.config, "_attn_implementation", None)
    shared = PairCollator(pad, mask=torch.bool if used == "sdpa" else model.dtype)
    apart = PairCollator(pad, shared=False)
    why = beyond_window(model.config, pairs)
    training, head = model.training, LabelHead(model)
    model.eval()
    try:
        with torch.no_grad():
            why = why or _trouble(model, pairs[0], shared, apart)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
        pass_on(error)
        why = f"{type(error).__name__}: {first_line(error)}"
    finally:
        head.detach()
        model.train(training)
    if why is None:
        return shared
    note(
        f"{model.config.model_type} (attention {used}) does not let two answers share a prompt ({why:.120}), so each "
        "has a row of its own."
    )
    return apart


def beyond_window(config: Any, pairs: Sequence[Pair | Alternatives]) -> str | None:
    """Say that a row is longer than some layer looks back; ``None`` where none is.

    A mask of tokens by tokens replaces the model's own, its window included, so the tokens of a longer row would see
    what the model does not show them. A layer that counts places in the row itself (GPT-Neo) has the other answers
    between an answer and its prompt.
    """
    config = config.get_text_config()
    alone = max(len(pair.prompt) + max(map(len, pair.answers)) for pair in pairs)
    together = max(len(pair.prompt) + sum(map(len, pair.answers)) for pair in pairs)
    for field, longest in (("sliding_window", alone), ("attention_chunk_size", alone), ("window_size", together)):
        window = getattr(config, field, None)
        if isinstance(window, int) and longest > window:
            return f"a row has {longest} tokens, and some layers look back {window}"
    return None


def _trouble(model: Any, given: Pair | Alternatives, shared: PairCollator, apart: PairCollator) -> str | None:
    """Return what is wrong with a shared row; ``None`` where nothing is."""
    pool = [*given.prompt, *chain(*given.answers)]
    prompt, *answers = (tuple(pool[(shift + i) % len(pool)] for i in range(TRIED)) for shift in range(4))
    pair = Pair(prompt, answers[0], answers[1])
    usual = token_log_probabilities(model, shared([pair])).view(2, TRIED)
    for side, changed in ((0, replace(pair, rejected=answers[2])), (1, replace(pair, chosen=answers[2]))):
        moved = (token_log_probabilities(model, shared([changed])).view(2, TRIED) - usual).abs().sum(1)
        # Equal to the bit, or where experts share a kernel, up to rounding.
        if moved[side] > 1e-4 * moved[1 - side]:
            return "the answers see each other"
    off = (usual - token_log_probabilities(model, apart([pair])).view(2, TRIED)).abs().mean()
    # Mean of the tokens, since sums of their errors lie far apart: rounding of thirty blocks in bfloat16 makes 0.02,
    # positions that go on behind the first answer 0.6.
    rounding = max(1e-4, 16 * torch.finfo(model.dtype).eps)
    return f"a token's log-probability differs by {off:.2g}" if off > rounding else None


def silence_dropout(model: nn.Module) -> int:
    """Set every rate of dropout to 0, which would add noise to the margins; return how many there were."""
    count = 0
    for module in model.modules():
        rates = {key: rate for key, rate in vars(module).items() if "drop" in key and isinstance(rate, float)}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates["p"] = module.p
        for key, rate in rates.items():
            if rate > 0:
                setattr(module, key, 0.0)
                count += 1
    return count


class PairLoss:
    """The loss of a batch of pairs: a :class:`~modicum.jobs.training.trainer.Loss`.

    Args:
        name: The objective.
        knobs: Its knobs, complete.
        model: The model that is trained, in its adapter.
    """

    def __init__(self, name: str, knobs: Mapping[str, Any], model: Any) -> None:
        self.loss = partial(objective[name].function, **knobs)
        self.name, self.beta = name, float(knobs.get("beta", 1.0))
        self._head = LabelHead(model)
        self.seen: list[Tensor] = []  # since the last line of the log

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], *, branches: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean loss of a batch, and a row of :data:`COLUMNS` for each pair."""
        if branches != 1:
            raise UnsupportedError(f"{self.name} compares two answers; engine='paired' cannot. Use engine='adapter'.")
        policy = log_probabilities(model, dict(inputs))
        reference = inputs["reference"].to(policy.device)
        lengths = torch.tensor(inputs["counts"], device=policy.device).view(-1, 2)
        loss = self.loss(*policy.T, *reference.T, *lengths.T)
        rewards = self.beta * (policy.detach() - reference)
        margins = rewards[:, :1] - rewards[:, 1:]
        columns = torch.cat([(margins.sign() + 1) / 2, margins, rewards, policy.detach(), lengths.to(policy)], dim=1)
        if model.training:
            self.seen.append(columns)
        return loss, {"pairs": columns}

    def at_reference(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a model that equals the reference: ln 2 for ``sigmoid``."""
        reference, lengths = batch["reference"], torch.tensor(batch["counts"]).view(-1, 2)
        found: Tensor = self.loss(*reference.T, *reference.T, *lengths.T)
        return found

    def means(self) -> dict[str, float]:
        """Return the mean of each column over the pairs since the last call, of all processes."""
        if not self.seen:
            return {}
        rows = torch.cat(self.seen)
        self.seen = []
        weight = float(len(rows))
        return dict(zip(COLUMNS, processes.mean(rows.sum(0) * 1.0, weight).tolist()))


def pair_callback(
    loss: PairLoss, first: Sequence[Pair], collator: PairCollator, autocast: torch.dtype | None, *, starts_there: bool
) -> TrainerCallback:
    """Return the callback that checks the first loss and adds the columns to the log.

    Args:
        loss: The Trainer's.
        first: Some pairs.
        collator: The Trainer's.
        autocast: Type in which the Trainer computes, where it is not the weights' own.
        starts_there: Whether the run starts at the reference; an adapter that was trained before does not.
    """
    from transformers import TrainerCallback

    class PairCallback(TrainerCallback):
        def on_train_begin(self, _args: Any, state: Any, _control: Any, **given: Any) -> None:
            if state.global_step == 0 and starts_there:
                check_first(loss, given["model"], collator(first), autocast)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            found = {key: round(value, 6) for key, value in loss.means().items()}
            # The history has its copy already; the callbacks after this one read `logs`.
            logs.update(found)
            state.log_history[-1].update(found)

    return PairCallback()


def check_first(loss: PairLoss, model: Any, batch: Mapping[str, Any], autocast: torch.dtype | None = None) -> None:
    """Refuse a run whose first loss is not that of the reference: its log-probabilities are not those of this model.

    Raises:
        TrainingError: The loss differs.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            found = float(loss(model, batch)[0])
    finally:
        model.train(training)
    expected = float(loss.at_reference(batch))
    exact = autocast is None and all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    allowed = EXACT if exact else ROUGH
    if not abs(found - expected) <= allowed * max(1.0, abs(expected)):
        raise TrainingError(
            f"The loss of the first batch is {found:.6f}, expected {expected:.6f}: the reference log-probabilities are "
            "not those of the model that the training starts from. Delete the folder `references` of the cache "
            "(MODICUM_CACHE) and start again."
        )


class PairMeans:
    """The metrics of an evaluation: the means of :data:`COLUMNS`; a ``compute_metrics`` of a Trainer."""

    def __call__(self, evaluation: Any) -> dict[str, float]:
        """Return the means."""
        means = evaluation.predictions.mean(axis=0, dtype="float64")
        return {name: float(value) for name, value in zip(COLUMNS, means)}


def use_pairs(
    build: Build, name: str, knobs: Mapping[str, Any], *, collator: PairCollator, starts_there: bool = True
) -> PairLoss:
    """Give a Trainer that is going to be made an objective over pairs: collator, loss, log and accuracy.

    Args:
        build: The arguments of the Trainer; its data sets are lists of pairs that know their reference.
        name: The objective.
        knobs: Its knobs, complete.
        collator: Of :func:`layout`.
        starts_there: Whether the run starts at the reference.
    """
    loss = PairLoss(name, knobs, build.model)
    build.own_loss, build.compute_metrics, build.data_collator = loss, PairMeans(), collator
    first = list(build.train_dataset[: build.args.per_device_train_batch_size])
    build.add_callback(pair_callback(loss, first, collator, autocast_of(build.args), starts_there=starts_there))
    return loss


def autocast_of(args: Any) -> torch.dtype | None:
    """Return the type in which a Trainer computes by autocast, if it does."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
