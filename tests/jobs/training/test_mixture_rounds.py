"""Training on mixtures: scores by dimension, rounds whose weights follow validation, a stopped run, refusals."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
import torch

from modicum.errors import CheckpointError, RecipeError
from modicum.jobs import execute
from modicum.jobs.data.pairs import Pair, PairCollator
from modicum.jobs.training.objective import LabelHead
from modicum.jobs.training.rounds import RoundStream, accuracies
from modicum.objectives.mixing import hybrid_weights
from modicum.recipe import parse
from modicum.record import read_log, read_record
from support import tiny_llama

NAMES = ("one", "two")


def some_pairs(name, n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 250, (n, 9), generator=rng).tolist()
    return [Pair(tuple(row[:4]), tuple(row[4:7]), tuple(row[7:]), dimension=name) for row in ids]


PAIRS = {name: some_pairs(name, 6, seed) for seed, name in enumerate(NAMES)}


def dimensions(stream, n):
    return [pair.dimension for pair in islice(stream, n)]


def test_a_round_holds_its_weights_share_from_its_second_step_on():
    stream = RoundStream(PAIRS, [1, 1], step=4, steps=5, seed=0)
    stream.weights.append([1, 3])
    found = dimensions(stream, 60)
    rounds = [found[4:20], found[24:40], found[44:60]]
    assert [Counter(part)["two"] for part in rounds] == [8, 12, 12]
    assert Counter(found[20:24])["two"] == 2  # fetched before the first round ended
    assert found == dimensions(stream, 60) and found != dimensions(
        RoundStream(PAIRS, [1, 1], step=4, steps=5, seed=1), 60
    )


def test_no_pair_comes_twice_before_all_have_come():
    seen = [pair for pair in islice(RoundStream(PAIRS, [1, 1], step=2, steps=3, seed=0), 24) if pair.dimension == "one"]
    for start in range(0, len(seen) - 5, 6):
        assert {*seen[start : start + 6]} == {*PAIRS["one"]}


def test_accuracies_are_those_of_mean_log_probabilities():
    model = tiny_llama(initializer_range=0.3).eval()
    head = LabelHead(model)
    found = accuracies(model, PAIRS, PairCollator(0))
    head.detach()
    for value, part in zip(found, PAIRS.values()):
        wins = []
        for pair in part:
            means = []
            for answer in pair.answers:
                ids = torch.tensor([[*pair.prompt, *answer]])
                logs = model(ids).logits[0].detach().log_softmax(-1)
                at = range(len(pair.prompt), ids.shape[1])
                means.append(sum(float(logs[i - 1, ids[0, i]]) for i in at) / len(answer))
            wins.append(means[0] > means[1])
        assert value == sum(wins) / len(wins)


@pytest.fixture
def recipe(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        for name in NAMES:
            rows = [
                {"prompt": f"{name} {split} {i}", "chosen": "yes " + "ab"[i % 2], "rejected": "no"} for i in range(12)
            ]
            file = tmp_path / f"{name}-{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mix(split, **more):
        return {"mix": {"parts": {name: str(tmp_path / f"{name}-{split}.jsonl") for name in NAMES}, **more}}

    return {
        "job": "train",
        "model": str(tiny_model),
        "data": mix("train", rounds={"count": 3, "eta": 2.0}) | {"max_length": 64},
        "eval_data": mix("test") | {"max_length": 64},
        "objective": {"name": "dpo", "beta": 0.5},
        "adapter": {"rank": 4},
        "trainer": {
            "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 2,
            "save_steps": 1, "use_cpu": True,
        },
    }  # fmt: skip


def test_weights_follow_validation_and_scores_come_by_dimension(recipe, tmp_path):
    execute(parse(recipe), tmp_path / "run", quiet=True)
    metrics = read_record(tmp_path / "run")["metrics"]
    rounds = read_log(tmp_path / "run", "round")
    assert [line["round"] for line in rounds] == [1, 2] and [line["step"] for line in rounds] == [2, 4]
    weights = [1.0, 1.0]
    for line, stored in zip(rounds, metrics["rounds"][1:]):
        weights = hybrid_weights(weights, [line["dimensions"][name]["accuracy"] for name in NAMES], eta=2.0)
        assert [stored[name] for name in NAMES] == pytest.approx(weights)
    assert {name: metrics["dimensions"][name]["n"] for name in NAMES} == {"one": 12, "two": 12}


def test_a_stopped_run_goes_on_to_the_same_bytes(recipe, tmp_path, monkeypatch):
    execute(parse(recipe), tmp_path / "whole", quiet=True)
    from transformers import Trainer

    class Killed(BaseException):
        pass

    save = Trainer._save_checkpoint

    def dying(self, *arguments, **more):
        save(self, *arguments, **more)
        if self.state.global_step == 3:
            raise Killed

    monkeypatch.setattr(Trainer, "_save_checkpoint", dying)
    with pytest.raises(Killed):
        execute(parse(recipe), tmp_path / "cut", quiet=True)
    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    execute(parse(recipe), tmp_path / "cut", quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    both = [read_record(tmp_path / run)["metrics"]["rounds"] for run in ("cut", "whole")]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_data": None}, "set eval_data.mix with the same parts, one, two"),
        ({"trainer": {"max_steps": 2}}, "has 3 rounds of steps: set trainer.max_steps"),
        ({"objective": None}, "data.mix.rounds compares pairs: set objective: dpo"),
    ],
)
def test_rounds_that_cannot_be_are_refused(recipe, changes, message):
    recipe = {key: value for key, value in (recipe | changes).items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        parse(recipe)


def test_a_mixture_without_rounds_is_scored_by_dimension_too(recipe, tmp_path):
    del recipe["data"]["mix"]["rounds"]
    recipe["trainer"] |= {"max_steps": 2}
    execute(parse(recipe), tmp_path / "run", quiet=True)
    metrics = read_record(tmp_path / "run")["metrics"]
    assert {*metrics["dimensions"]} == {*NAMES} and "rounds" not in metrics


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_dimension_of_which_max_length_leaves_nothing_is_refused_before_the_training(recipe, tmp_path, split, rounds):
    from transformers import Trainer

    long = [{"prompt": f"two {split} {i}" + "!" * 60, "chosen": "yes", "rejected": "no"} for i in range(12)]
    (tmp_path / f"two-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    if not rounds:
        del recipe["data"]["mix"]["rounds"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecipeError, match="mix: no pair of two is left"):
        patch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("it was trained"))
        execute(parse(recipe), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_empty_file_as_a_part_is_refused(recipe, tmp_path):
    (tmp_path / "two-train.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="two-train.jsonl .* no rows, expected at least one"):
        execute(parse(recipe), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_of_what_a_mixture_teaches_is_refused(recipe, tmp_path):  # H18
    first = json.loads((tmp_path / "two-train.jsonl").read_text().splitlines()[3])
    rows = [first | {"prompt": f"  {first['prompt'].upper()}!"}]
    (tmp_path / "two-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match="asks what data, row .* teaches"):
        execute(parse(recipe), tmp_path / "run", quiet=True)
