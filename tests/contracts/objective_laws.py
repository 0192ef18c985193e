"""Laws of objectives, over batches with padding, prompts and packed documents."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from hypothesis import strategies as st
from laws import Draw, default_knobs, knobs, law
from torch import Tensor
from torch.nn import functional

from modicum.objectives.batch import Batch
from modicum.philox import row_keys
from modicum.registry import Entry, objective
from modicum.types import IGNORED, UnitInterval

MASK, VOCABULARY, PAD = 99, 64, 0


def batch(draw: Draw, *, packed: bool = False) -> dict[str, Tensor]:
    """Draw rows with a prompt and padding on one side, and where it is asked for two documents in each row."""
    rows, length = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 24]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    ids = torch.randint(10, VOCABULARY, (rows, length), generator=rng)
    place = torch.arange(length).expand(rows, length)
    padding = torch.randint(0, length, (rows, 1), generator=rng) // 2
    real = place >= padding if draw(st.booleans()) else place < length - padding
    prompt = torch.randint(0, length + 1, (rows, 1), generator=rng) // 2
    position = (real.cumsum(-1) - 1).clamp(min=0)
    found = {
        "input_ids": torch.where(real, ids, PAD),
        "labels": torch.where(real & (position >= prompt), ids, IGNORED),
        "attention_mask": real.long(),
        "inputs_embeds": torch.randn(rows, length, 6, generator=rng),
        "hidden_states": torch.randn(rows, length, 6, generator=rng),
    }
    if packed:
        found["position_ids"] = torch.where(position >= prompt, position - prompt, position)
    return found


def answers(draw: Draw) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    rows, candidates = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return {
        "scores": torch.randn(rows, candidates, generator=rng),
        "answers": torch.randint(0, candidates, (rows,), generator=rng),
        "rewards": torch.rand(rows, generator=rng),
    }


def preferences(draw: Draw) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    count = draw(st.integers(1, 4))
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    tokens = {f"{side}_tokens": torch.randint(1, 9, (count,), generator=rng) for side in ("chosen", "rejected")}
    return {name: -20 * torch.rand(count, generator=rng) for name in names} | tokens


def contrasts(draw: Draw) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    tokens = torch.randint(1, VOCABULARY, (4, rows, length), generator=rng)
    reasoning = torch.arange(length).expand(rows, length) < length // 2  # never all: an answer is left
    logits = torch.randn(3, rows, length, VOCABULARY, generator=rng)
    states = torch.randn(2, rows, length, 6, generator=rng)
    return {
        "prompt": tokens[0, 0], "safe": tokens[1, 0], "harmful": tokens[2, 0],
        "h": states[0], "h_ref": states[1], "retain_mask": reasoning, "harmful_mask": ~reasoning,
        "logits": logits[0], "targets": tokens[0], "reasoning": reasoning,
        "teacher_ids": tokens[3].unsqueeze(-1), "teacher_logprobs": -torch.rand(rows, length, 1, generator=rng),
        "toward_logits": logits[1], "toward": tokens[1], "away_logits": logits[2], "away": tokens[2],
        "divergence": torch.rand((), generator=rng),
    }  # fmt: skip


def numbers(found: Any) -> list[Tensor]:
    """Return what an objective gave, one tensor beside the other."""
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found
    if all(isinstance(part, int | Tensor) and not torch.as_tensor(part).dim() for part in parts):
        return [torch.tensor([int(part) for part in parts])]
    return [number for part in parts for number in numbers(part)]


def is_of_batches(entry: Entry[Any]) -> bool:
    return entry.facts.acts_on in ("input_ids", "inputs_embeds", "hidden_states")


def chosen(entry: Entry[Any], draw: Draw, **fixed: Any) -> dict[str, Any]:
    given = {
        "mask_token_id": MASK,
        "vocab_size": VOCABULARY,
        "protect_ids": (10, 11),
        "min_answer_tokens": 2,
        "horizon": 20,
    }
    given |= fixed
    return knobs(entry, draw, **{name: value for name, value in given.items() if name in entry.parameters[1]})


def apply(entry: Entry[Any], given: Batch, values: dict[str, Any], rng: Any = None) -> Any:
    """Call an objective with what it takes: by default half way through training."""
    data: dict[str, Any] = {"batch": given, "step": 5, "total_steps": 10, "refusal_token": 9, **given}
    takes = inspect.signature(entry.function).parameters
    supplied = {"rng": rng if rng is not None else torch.Generator().manual_seed(3)} if "rng" in takes else {}
    supplied |= {
        name: data[name]
        for name in ("step", "refusal_token")
        if name in takes and takes[name].kind == inspect.Parameter.KEYWORD_ONLY
    }
    own = {name: value for name, value in values.items() if name in takes}
    return entry.function(*(data[name] for name in entry.parameters[0]), **own, **supplied)


def zeroes_labels(batch: Batch) -> Batch:
    return {**batch, "labels": torch.zeros_like(batch["labels"])}


def zeroes_labels_in_place(batch: Batch) -> Batch:
    batch["labels"].zero_()
    return batch


def masks_all(batch: Batch, *, ratio: UnitInterval = 0.5) -> Batch:
    return {**batch, "input_ids": torch.full_like(batch["input_ids"], MASK)}


def shuffles_rows(batch: Batch) -> Batch:
    return {**batch, "input_ids": batch["input_ids"].roll(1, -1) + 1}


def averages_rows(batch: Batch, *, rng: Any) -> Batch:
    return {**batch, "input_ids": batch["input_ids"] + batch["input_ids"].shape[0]}


def averages_columns(batch: Batch, *, rng: Any) -> Batch:
    return {**batch, "input_ids": batch["input_ids"] + torch.arange(batch["input_ids"].shape[1])}


def rewards_errors(scores: Tensor, answers: Tensor) -> Tensor:
    return scores.gather(1, answers[:, None]).mean()


@law(objective, "labels_untouched", broken=zeroes_labels)
def labels_untouched(entry: Entry[Any], draw: Draw) -> None:
    given = batch(draw, packed=draw(st.booleans()))
    labels = given["labels"].clone()
    assert torch.equal(apply(entry, given, chosen(entry, draw))["labels"], labels)
    assert torch.equal(given["labels"], labels)


@law(objective, "identity", broken=zeroes_labels)
def identity(entry: Entry[Any], draw: Draw) -> None:
    given = batch(draw, packed=draw(st.booleans()))
    before = {name: value.clone() for name, value in given.items()}
    found = apply(entry, given, chosen(entry, draw))
    assert found.keys() == before.keys() and all(torch.equal(found[name], value) for name, value in before.items())


@law(objective, "mask_share", broken=masks_all)
def mask_share(entry: Entry[Any], draw: Draw) -> None:
    values = chosen(entry, draw, scope="row", spans=1, schedule="constant")
    if values.get("sampling") == "bernoulli":
        ids = torch.randint(12, VOCABULARY, (64, 64), generator=torch.Generator().manual_seed(0))
        masked = (apply(entry, {"input_ids": ids, "labels": ids}, values)["input_ids"] == MASK).float()
        error = 5 * math.sqrt(values["ratio"] * (1 - values["ratio"]) / ids.numel())
        assert abs(masked.mean() / (63 / 64 if values["exclude_last"] else 1) - values["ratio"]) <= error
        return
    given = batch(draw, packed=draw(st.booleans()))
    masked = apply(entry, given, values)["input_ids"] == MASK
    for row in range(len(masked)):
        places = given["attention_mask"][row].nonzero().flatten().tolist()
        starts = [
            i for i in places if i == places[0] or ("position_ids" in given and given["position_ids"][row, i] == 0)
        ]
        for start, end in zip(starts, [*starts[1:], math.inf]):
            document = [i for i in places if start <= i < end]
            eligible = [i for i in document if given["input_ids"][row, i] not in values.get("protect_ids", ())]
            if values.get("exclude_last", False):
                eligible = [i for i in eligible if i != document[-1]]
            wanted = max(values.get("min_masks", 1), math.floor(values["ratio"] * len(eligible)))
            expected = min(wanted, len(eligible)) if values["ratio"] else 0
            assert sum(masked[row, i].item() for i in document) == expected
            assert all(i in eligible for i in document if masked[row, i])


@law(objective, "clean_rows_kept", broken=shuffles_rows)
def clean_rows_kept(entry: Entry[Any], draw: Draw) -> None:
    given = batch(draw)
    found = apply(entry, given, chosen(entry, draw))
    made = list(zip(found["input_ids"].tolist(), found["labels"].tolist()))
    for ids, labels, real in zip(given["input_ids"], given["labels"], given["attention_mask"].bool()):
        n = int(real.sum())
        left = [
            place for place, (i, y) in enumerate(made) if (i[:n], y[:n]) == (ids[real].tolist(), labels[real].tolist())
        ]
        assert left, "the clean row is not in the batch, in its order"
        made = made[left[0] + 1 :]


@law(objective, "what came is left alone, and results repeat", broken=zeroes_labels_in_place)
def leaves_alone(entry: Entry[Any], draw: Draw) -> None:
    given = batch(draw, packed=draw(st.booleans())) | answers(draw) | preferences(draw) | contrasts(draw)
    before = {name: value.clone() for name, value in given.items()}
    state = torch.get_rng_state()
    values = chosen(entry, draw)
    found, again = apply(entry, given, values), apply(entry, given, values)
    assert all(torch.equal(given[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(numbers(found), numbers(again), strict=True))
    assert pairs and all(torch.equal(a, b) and (not a.is_floating_point() or a.isfinite().all()) for a, b in pairs)


@law(objective, "padding stays padding", broken=shuffles_rows)
def padding_stays(entry: Entry[Any], draw: Draw) -> None:
    given = batch(draw, packed=draw(st.booleans()))
    if is_of_batches(entry):
        found = apply(entry, given, chosen(entry, draw))
        assert (found["input_ids"][found["attention_mask"].reshape(found["input_ids"].shape) == 0] == PAD).all()


@law(objective, "a row does not depend on the rows beside it", broken=averages_rows)
def rows_alone(entry: Entry[Any], draw: Draw) -> None:
    given = batch(draw)
    if not is_of_batches(entry) or "rng" not in inspect.signature(entry.function).parameters:
        return
    usual = {"mask_token_id": MASK, "vocab_size": VOCABULARY, "protect_ids": (10, 11), "min_answer_tokens": 2}
    values = default_knobs(entry, **usual)
    keys = row_keys(range(len(given["input_ids"])), seed=0, method="laws")
    alone = apply(entry, {name: value[:1] for name, value in given.items()}, values, keys[:1])
    together = apply(entry, given, values, keys)
    for name, value in alone.items():
        width = value.shape[1]
        assert torch.equal(together[name][: len(value), :width], value), name


@law(objective, "padding does not move what is drawn", broken=averages_columns)
def padding_moves_nothing(entry: Entry[Any], draw: Draw) -> None:
    if entry.facts.acts_on != "input_ids" or "rng" not in inspect.signature(entry.function).parameters:
        return
    values = chosen(entry, draw, scope="row")
    ids = torch.randint(10, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    keys = row_keys(["row"], seed=0, method="laws")
    found = []
    for left, right in ((0, 0), (3, 0), (0, 3)):
        sides = {"input_ids": (ids, PAD), "labels": (ids, IGNORED), "attention_mask": (torch.ones_like(ids), 0)}
        padded = {name: functional.pad(value, (left, right), value=fill) for name, (value, fill) in sides.items()}
        made = apply(entry, padded, values, keys)
        real = made["labels"] != IGNORED
        found.append((made["input_ids"][real], made["labels"][real]))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@law(objective, "the better the answer the smaller the loss", broken=rewards_errors, acts_on="answers")
def prefers_right(entry: Entry[Any], draw: Draw) -> None:
    given, values = answers(draw), chosen(entry, draw)
    if entry.facts.acts_on != "answers":
        return
    right = torch.zeros_like(given["scores"]).scatter_(1, given["answers"][:, None], 0.5)
    better = {"scores": given["scores"] + right, "answers": given["answers"], "rewards": given["rewards"] + 0.5}
    loss, lower = apply(entry, given, values), apply(entry, better, values)
    assert loss.ndim == 0 and loss.isfinite()
    assert lower < loss or given["scores"].shape[1] == 1


def prefers_rejected(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> Tensor:
    return (policy_chosen - reference_chosen - policy_rejected + reference_rejected).exp().mean()


@law(objective, "the likelier the chosen answer the smaller the loss", broken=prefers_rejected, acts_on="pairs")
def prefers_chosen(entry: Entry[Any], draw: Draw) -> None:
    given, values = preferences(draw), chosen(entry, draw)
    if entry.facts.acts_on != "pairs":
        return
    # From the reference, and by a step that no variant takes for too far.
    given |= {"policy_chosen": given["reference_chosen"], "policy_rejected": given["reference_rejected"]}
    step = 0.01 / values.get("beta", 1.0) * (1 - 2 * values.get("label_smoothing", 0.0))
    better = given | {"policy_chosen": given["policy_chosen"] + step}
    worse = given | {"policy_rejected": given["policy_rejected"] + step}
    loss, lower, higher = (apply(entry, part, values).double() for part in (given, better, worse))
    assert loss.ndim == 0 and loss.isfinite()
    rounding = 1e-6 * loss.abs()
    assert lower - rounding <= loss <= higher + rounding
