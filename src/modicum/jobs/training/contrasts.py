"""Baselines of safety reasoning that also read the answer which a harmful request must not get.

Circuit breakers and latent adversarial training compare the model with itself without its adapter. Decoupled refusal
training needs no loss of its own: it makes two ordinary rows of each harmful request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.jobs.data.bad_rows import each, whole
from modicum.jobs.data.tokens import encode
from modicum.jobs.training.reasoning import takes_positions
from modicum.layout import stacks
from modicum.objectives.circuit_breakers import circuit_breaker_loss, lat_inner_step
from modicum.objectives.derta import derta_rows
from modicum.objectives.latent_adversarial import latent_adversarial
from modicum.random import generator
from modicum.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from modicum.evaluate.rows import Row, Rows
    from modicum.jobs.data.section import DataSection

Example = dict[str, Any]
HARMLESS, REFUSAL, HARMFUL = range(3)  # what a row of a batch is


def encode_contrasts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, section: DataSection, *, note: Callable[[str], None]
) -> list[Example]:
    """Return rows as tokens of prompt, answer and harmful answer; rows that are too long are left out, never cut.

    Raises:
        CheckpointError: The rows are of another kind, none fits, or prompt and answers cannot be told apart.
        RecipeError: No request has a harmful answer.
    """
    if rows.kind != "contrast":
        raise CheckpointError(
            f"{section.path} holds {rows.kind} rows, expected prompt, completion, kind (illegal or helpful) and "
            "rejected, such as the arm contrast of job: synthesize."
        )
    read = each(rows.rows, lambda index, row: _example(row, tokenizer, f"{section.path}, row {index}"), section, note)
    found = whole(
        read,
        lambda example: len(example["prompt"]) + max(len(example["safe"]), len(example["harm"])),
        section,
        note,
        noun="rows",
    )
    if not any(example["harm"] for example in found):
        raise RecipeError(
            f"{section.path}: no harmful request has a rejected answer, so there is nothing to turn away."
        )
    return found


def _example(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    harmful = row["kind"] == "illegal"
    prompt, safe = _parts(row, row["completion"], tokenizer, where)
    harm: list[int] = []
    if harmful and row["rejected"]:
        other, harm = _parts(row, row["rejected"], tokenizer, where)
        if other != prompt:
            raise CheckpointError(f"{where}: the tokens before the two answers differ, so they share no prompt.")
    return {"prompt": prompt, "safe": safe, "harm": harm, "harmful": harmful, "input_ids": prompt + safe}


def _parts(row: Row, answer: str, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[int]]:
    plain = {key: value for key, value in row.items() if key in ("prompt", "system")} | {"completion": answer}
    ids, labels = encode(plain, tokenizer, completion_only=True, where=where)
    learned = [place for place, label in enumerate(labels) if label != IGNORED]
    if not learned or learned[-1] - learned[0] + 1 != len(learned):
        raise CheckpointError(f"{where}: the answer has no tokens of its own. Give another one.")
    return ids[: learned[0]], ids[learned[0] : learned[-1] + 1]


def decoupled(examples: Sequence[Example], knobs: Mapping[str, Any], *, seed: int) -> list[Example]:
    """Return ordinary rows of decoupled refusal training: two of each harmful request, one of any other."""
    pairs: list[tuple[list[int], list[int]]] = []
    for index, example in enumerate(examples):
        prompt, safe = example["prompt"], example["safe"]
        if not example["harm"]:
            pairs.append(([*prompt, *safe], [*[IGNORED] * len(prompt), *safe]))
            continue
        rng = generator(seed, "derta", index)
        # The refusal's first token is what the model has to say at any point of the harmful answer.
        pairs += derta_rows(prompt, safe, example["harm"], refusal_token=safe[0], **knobs, rng=rng)
    return [{"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)} for ids, labels in pairs]


@dataclass(frozen=True)
class ContrastCollator:
    """Make batches of examples of :func:`encode_contrasts`.

    Rows come in three groups: refusals of requests that have a harmful answer, these harmful answers in the same order,
    and all other rows.

    Args:
        pad: Token to fill rows with.
    """

    pad: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return ids, masks of tokens and of answers, and what each row is."""
        pairs = [e for e in examples if e["harm"]]
        rows = [(e["prompt"], e["safe"], REFUSAL) for e in pairs]
        rows += [(e["prompt"], e["harm"], HARMFUL) for e in pairs]
        rows += [(e["prompt"], e["safe"], REFUSAL if e["harmful"] else HARMLESS) for e in examples if not e["harm"]]
        width = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for number, (prompt, answer, _) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[number, :end] = torch.tensor([*prompt, *answer])
            mask[number, :end] = 1
            answers[number, len(prompt) : end] = True
        return {
            "labels": torch.arange(len(examples)),
            "input_ids": ids,
            "attention_mask": mask,
            "answers": answers,
            "is": torch.tensor([what for _, _, what in rows]),
            "pairs": len(pairs),
        }


def plain_model(model: Any) -> Any:
    """Return a model without the wrapper of several processes."""
    return getattr(model, "module", model)


class BreakerLoss:
    """Circuit breakers: keep the states of all rows but those of harmful answers, which are turned away.

    Args:
        knobs: Of the objective.
    """

    def __init__(self, knobs: Mapping[str, Any]) -> None:
        self.knobs, self.step, self.steps = dict(knobs), 0, 1

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], *, branches: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss at the present step of the schedule."""
        if branches != 1:
            raise UnsupportedError("circuit_breakers has no paired form. Use engine: adapter.")
        now = self._states(model, inputs)
        with torch.no_grad(), plain_model(model).disable_adapter():
            before = self._states(model, inputs)
        harmful = inputs["is"] == HARMFUL
        keep = inputs["attention_mask"].bool() & ~harmful[:, None]
        away = inputs["answers"] & harmful[:, None]
        layers = self.layers(len(now) - 1)
        depth = max(layers) + 1
        schedule = {"step": self.step, "alpha": self.knobs["alpha"], "horizon": self.horizon}
        nothing = torch.zeros_like(keep)
        loss = now.new_zeros(())
        if bool(keep.any()):
            loss = loss + circuit_breaker_loss(now[:depth], before[:depth], keep, nothing, **schedule)
        if bool(away.any()):
            chosen = list(layers)
            loss = loss + circuit_breaker_loss(now[chosen], before[chosen], nothing, away, **schedule)
        return loss, {}

    @property
    def horizon(self) -> int:
        """Steps of the schedule."""
        return int(self.knobs["horizon"] or max(2 * self.steps, 1))

    def layers(self, depth: int) -> tuple[int, ...]:
        """Return the blocks that are turned away, of a model of so many blocks."""
        chosen: tuple[int, ...] = self.knobs["layers"] or tuple(sorted({-(-depth // 3), -(-2 * depth // 3)}))
        if max(chosen) > depth:
            raise RecipeError(f"layers names block {max(chosen)}, but the model has {depth}.")
        return chosen

    def _states(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        options = {"logits_to_keep": 1} if takes_positions(model) else {}
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        states = model(**given, use_cache=False, output_hidden_states=True, **options).hidden_states
        return torch.stack(list(states))


class LatentLoss:
    """Latent adversarial training: find the worst shift of the prompts' states, and learn to refuse under it.

    Args:
        knobs: Of the objective.
        model: The model in its adapter.
    """

    def __init__(self, knobs: Mapping[str, Any], model: Any) -> None:
        self.knobs = dict(knobs)
        base = model.get_base_model()
        found = stacks(name for name, _ in base.named_parameters())
        if len(found) != 1:
            raise UnsupportedError(f"latent_adversarial needs one stack of layers, the model has {len(found)}.")
        ((stack, depth),) = found.items()
        chosen = knobs["layers"] or tuple(sorted({0, *(max(1, depth * part // 4) for part in (1, 2, 3)), depth}))
        if max(chosen) > depth:
            raise RecipeError(f"layers names block {max(chosen)}, but the model has {depth}.")
        blocks = [base.get_input_embeddings(), *(base.get_submodule(f"{stack}.{i}") for i in range(depth))]
        self.places = [blocks[place] for place in chosen]
        self.weights = {key: knobs[key] for key in ("toward_weight", "away_weight", "keep_weight")}

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], *, branches: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss under the worst shift, and of harmless rows without any."""
        if branches != 1:
            raise UnsupportedError("latent_adversarial has no paired form.")
        count = inputs["pairs"]
        attacked = {key: inputs[key][: 2 * count] for key in ("input_ids", "attention_mask", "answers")}
        others = {key: inputs[key][2 * count :] for key in attacked}
        empty = torch.zeros(0, 1, dtype=torch.long, device=inputs["input_ids"].device)
        sides = [(empty.new_zeros(0, 1, 1).float(), empty)] * 2
        if count:
            with torch.enable_grad():
                shifts = self.search(model, attacked, count)
            sides = self._sides(model, attacked, shifts, count)
        kept = self._divergence(model, others) if len(others["input_ids"]) else None
        (refusal, harm) = sides
        return latent_adversarial(*refusal, *harm, kept, **self.weights), {}

    def search(self, model: Any, rows: Mapping[str, Tensor], count: int) -> list[Tensor]:
        """Return the worst shift of each place, (pairs, tokens, width); it is zero outside the prompts."""
        prompts = (rows["attention_mask"].bool() & ~rows["answers"])[:count, :, None]
        width = self._width(model)
        shape = (*prompts.shape[:2], width)
        shifts = [torch.zeros(shape, device=prompts.device) for _ in self.places]
        states: list[dict[str, Any]] = [{} for _ in shifts]
        training = model.training
        model.eval()
        try:
            for _ in range(self.knobs["inner_steps"]):
                leaves = [shift.requires_grad_() for shift in shifts]
                refusal, harm = self._sides(model, rows, leaves, count)
                # The adversary wants the answers exchanged.
                loss = latent_adversarial(*harm, *refusal, toward_weight=0.5, away_weight=0.5)
                grads = torch.autograd.grad(loss, leaves)
                for place, (shift, grad) in enumerate(zip(shifts, grads, strict=True)):
                    moved, states[place] = lat_inner_step(
                        shift.detach(), grad * prompts, states[place], eps=self.knobs["eps"], lr=self.knobs["inner_lr"]
                    )
                    shifts[place] = moved * prompts
        finally:
            model.train(training)
        return [shift.detach() for shift in shifts]

    def _sides(
        self, model: Any, rows: Mapping[str, Tensor], shifts: Sequence[Tensor], count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return logits and targets of the refusals and of the harmful answers, both under the same shifts."""
        with self._shifted([torch.cat([shift, shift]) for shift in shifts]):
            logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits[
                :, :-1
            ]
        targets = torch.where(rows["answers"], rows["input_ids"], IGNORED)[:, 1:]
        return [(logits[:count], targets[:count]), (logits[count:], targets[count:])]

    def _divergence(self, model: Any, rows: Mapping[str, Tensor]) -> Tensor:
        given = {key: rows[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad(), plain_model(model).disable_adapter():
            before = model(**given, use_cache=False).logits
        now = model(**given, use_cache=False).logits
        at = rows["answers"][:, 1:]
        logs = [part[:, :-1][at].float().log_softmax(-1) for part in (now, before)]
        return kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)

    @contextmanager
    def _shifted(self, shifts: Sequence[Tensor]) -> Iterator[None]:
        def add(shift: Tensor) -> Callable[..., Any]:
            def hook(_module: Any, _args: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                moved = hidden + shift.to(hidden.dtype)
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            return hook

        handles = [place.register_forward_hook(add(shift)) for place, shift in zip(self.places, shifts, strict=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _width(model: Any) -> int:
        return int(plain_model(model).get_base_model().get_input_embeddings().weight.shape[1])


def schedule_callback(loss: BreakerLoss) -> TrainerCallback:
    """Return the callback that tells the loss the step and the length of the run."""
    from transformers import TrainerCallback

    class Schedule(TrainerCallback):
        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            loss.steps, loss.step = state.max_steps, state.global_step

        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            loss.step = state.global_step

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            loss.step = state.global_step  # an evaluation sees the next step's

    return Schedule()
