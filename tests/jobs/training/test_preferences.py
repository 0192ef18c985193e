"""Training on pairs: log-probabilities beside rows of their own, the reference, the log, resuming, refusals."""

import json

import pytest
import torch

from modicum.errors import ModicumError, RecipeError, TrainingError, UnsupportedError
from modicum.jobs import execute, plan
from modicum.jobs.data.pairs import Pair, PairCollator
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.subject import LocalSubject
from modicum.jobs.training import references
from modicum.jobs.training.objective import LabelHead
from modicum.jobs.training.preferences import PairLoss, check_first, layout
from modicum.jobs.training.references import fingerprint, log_probabilities, referenced
from modicum.recipe import parse
from modicum.record import read_log
from modicum.registry import objective
from oracles import preferences as oracle
from support import byte_tokenizer, tiny_llama

RNG = torch.Generator().manual_seed(0)
PAIRS = [
    Pair(*(tuple(torch.randint(5, 250, (size,), generator=RNG).tolist()) for size in sizes))
    for sizes in ((9, 4, 7), (3, 8, 1), (14, 2, 2), (5, 1, 6))
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))


def probabilities(model, collator, pairs=PAIRS):
    head = LabelHead(model)
    try:
        with torch.no_grad():
            return log_probabilities(model, collator(pairs))
    finally:
        head.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_prompt_gives_what_two_rows_give(attention):  # H5
    model = tiny_llama(attn_implementation=attention).eval()
    collator = layout(model, PAIRS, 0, pytest.fail)
    assert collator.shared
    found = probabilities(model, collator)
    torch.testing.assert_close(found, probabilities(model, PairCollator(0, shared=False)), rtol=0, atol=1e-5)
    for pair, got in zip(PAIRS, found.tolist()):
        for answer, value in zip(pair.answers, got):
            ids = [*pair.prompt, *answer]
            logits = model(torch.tensor([ids])).logits[0].double().detach().numpy()
            assert value == pytest.approx(oracle.answer_log_probability(logits, ids, len(pair.prompt)), abs=1e-5)


def test_a_shared_prompt_saves_its_copy():  # H5
    pair = Pair(tuple(range(5, 205)), tuple(range(50)), tuple(range(50, 100)))
    sizes = [PairCollator(0, shared=shared)([pair])["input_ids"].numel() for shared in (True, False)]
    assert sizes == [298, 498]  # the last token of an answer is read by none


def test_a_model_whose_answers_see_each_other_gets_rows_of_their_own():
    model = tiny_llama().eval()
    forward = model.model.forward
    model.model.forward = lambda *a, attention_mask=None, **k: forward(
        *a, attention_mask=attention_mask if attention_mask.dim() == 2 else torch.ones_like(attention_mask).tril(), **k
    )
    notes = []
    collator = layout(model, PAIRS, 0, notes.append)
    assert not collator.shared and "the answers see each other" in notes[0]


WINDOW = 40  # tokens back; more than the rows of a trial have


def windowed(kind):
    """Return a random model of two layers, some of which look back WINDOW tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = {"vocab_size": 264, "num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    local = {"attention_types": [[["local"], 2]], "window_size": WINDOW, "num_layers": 2, "num_heads": 4}
    fields = local if kind == "gpt_neo" else heads | {"sliding_window": WINDOW}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shared, **fields)).eval()


def pair_of(*sizes):
    return Pair(*(tuple(torch.randint(5, 250, (size,), generator=RNG).tolist()) for size in sizes))


@pytest.mark.parametrize(
    ("kind", "long"), [("mistral", (50, 6, 8)), ("gpt_neo", (26, 12, 10)), ("gemma3_text", (60, 4, 4))]
)
def test_rows_beyond_a_window_are_not_shared(kind, long):
    model, notes = windowed(kind), []
    short, long = pair_of(20, 5, 6), pair_of(*long)
    assert layout(model, [short], 0, pytest.fail).shared
    collator = layout(model, [short, long], 0, notes.append)
    assert not collator.shared and f"some layers look back {WINDOW}" in notes[0]
    found = probabilities(model, collator, [short, long])
    for pair, got in zip((short, long), found.tolist()):
        for answer, value in zip(pair.answers, got):
            with torch.no_grad():
                logits = model(torch.tensor([[*pair.prompt, *answer]])).logits[0].double().numpy()
            told = oracle.answer_log_probability(logits, [*pair.prompt, *answer], len(pair.prompt))
            assert value == pytest.approx(told, abs=1e-4)
    # What is refused here is not what the model says.
    shared = PairCollator(0, mask=torch.bool if model.config._attn_implementation == "sdpa" else model.dtype)
    assert (probabilities(model, shared, [short, long])[1] - found[1]).abs().max() > 1e-3


def test_answers_beyond_a_window_are_measured_alone():
    model = windowed("mistral")
    subject = LocalSubject("m", model, byte_tokenizer())
    few, many = ([{"prompt": "a" * size, "completion": end} for end in ("bcd", "efgh")] for size in (20, 60))
    subject.alternatives([few])  # the model was tried, and shares prompts
    (found,) = subject.alternatives([many])
    alone = [likelihood.nats for likelihood in subject.likelihoods(many)]
    assert [each.nats for each in found] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_language_model_in_16_bits_shares_a_prompt_but_not_with_positions_that_go_on(dtype):
    reference = "builtin:smollm2-135m-instruct"
    model, tokenizer = load_model(reference, dtype=dtype, device="cpu"), load_tokenizer(reference)
    text = tokenizer("Name three rivers of the north, and say of each of them where it ends.")["input_ids"]
    pairs = [Pair(tuple(text), tuple(text[4:9]), tuple(text[2:6]))]
    assert layout(model, pairs, 0, pytest.fail).shared
    forward, notes = model.model.forward, []

    def deaf(*args, position_ids=None, **more):
        return forward(*args, position_ids=torch.arange(position_ids.shape[-1]).expand_as(position_ids), **more)

    model.model.forward = deaf
    assert not layout(model, pairs, 0, notes.append).shared and "a token's log-probability differs by" in notes[0]


def test_the_loss_is_that_of_its_function():
    model = tiny_llama()
    (pairs,) = referenced([PAIRS], model, PairCollator(0), precision="x", note=lambda _: None)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    loss = PairLoss("dpo", objective["dpo"].knobs({"beta": 0.3, "sft_weight": 0.5, "length_normalised": True}), model)
    found, columns = loss(model, PairCollator(0)(pairs))
    policy = probabilities(model, PairCollator(0, shared=False))
    rows = [(*p.tolist(), *pair.reference, *map(len, pair.answers)) for p, pair in zip(policy, pairs)]
    assert found.item() == pytest.approx(oracle.dpo(rows, beta=0.3, means=True, sft=0.5), abs=1e-5)
    assert columns["pairs"].shape == (4, 8) and loss.means()["length_chosen"] == pytest.approx(15 / 4)
    assert loss.means() == {}


@pytest.mark.parametrize("means", [False, True])
def test_every_column_of_the_log_is_what_it_says(monkeypatch, means):  # H1
    from modicum.jobs.training import preferences

    monkeypatch.setattr(preferences, "log_probabilities", lambda *_: torch.tensor([[-10.0, -9.0], [-9.0, -10.0]]))
    loss = PairLoss("dpo", objective["dpo"].knobs({"beta": 0.1, "length_normalised": means}), tiny_llama())
    found, told = loss(loss._head.model, {"reference": torch.tensor([[-12.0, -8.0]] * 2), "counts": [4, 2, 5, 3]})
    rows = [(-10, -9, -12, -8, 4, 2), (-9, -10, -12, -8, 5, 3)]
    assert found.item() == pytest.approx(oracle.dpo(rows, beta=0.1, means=means), abs=1e-6)
    if not means:
        assert oracle.dpo(rows[:1], beta=0.1) == pytest.approx(0.554355, abs=1e-6)
    # Rewards are those of whole answers, whatever the loss compares.
    columns = torch.tensor([[1, 0.3, 0.2, -0.1, -10, -9, 4, 2], [1, 0.5, 0.3, -0.2, -9, -10, 5, 3]])
    torch.testing.assert_close(told["pairs"], columns)
    assert [*loss.means()] == [*preferences.COLUMNS] and len(preferences.COLUMNS) == 8
    flipped = torch.tensor([[-8.0, -12.0]] * 2)
    _, told = loss(loss._head.model, {"reference": flipped, "counts": [4, 2, 5, 3]})
    torch.testing.assert_close(told["pairs"][0], torch.tensor([0, -0.5, -0.2, 0.3, -10, -9, 4, 2]))


def test_the_reference_is_computed_once_for_each_pair_and_model(monkeypatch):
    asked = []
    usual = references._computed
    monkeypatch.setattr(references, "_computed", lambda pairs, *given: asked.append(len(pairs)) or usual(pairs, *given))
    model, notes = tiny_llama(), []

    def ask(sets, model=model, precision="float32"):
        return referenced(sets, model, PairCollator(0), precision=precision, note=notes.append)

    first = ask([PAIRS[:3]])
    again = ask([PAIRS[1:], PAIRS[:1]])
    assert asked == [3, 1] and first[0][1:] == again[0][:2] and first[0][0] == again[1][0]
    assert "4 pairs: 1 computed, 3 known" in notes[-1]
    ask([PAIRS], precision="bfloat16")
    ask([PAIRS], model=tiny_llama(seed=1))
    assert asked == [3, 1, 4, 4]
    # The numbers of a pair do not depend on its neighbours: every one went through the model alone.
    alone = torch.cat([probabilities(model.eval(), PairCollator(0), [pair]) for pair in PAIRS])
    assert [pair.reference for pair in [*again[1], *again[0]]] == [tuple(row) for row in alone.double().tolist()]


def test_what_was_computed_before_a_kill_is_known_after_it(monkeypatch):
    monkeypatch.setattr(references, "KEPT", 2)
    usual, asked = references._computed, []

    def dying(pairs, *given):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(pairs))
        return usual(pairs, *given)

    monkeypatch.setattr(references, "_computed", dying)
    model, notes = tiny_llama(), []
    with pytest.raises(KeyboardInterrupt):
        referenced([PAIRS], model, PairCollator(0), precision="x", note=notes.append)
    monkeypatch.setattr(references, "_computed", usual)
    referenced([PAIRS], model, PairCollator(0), precision="x", note=notes.append)
    assert "4 pairs: 2 computed, 2 known" in notes[-1]


def test_a_broken_file_of_the_store_is_said_and_computed_again(tmp_path):
    model, notes = tiny_llama(), []
    name = fingerprint(model, "x None shared=True")
    (tmp_path / "cache" / "references" / name).mkdir(parents=True)
    (tmp_path / "cache" / "references" / name / "a.json").write_text("{")
    referenced([PAIRS], model, PairCollator(0), precision="x", note=notes.append)
    assert "a.json cannot be read" in notes[0] and "4 computed" in notes[1]


def test_a_run_that_does_not_start_at_its_reference_is_refused():
    model = tiny_llama()
    (pairs,) = referenced([PAIRS], model, PairCollator(0), precision="x", note=lambda _: None)
    loss = PairLoss("dpo", objective["dpo"].knobs({}), model)
    check_first(loss, model, PairCollator(0)(pairs))
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    with pytest.raises(TrainingError, match=r"expected 0\.693147: the reference log-probabilities are not those"):
        check_first(loss, model, PairCollator(0)(pairs))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return written(tmp_path_factory, "say")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return written(tmp_path_factory, "tell")


def written(tmp_path_factory, word):
    path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    lines = [
        {"prompt": f"{word} {i % 5}", "chosen": "abc" * (1 + i % 3), "rejected": "xyz" * (1 + i % 2)} for i in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def recipe(model, rows, **changes):
    trainer = {"max_steps": 6, "learning_rate": 3e-2, "per_device_train_batch_size": 4, "logging_steps": 1}
    data = {"job": "train", "model": str(model), "data": {"path": rows, "max_length": 96}, "objective": "dpo"}
    if "optimizer" in changes:  # it has a rate of its own
        del trainer["learning_rate"]
    return parse(data | changes | {"trainer": trainer | changes.get("trainer", {})})


@pytest.mark.parametrize("adapter", [None, {"rank": 4, "config": {"lora_dropout": 0.3}}, {"rank": 4, "init": "pissa"}])
def test_pairs_are_learned(adapter, tiny_model, rows, held_out, tmp_path):
    data = recipe(tiny_model, rows, adapter=adapter, eval_data={"path": held_out}, trainer={"save_strategy": "no"})
    run = execute(data, tmp_path / "run", quiet=True)
    log = read_log(run.folder, "train")
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-4) and log[-1]["loss"] < log[0]["loss"]
    assert (
        log[-1]["margin"] > 0.01
        and log[-1]["length_chosen"] > 3
        and log[0]["reward_chosen"] == pytest.approx(0, abs=1e-4)
    )
    metrics = run.record["metrics"]
    assert metrics["eval_accuracy"] > 0.9 and metrics["eval_margin"] > 0.01 and metrics["eval_logp_chosen"] < 0
    assert any("Dropout of the adapter is off" in note for note in run.record["notes"]) == bool(
        adapter and "config" in adapter
    )


def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_model, rows, tmp_path, monkeypatch):
    from modicum.jobs.training import preferences

    def weights(run):
        return next((run.folder / "adapter").glob("*.safetensors")).read_bytes()

    data = recipe(tiny_model, rows, adapter={"rank": 2}, trainer={"save_steps": 2})
    whole = execute(data, tmp_path / "whole", quiet=True)
    usual, calls = preferences.PairLoss.__call__, []

    def fails(self, model, inputs, **given):
        if model.training:
            calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return usual(self, model, inputs, **given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preferences.PairLoss, "__call__", fails)
        execute(data, tmp_path / "again", quiet=True)
    assert weights(execute(data, tmp_path / "again", quiet=True)) == weights(whole)


def test_forward_passes_alone_can_learn_pairs(tiny_model, rows, tmp_path):
    optimizer = {"name": "tezo", "lr": 1e-3, "rank": 4, "engine": "adapter"}
    data = recipe(tiny_model, rows, optimizer=optimizer, trainer={"max_steps": 2, "save_strategy": "no"})
    run = execute(data, tmp_path / "run", quiet=True)
    assert read_log(run.folder, "train")[0]["loss"] == pytest.approx(0.6931, abs=1e-2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"packing": True}}, RecipeError, "packs the pairs of each batch by itself"),
        ({"data": {"completion_only": False}}, RecipeError, "judges answers alone"),
        ({"data": {"max_length": 4}}, ModicumError, "pairs are longer than max_length 4"),
        ({"data": {"format": "completion"}}, RecipeError, "field 'completion' is missing"),
        ({"trainer": {"batch_eval_metrics": True}}, UnsupportedError, "takes the numbers of an evaluation as one list"),
        (
            {"trainer": {"label_smoothing_factor": 0.1}},
            UnsupportedError,
            "label_smoothing_factor smooths the model's own",
        ),
        ({"optimizer": {"name": "tezo", "lr": 1e-3, "engine": "paired"}}, UnsupportedError, "engine='paired' cannot"),
        ({"objective": {"name": "dpo", "beta": 0}}, RecipeError, "beta"),
    ],
)
def test_what_cannot_carry_pairs_is_refused_before_training(changes, error, message, tiny_model, rows):
    changes = dict(changes)
    data = {"path": rows} | changes.pop("data", {})
    with pytest.raises(error, match=message):
        plan(recipe(tiny_model, rows, data=data, **changes))


def test_an_evaluation_of_what_is_learned_is_refused(tiny_model, rows, tmp_path):  # H18
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"prompt": "SAY, 3!", "chosen": "a", "rejected": "b"}))
    with pytest.raises(RecipeError, match=r"eval_data, row 0 \('SAY, 3!'\) asks what data, row 3 \('say 3'\) teaches"):
        plan(recipe(tiny_model, rows, eval_data=str(path)))
