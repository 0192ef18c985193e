"""Looped models at work: drafts by fewer cycles, what passes cost, visits that are left out, exits that were fitted."""

import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from models.zero_token.support_zero import ALL_HOSTS, decode, left_padded, looped, tokens
from modicum.errors import RecipeError, UnsupportedError
from modicum.models import calibrate_threshold, fit_exit_gate, skip_visits, visit_importance
from modicum.models.zero_token import loop, some
from modicum.models.zero_token.body import Call
from modicum.models.zero_token.calibrate import exit_curve
from modicum.models.zero_token.speculation import CycleCandidates
from modicum.models.zero_token.spent import counted, counting

# The others take seconds together; the guide's table of hosts holds drafts by all of them.
OFTEN = ("llama", "gpt2", "mistral", "gemma2")
SOME_HOSTS = [host if host in OFTEN else pytest.param(host, marks=pytest.mark.slow) for host in ALL_HOSTS]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("host", SOME_HOSTS)
def test_drafts_by_fewer_cycles_change_no_token(host):
    model = looped(host)
    ids = tokens(1, 6)
    want = model.generate(ids, **GREEDY)
    for cycles, sure in ((1, 0.0), (2, 0.3)):
        got = model.generate(ids, assistant_early_exit=cycles, assistant_confidence_threshold=sure, **GREEDY)
        assert torch.equal(got, want), cycles


@pytest.mark.parametrize("knobs", [{"exit_threshold": 0.12}, {"exit_threshold": 0.12, "exit_scope": "prefix"}])
def test_drafts_and_exits_go_together(knobs):
    model = looped(**knobs)
    want = model.generate(tokens(1, 6), **GREEDY)
    assert torch.equal(model.generate(tokens(1, 6), assistant_early_exit=2, **GREEDY), want)


def test_a_draft_leaves_the_cache_as_it_was_and_says_what_it_drew_by():
    model = looped()
    ids = tokens(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).cache
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        config = model.generation_config
        config.do_sample, config.max_length, config.assistant_confidence_threshold = True, 30, 0.0
        torch.manual_seed(0)
        found, logits = CycleCandidates(model, 1, config, lambda _, x: x / 0.7).get_candidates(ids, {"cache": cache})
        assert found.shape == (1, 10) and logits.shape == (1, 4, 40)
        want = model(found[:, :-1], n_cycles=1, use_cache=False).logits
    assert [layer.get_seq_length() for layer in cache.layers] == 8 * [5]
    assert all(
        torch.equal(a, layer.keys) and torch.equal(b, layer.values) for (a, b), layer in zip(before, cache.layers)
    )
    # The prompt was read with all cycles, the draft reads its first cycle's keys: the same in every layer that it runs
    # but the tail.
    assert (logits[0, 0] - want[0, 5] / 0.7).abs().max() < 3
    with pytest.raises(RecipeError, match="fewer cycles"):
        CycleCandidates(model, 3, config, None)


@pytest.mark.slow
def test_sampled_text_has_the_same_distribution_with_a_draft():
    """Two tokens of a vocabulary of three symbols, by 3,000 draws each way; chi-square of nine outcomes."""
    model = looped(host_overrides={"vocab_size": 3, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1})
    ids, knobs = (
        torch.tensor([[1, 0, 1]]),
        {"max_new_tokens": 3, "do_sample": True, "eos_token_id": None, "pad_token_id": 0},
    )
    counts = torch.zeros(2, 27)
    for way, more in enumerate(({}, {"assistant_early_exit": 1, "assistant_confidence_threshold": 0.0})):
        torch.manual_seed(way)
        for _ in range(1500):
            a, b, c = model.generate(ids, **knobs, **more)[0, 3:].tolist()
            counts[way, 9 * a + 3 * b + c] += 1
    total = counts.sum(0)
    kept = total > 0
    statistic = ((counts[0] - counts[1]) ** 2 / total)[kept].sum()
    assert statistic < 26 + 3.5 * (2 * 26) ** 0.5


@pytest.mark.parametrize("host", SOME_HOSTS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_packing_the_tokens_that_run_changes_nothing(host, backend, monkeypatch):
    if (host, backend) == ("gemma2", "sdpa"):
        pytest.skip("has no such kernel")
    model = looped(host)
    model.set_attn_implementation(backend)
    ids = tokens(3, 9)
    depths = torch.randint(1, 4, (3, 9), generator=torch.Generator().manual_seed(0))
    for inputs, here in (
        ({"input_ids": ids}, depths),
        (left_padded(ids, 3), torch.nn.functional.pad(depths, (3, 0), value=1)),
    ):
        with torch.no_grad():
            packed = model(**inputs, n_cycles=here, use_cache=False, looping=(call := Call(n_cycles=here)))
            with monkeypatch.context() as patch:
                patch.setattr(loop, "those_running", lambda _: None)
                plain = model(**inputs, n_cycles=here, use_cache=False, looping=(whole := Call(n_cycles=here)))
        left = inputs["input_ids"].shape[1] - 9
        torch.testing.assert_close(packed.logits[:, left:], plain.logits[:, left:], atol=1e-4, rtol=0)
        assert call.trace.computed < whole.trace.computed


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "kl", "gate", "latent", "zero_attention"])
def test_packing_changes_no_decision(criterion, monkeypatch):
    model = looped(exit_criterion=criterion)
    fit_exit_gate(model, [tokens(4, 9, seed=3)])
    threshold = {"zero_attention": 0.12, "gate": 0.5, "confidence": 0.3, "latent": 1.0}.get(criterion, 0.5)
    with torch.no_grad():
        packed = model(tokens(4, 12), exit_threshold=threshold, use_cache=False)
        monkeypatch.setattr(loop, "those_running", lambda _: None)
        plain = model(tokens(4, 12), exit_threshold=threshold, use_cache=False)
    assert torch.equal(packed.cycles, plain.cycles) and packed.cycles.unique().numel() > 1
    torch.testing.assert_close(packed.logits, plain.logits, atol=1e-4, rtol=0)


def test_gradients_pass_through_packed_tokens(monkeypatch):
    depths = torch.randint(1, 4, (3, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for packed in (True, False):
        model = looped().train()
        with monkeypatch.context() as patch:
            if not packed:
                patch.setattr(loop, "those_running", lambda _: None)
            model(tokens(3, 9), labels=tokens(3, 9), n_cycles=depths).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("host", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("knobs", [{}, {"cache_policy": "share_first"}, {"skip": [[1, 0]]}])
def test_deciding_by_the_prediction_leaves_the_cache_alone(host, knobs):
    model = looped(host, exit_criterion="confidence", **knobs)
    with torch.no_grad():
        logits, cycles, cache = decode(model, tokens(2, 9), exit_threshold=0.2)
        want = model(tokens(2, 9), use_cache=False, n_cycles=cycles).logits
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == 9 and cycles.unique().numel() > 1


@pytest.mark.parametrize("host", ["mistral", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("policy", ["share_first", "propagate", "latest", "select"])
def test_policies_decode_past_a_window(host, policy):
    model = looped(host, cache_policy=policy)
    for prefill in (0, 6):
        for asked in ({}, {"exit_threshold": 0.15}):
            with torch.no_grad():
                want = model(tokens(2, 9), use_cache=False, **asked)
            logits, cycles, _ = decode(model, tokens(2, 9), prefill=prefill, **asked)
            assert torch.equal(cycles, want.cycles)
            torch.testing.assert_close(logits, want.logits, atol=2e-4, rtol=0)


def test_passes_are_counted_and_timed_both_ways():
    model = looped(exit_threshold=0.12)
    with model.counted(every=1) as spent:
        out = model(tokens(3, 9), use_cache=False)
        model(tokens(3, 9), n_cycles=1, use_cache=False)
    facts = spent.facts()
    assert facts["tokens"] == 54 and spent.all_visits == 2 * 8 * 27
    assert facts["mean_cycles"] == pytest.approx((float(out.cycles.float().mean()) + 1) / 2)
    assert 0 < facts["visits_saved"] < 1 and facts["time_saved"] is not None and facts["tokens_per_second"] > 0
    model.config.exit_threshold = None
    with model.counted(every=1) as spent:
        model(tokens(), use_cache=False)
    assert spent.time_saved is None and spent.visits_saved == 0
    padded = left_padded(tokens(), 3)
    with model.counted() as spent:
        model(**padded)
    assert spent.tokens == 14


def test_generation_says_what_it_spent_and_timing_changes_no_text():
    model = looped(exit_threshold=0.12)
    plain = model.generate(tokens(), **GREEDY)
    with model.counted(every=1) as outer:
        out = model.generate(tokens(), return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, plain)
    assert out.spent.tokens == outer.tokens == 2 * (7 + 9)
    assert 1 < out.spent.mean_cycles < 3 and outer.time_saved is not None


def test_importance_is_the_loss_without_a_visit_and_pruning_takes_it_out(tmp_path):
    model = looped(host_overrides={"num_hidden_layers": 5})
    found = visit_importance(model, [tokens(3, 9), tokens(2, 9, seed=1)])
    assert [(v.layer, v.cycle) for v in found.visits] == [v for v in model.schedule if v[0] in (1, 2, 3)]
    assert all(0 < v.zero_attention < 1 for v in found.visits) and -1 <= found.rank_correlation <= 1
    pruned = skip_visits(model, found.least(2))
    assert pruned.config.num_hidden_layers == 9 and len(model.schedule) == 11
    with torch.no_grad():
        loss = float(pruned(tokens(3, 9), labels=tokens(3, 9)).loss)
        one = skip_visits(model, [(2, 1)])
        one_loss = sum(float(one(x, labels=x).loss) * len(x) / 5 for x in (tokens(3, 9), tokens(2, 9, seed=1)))
        assert one_loss - found.loss == pytest.approx(
            next(v.loss_increase for v in found.visits if (v.layer, v.cycle) == (2, 1)), abs=1e-5
        )
        for threshold in (None, 0.12):
            pruned.config.exit_threshold = threshold
            got = decode(pruned, tokens(3, 9), prefill=3)[0]
            torch.testing.assert_close(got, pruned(tokens(3, 9), use_cache=False).logits, atol=1e-4, rtol=0)
        pruned.config.exit_threshold = None
        pruned.save_pretrained(tmp_path)
        assert float(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(3, 9), labels=tokens(3, 9)).loss) == loss
    by_zero = found.least(1, by="zero_attention")[0]
    most = max((v for v in found.visits if v.cycle), key=lambda v: v.zero_attention)
    assert by_zero == (most.layer, most.cycle)
    with pytest.raises(RecipeError, match="only"):
        found.least(9)


@pytest.mark.parametrize("skip", [[[0, 1]], [[1, 1], [2, 1]]])
def test_visits_that_cannot_be_left_out_are_named(skip):
    with pytest.raises(RecipeError, match="skip"):
        looped(skip=skip)


def test_a_fitted_gate_tells_which_predictions_stay(tmp_path):
    model = looped()
    batches = [tokens(8, 12, seed=i) for i in range(6)]
    stays = fit_exit_gate(model, batches)
    assert set(stays) == {1, 2} and all(0 < share < 1 for share in stays.values())
    model.config.exit_criterion = "gate"
    curve = exit_curve(model, batches[:2], candidates=4)
    assert curve[0].mean_cycles == 3 and curve[-1].mean_cycles == 1 and curve[-1].visits == 4
    with torch.no_grad():
        out = model(batches[0], exit_threshold=1.0, use_cache=False)
        after = model(batches[0], n_cycles=1, use_cache=False).logits.argmax(-1)
        right = after == out.logits.argmax(-1)
    score = out.exit_scores[0]
    assert score[right].mean() > score[~right].mean()
    threshold, *_ = calibrate_threshold(model, batches[:2], max_loss_increase=0.2, candidates=4)
    model.config.exit_threshold = threshold
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(batches[0]).cycles, model(batches[0]).cycles)
    with pytest.raises(UnsupportedError, match="fit_exit_gate"):
        looped(exit_criterion="gate", exit_threshold=0.5)(tokens())


def test_what_runs_and_trains_a_model_is_not_in_its_configuration(tmp_path, caplog):
    import json

    from transformers.utils import logging

    run = {"exit_threshold": 0.12, "exit_scope": "prefix", "min_cycles": 2, "exit_criterion": "latent"}
    train = {
        "train_cycles": "random",
        "cycle_onset": 0.1,
        "cycle_loss_weights": [0.1, 0.2, 0.7],
        "route": "lse",
        "seed": 4,
    }
    model = looped(**run, **train)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not written.keys() & {*run, *train, "exit_score"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in run} == run
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.config.train_cycles == "fixed" and "draws" not in again.zero_token._buffers
    other = AutoModelForCausalLM.from_pretrained(tmp_path, exit_threshold=None, train_cycles="random")
    assert (
        other.config.exit_threshold is None
        and other.config.exit_scope == "prefix"
        and "draws" in other.zero_token._buffers
    )
    # A checkpoint of an older version has all in one file, and a note says where it goes.
    (tmp_path / "config.json").write_text(json.dumps(written | run | train))
    (tmp_path / "generation_config.json").unlink()
    logging.get_logger("modicum.models.zero_token.config").warning_once.cache_clear()
    logging.get_logger("modicum").propagate = True
    with caplog.at_level("WARNING"):
        old = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "generation_config.json" in caplog.text
    assert old.config.train_cycles == "random" and torch.equal(old(tokens()).logits, model(tokens()).logits)


def test_packing_is_left_alone_where_few_have_left():
    assert some.those_running(None) is None
    assert some.those_running(torch.ones(2, 10, dtype=torch.bool)) is None
    active = torch.ones(4, 10, dtype=torch.bool)
    active[0] = False
    assert some.those_running(active).places is None
    active[:, 3:] = False
    assert some.those_running(active).places.shape == (3, 3)
    for rows, running, packs in ((8, 2, False), (8, 1, True), (16, 9, False), (16, 8, True)):
        assert (some.those_running(torch.arange(rows)[:, None] < running) is not None) is packs


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "kl"])
def test_a_classifier_of_sequences_does_not_leave_by_its_prediction(criterion):
    model = AutoModelForSequenceClassification.from_config(looped().config).eval()
    with pytest.raises(UnsupportedError, match="Use another exit_criterion"):
        model(tokens(), exit_threshold=0.5, exit_criterion=criterion)


def test_the_clock_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append(1))
    model = types.SimpleNamespace(device=torch.device("cuda"), training=False)
    call = types.SimpleNamespace(trace=types.SimpleNamespace(cycles=None, run=None))
    with counted():
        counting(model, lambda _: None, {"input_ids": tokens()}, call)
    assert len(waited) == 2
