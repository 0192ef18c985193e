"""Rows of safety reasoning in training: rendering, batches, the teacher's distributions, the loss, and a Trainer.

For a training of one's own::

    trainer = SRGTrainer(model, args, train_dataset=rows, data_collator=SRGDataCollator(tokenizer))

with rows of :func:`modicum.jobs.safety_data.build_srg_rows`. The job ``train`` does the same with
``objective: safety_reasoning``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.jobs.data.collators import pad_id
from modicum.jobs.data.tokens import messages_of
from modicum.jobs.safety.leaks import Spans, shared_span, spans_of
from modicum.jobs.safety.prompts import (
    Format,
    Guideline,
    guideline_text,
    load_guidelines,
    render_row,
    render_teacher_prompt,
    shown,
)
from modicum.jobs.training.trainer import PartsTrainer
from modicum.objectives.safety_reasoning import Norm, safety_reasoning
from modicum.random import derive_seed
from modicum.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from modicum.evaluate.rows import Rows
    from modicum.jobs.data.section import DataSection

Example = dict[str, Any]


def encode_reasoning(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    knobs: Mapping[str, Any],
    *,
    seed: int,
    note: Callable[[str], None],
) -> list[Example]:
    """Return rows as token ids, labels and the mask of the reasoning; rows that are too long are left out, never cut.

    Args:
        rows: Prompts and completions.
        tokenizer: With a chat template.
        section: ``max_length`` is read.
        knobs: Of the objective.
        seed: Draws which rows keep the guidelines.
        note: Told how many rows were left out, and how many keep the guidelines.

    Raises:
        RecipeError: No row reasons, a row holds words of the guidelines, or all rows are too long.
        CheckpointError: The rows are of another kind, or cannot be rendered.
    """
    if rows.kind not in ("completion", "contrast"):
        raise CheckpointError(
            f"{section.path} holds {rows.kind} rows, expected prompts with completions, such as those of job: "
            "synthesize."
        )
    guidelines = shown(load_guidelines(knobs["guidelines"]), knobs["guideline_set"])
    share, spans = knobs["guideline_keep_prob"], spans_of(guidelines)
    found: list[Example] = []
    long = kept = 0
    for index, row in enumerate(rows.rows):
        where = f"{section.path}, row {index}"
        refuse_guidelines(f"{row['prompt']}\n{row['completion']}", spans, where)
        keeps = derive_seed(seed, "guidelines", index) / 2**63 < share
        messages = with_system(messages_of(row), guideline_text(guidelines)) if keeps else messages_of(row)
        try:
            example = rendered(
                {"prompt": messages, "completion": row["completion"]}, tokenizer, knobs["reasoning_format"]
            )
        except (RecipeError, CheckpointError) as error:
            raise type(error)(f"{where}: {error}") from None
        if len(example["input_ids"]) > section.max_length:
            long += 1
            continue
        kept += keeps
        found.append(example | {"asked": row["prompt"], "system": row.get("system")})
    if not found:
        raise RecipeError(f"{section.path}: all {long} rows are longer than max_length {section.max_length}. Raise it.")
    if not any(any(example["reasoning_mask"]) for example in found):
        raise RecipeError(
            f"{section.path}: none of {len(found)} rows holds reasoning ({knobs['reasoning_format']}), so only answers "
            "would be learned. Leave out the objective for refusal training, or set reasoning_format."
        )
    if long:
        note(
            f"{section.path}: {long} of {len(rows)} rows are longer than max_length {section.max_length} and were left "
            "out; none is cut."
        )
    if share:
        note(f"{section.path}: {kept} of {len(found)} rows keep the guidelines in their prompt.")
    return found


def rendered(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, form: Format) -> Example:
    """Return a row as an example of any length."""
    ids, labels, reasoning = render_row(row, tokenizer, reasoning_format=form, max_length=2**40)
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids), "reasoning_mask": reasoning}


def refuse_guidelines(text: str, spans: Spans, where: str) -> None:
    """Refuse a training row that holds words of the guidelines: with these in its prompt nothing is distilled."""
    if shared := shared_span(text, spans):
        raise RecipeError(
            f"{where} holds {len(shared)} words of the guidelines ({' '.join(shared)[:40]}…), which training must not "
            "see. Drop the row, or set guideline_keep_prob to train with the guidelines in the prompt."
        )


def with_system(messages: Sequence[Mapping[str, str]], text: str) -> list[dict[str, str]]:
    """Return a conversation whose system message begins with ``text``."""
    first, *rest = map(dict, messages)
    if first["role"] != "system":
        return [{"role": "system", "content": text}, first, *rest]
    return [{"role": "system", "content": f"{text}\n\n{first['content']}"}, *rest]


@torch.no_grad()
def add_teacher(
    examples: Sequence[Example],
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    guidelines: Sequence[Guideline],
    *,
    top_k: int,
) -> None:
    """Give each example the teacher's likeliest tokens at its completion, the guidelines being in the teacher's prompt.

    Args:
        examples: Of :func:`encode_reasoning`; ``teacher_ids`` and ``teacher_logprobs`` are added, (completion, K).
        teacher: A causal language model with the same tokenizer.
        tokenizer: The student's.
        guidelines: What the teacher sees.
        top_k: K, at most the size of the vocabulary.

    Cost:
        A forward pass over each row; 12 bytes for each of K tokens at each position.
    """
    training = teacher.training
    teacher.eval()
    options = {"logits_to_keep": 0} if takes_positions(teacher) else {}
    try:
        for example in examples:
            learned = [token for token in example["labels"] if token != IGNORED]
            messages: Any = render_teacher_prompt(
                example["asked"], guidelines, guideline_set="full" if guidelines else "none"
            )
            if example.get("system"):
                messages = with_system(messages, example["system"])
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            ids = [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *learned]
            if options:
                options["logits_to_keep"] = len(learned) + 1
            given = torch.tensor([ids], device=teacher.device)
            logits = teacher(input_ids=given, use_cache=False, **options).logits[0, -len(learned) - 1 : -1]
            top = logits.float().log_softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
            example["teacher_ids"], example["teacher_logprobs"] = top.indices.int().cpu(), top.values.cpu()
    finally:
        teacher.train(training)


def takes_positions(model: Any) -> bool:
    """Whether a model computes logits at chosen positions alone."""
    inner = getattr(model, "module", model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@dataclass(frozen=True)
class SRGDataCollator:
    """Make batches of safety-reasoning rows, rendered or not.

    Args:
        tokenizer: The model's own, with a chat template.
        max_length: Most tokens of a row; a longer one is refused, since cutting would take the answer away.
        reasoning_format: How reasoning and answer are told apart.
        guidelines: What rows must not hold a span of; none is looked for when not given.

    Raises:
        ModicumError: A row cannot be rendered, or holds words of the guidelines.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 4096
    reasoning_format: Format = "think_tags"
    guidelines: Sequence[Guideline] = ()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask``, ``labels`` and ``reasoning_mask``, and the teacher's tokens."""
        examples = [dict(row) if "input_ids" in row else self._rendered(row) for row in rows]
        width = max(len(example["input_ids"]) for example in examples)
        fill = {
            "input_ids": pad_id(self.tokenizer),
            "attention_mask": 0,
            "labels": IGNORED,
            "reasoning_mask": False,
        }
        batch = {
            key: torch.tensor([[*e[key], *[value] * (width - len(e["input_ids"]))] for e in examples])
            for key, value in fill.items()
        }
        if "teacher_ids" in examples[0]:
            shape = (len(examples), width - 1, examples[0]["teacher_ids"].shape[-1])
            ids, logs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
            for number, example in enumerate(examples):
                at = (batch["labels"][number, 1:] != IGNORED).nonzero()[:, 0]
                ids[number, at] = example["teacher_ids"].long()
                logs[number, at] = example["teacher_logprobs"]
            batch |= {"teacher_ids": ids, "teacher_logprobs": logs}
        return batch

    def _rendered(self, row: Mapping[str, Any]) -> Example:
        example = rendered(row, self.tokenizer, self.reasoning_format)
        if len(example["input_ids"]) > self.max_length:
            raise RecipeError(
                f"A row has {len(example['input_ids'])} tokens, more than max_length {self.max_length}. Drop it, or "
                "raise max_length."
            )
        if self.guidelines:
            text = self.tokenizer.decode(example["input_ids"])
            refuse_guidelines(text, spans_of(self.guidelines), "A row")
        return example


class ReasoningLoss:
    """The loss of a batch of :class:`SRGDataCollator`: a :class:`~modicum.jobs.training.trainer.Loss`.

    Args:
        loss_norm: See :func:`~modicum.objectives.safety_reasoning.safety_reasoning`.
        reasoning_loss_weight: Likewise.
    """

    def __init__(self, *, loss_norm: Norm = "token", reasoning_loss_weight: float = 1.0) -> None:
        self.loss = partial(safety_reasoning, loss_norm=loss_norm, reasoning_loss_weight=reasoning_loss_weight)

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], *, branches: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss, with logits computed only where a token is learned."""
        if branches != 1:
            raise UnsupportedError("safety_reasoning has no paired form. Use engine: adapter.")
        targets = inputs["labels"][:, 1:]
        places = (targets != IGNORED).any(0).nonzero().flatten()
        options = {"logits_to_keep": places} if takes_positions(model) else {}
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        logits = model(**given, use_cache=False, **options).logits
        if not options:
            logits = logits[:, places]
        teacher = [inputs[key][:, places] for key in ("teacher_ids", "teacher_logprobs") if key in inputs]
        return self.loss(logits, targets[:, places], inputs["reasoning_mask"][:, 1:][:, places], *teacher), {}


class SRGTrainer(PartsTrainer):
    """A ``transformers.Trainer`` that learns reasoning and answer, hard or from a teacher's distributions.

    Args:
        model: The student, in its adapter or not.
        args: ``transformers.TrainingArguments``.
        loss_norm: See :func:`~modicum.objectives.safety_reasoning.safety_reasoning`.
        reasoning_loss_weight: Likewise.
        distill: ``soft`` needs rows to which :func:`add_teacher` has given the teacher's tokens.
        arguments: Further arguments of ``transformers.Trainer``; ``data_collator`` is a :class:`SRGDataCollator` of
            ``processing_class`` when not given.

    Raises:
        RecipeError: There is neither a collator nor a tokenizer, or ``soft`` has no teacher's tokens.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        loss_norm: Norm = "token",
        reasoning_loss_weight: float = 1.0,
        distill: Literal["hard", "soft"] = "hard",
        **arguments: Any,
    ) -> None:
        if distill not in ("hard", "soft"):
            raise RecipeError(f"distill is {distill!r}, expected 'hard' or 'soft'.")
        rows = arguments.get("train_dataset")
        if distill == "soft" and (not rows or "teacher_ids" not in rows[0]):
            raise RecipeError("distill is 'soft', but the rows have no tokens of a teacher. Call add_teacher first.")
        if arguments.get("data_collator") is None:
            if arguments.get("processing_class") is None:
                raise RecipeError("There is no data_collator. Give SRGDataCollator(tokenizer), or processing_class.")
            arguments["data_collator"] = SRGDataCollator(arguments["processing_class"])
        if args is not None and args.remove_unused_columns:
            args = replace(args, remove_unused_columns=False)  # the collator reads the rows as they are
        loss = ReasoningLoss(loss_norm=loss_norm, reasoning_loss_weight=reasoning_loss_weight)
        super().__init__(own_loss=loss, model=model, args=args, **arguments)
