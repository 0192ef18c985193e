"""Configurations that are refused, and numbers of cycles in training."""

import pytest
import torch
from test_zero_token import full
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

from models.zero_token.support_zero import base_model, looped, tokens
from modicum.errors import ModicumError, RecipeError, UnsupportedError
from modicum.models import ZeroTokenConfig


def test_foreign_caches_are_refused():
    model = looped()
    physical = DynamicCache(config=base_model().config)
    with pytest.raises(UnsupportedError, match="physical"):
        model(tokens(), cache=physical)
    assert model(tokens(), cache=DynamicCache()).cache.get_seq_length() == 7


@pytest.mark.parametrize("cycles", [0, 4, True, torch.full((2, 5), 2), torch.tensor([1, 4])])
def test_impossible_numbers_of_cycles_are_refused_in_one_line(cycles):
    with pytest.raises(ModicumError, match="n_cycles") as refusal:
        looped()(tokens(), n_cycles=cycles)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "knobs",
    [
        {"n_cycles": 0},
        {"n_head": 2, "n_tail": 2},
        {"n_head": 3, "n_tail": 2},
        {"order": [0, 9]},
        {"order": "back"},
        {"exit_threshold": float("nan")},
        {"min_cycles": 4},
        {"min_cycles": 0},
        {"pool": "both"},
        {"exit_scope": "everyone"},
        {"cache_policy": "skip"},
        {"cycle_loss_weights": [1.0]},
        {"ffn_gate": "zero_attention", "zero_token": False},
        {"order": "sequence", "exit_threshold": 0.1},
        {"lora_rank": -1},
        {"lora_rank": 1.5},
        {"n_head": "auto"},
        {"n_tail": 1.0},
        {"min_cycles": 1.5},
        {"exit_threshold": "0.1"},
        {"zero_key_init_std": float("nan")},
        {"zero_key_init_std": -1.0},
        {"zero_token": "yes"},
        {"skip": [1]},
        {"cycle_loss_weights": ["a", 1.0, 1.0]},
    ],
)
def test_contradictory_configurations_are_refused(knobs):
    with pytest.raises(ModicumError):
        looped(**knobs)


@pytest.mark.parametrize(("name", "value"), [("n_cycles", 4), ("zero_token", False), ("skip", [(1, 1)])])
def test_a_configuration_that_is_changed_too_late_is_refused_and_not_saved(name, value, tmp_path):
    model = looped()
    setattr(model.config, name, value)
    with pytest.raises(ModicumError, match=f"config.{name} was set"):
        model(tokens(), use_cache=False)
    with pytest.raises(ModicumError, match=f"config.{name} was set"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_hosts_and_backends_are_refused():
    with pytest.raises(UnsupportedError, match="gpt2"):
        ZeroTokenConfig(host={"model_type": "bert"})
    with pytest.raises((ValueError, ImportError)):
        looped().set_attn_implementation("flash_attention_2")


def test_random_cycles_depend_on_the_step_alone():
    model = looped(train_cycles="random").train()
    drawn = []
    for _ in range(2):
        drawn.append([])
        for step in range(20):
            model.set_training_step(step)
            drawn[-1].append(int(model(tokens(1, 2)).cycles[0, 0]))
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {1, 2, 3}
    assert int(model.eval()(tokens()).cycles[0, 0]) == 3


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"train_cycles": "grow"}, [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
        ({"cycle_onset": 0.3}, [1, 1, 1, 3, 3, 3, 3, 3, 3, 3]),
        ({"train_cycles": "grow", "cycle_onset": 0.35}, [1, 1, 1, 1, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_cycles_join_in_the_course_of_training(knobs, expected):
    model = looped(**knobs).train()
    with pytest.raises(RecipeError, match=r"Call model.set_training_step\(step, total\)"):
        model(tokens(1, 2))
    ran = []
    for step in range(10):
        model.set_training_step(step, 10)
        ran.append(int(model(tokens(1, 2)).cycles[0, 0]))
    assert ran == expected
    assert int(model.eval()(tokens(1, 2)).cycles[0, 0]) == 3


def test_an_onset_that_is_no_share_of_the_training_is_refused():
    with pytest.raises(RecipeError, match="cycle_onset is 1.0"):
        looped(cycle_onset=1.0)


def test_parameters_of_cycles_not_drawn_still_have_a_gradient():
    model = looped(train_cycles="random").train()
    model.set_training_step(next(s for s in range(50) if model.set_training_step(s) or model._drawn_cycles() == 1))
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert int(out.cycles[0, 0]) == 1
    assert torch.equal(model.zero_token.zero_key.grad[2:], torch.zeros(4, 2, 4))


def test_losses_after_each_cycle_add_up():
    model = looped(cycle_loss_weights=[0.2, 0.3, 0.5]).train()
    loss = model(tokens(), labels=tokens()).loss
    model.eval()
    terms = [model(tokens(), labels=tokens(), n_cycles=c).loss for c in (1, 2, 3)]
    torch.testing.assert_close(loss, 0.2 * terms[0] + 0.3 * terms[1] + 0.5 * terms[2])


def test_gpt2_draws_residual_outputs_for_the_logical_depth():
    deep, flat = looped("gpt2", n_cycles=8), looped("gpt2", n_cycles=1)
    ratio = deep.layers[1].mlp.c_proj.weight.std() / flat.layers[1].mlp.c_proj.weight.std()
    torch.testing.assert_close(ratio.item(), (4 / 18) ** 0.5, atol=1e-4, rtol=0)


def test_logits_to_keep_and_tuples():
    model = looped()
    all_logits = full(model, tokens())
    torch.testing.assert_close(full(model, tokens(), logits_to_keep=1), all_logits[:, -1:])
    as_tuple = model(tokens(), return_dict=False, use_cache=False)
    assert torch.equal(as_tuple[0], all_logits)


def test_resized_embeddings_survive_saving(tmp_path):
    model = looped("llama-tied-bias")
    model.resize_token_embeddings(48)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape[0] == 48


@pytest.mark.parametrize(
    "call",
    [
        {"exit_threshold": float("nan")},
        {"exit_threshold": "high"},
        {"exit_threshold": 0.1, "min_cycles": 0},
        {"exit_threshold": 0.1, "min_cycles": 99},
        {"exit_threshold": 0.1, "min_cycles": 1.5},
        {"n_cycles": torch.tensor([0, 9])},
        {"n_cycles": torch.tensor([1.5, 2.7])},
        {"n_cycles": torch.tensor([1, 2, 3])},
        {"n_cycles": 2.7},
        {"n_cycles": [1, 2]},
    ],
)
def test_calls_are_held_to_what_a_configuration_is_held_to(call):
    with pytest.raises(RecipeError, match=r"n_cycles is|min_cycles is|exit_threshold is"):
        looped()(tokens(), **call)


def test_a_step_of_fewer_cycles_has_the_weights_of_all():
    model = looped(cycle_loss_weights=[0.2, 0.3, 0.5]).train()
    loss = model(tokens(), labels=tokens(), n_cycles=2).loss
    model.eval()
    terms = [model(tokens(), labels=tokens(), n_cycles=c).loss for c in (1, 2)]
    torch.testing.assert_close(loss, 0.4 * terms[0] + 0.6 * terms[1])


def test_weights_that_leave_a_step_without_a_loss_are_refused():
    with pytest.raises(RecipeError, match="would have no loss"):
        looped(cycle_loss_weights=[0.0, 0.5, 0.5], train_cycles="random")
    with pytest.raises(RecipeError, match="without a loss"):
        looped(cycle_loss_weights=[0.0, 0.5, 0.5]).train()(tokens(), labels=tokens(), n_cycles=1)


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_losses_after_each_cycle_are_those_of_every_head(kind):
    auto = AutoModelForSequenceClassification if kind == "sequence" else AutoModelForTokenClassification
    model = auto.from_config(looped(cycle_loss_weights=[0.2, 0.3, 0.5]).config)
    ids = tokens()
    ids[0, -2:] = 0  # padding on the right
    call = {"input_ids": ids, "labels": torch.ones(ids.shape if kind == "token" else 2, dtype=torch.long)}
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the head of tokens has one
    loss = model(**call).loss
    model.eval()
    terms = [model(**call, n_cycles=c).loss for c in (1, 2, 3)]
    torch.testing.assert_close(loss, 0.2 * terms[0] + 0.3 * terms[1] + 0.5 * terms[2])


def test_losses_and_predictions_between_cycles_ask_no_router():
    model = looped("mixtral", cycle_loss_weights=[0.2, 0.3, 0.5]).train()
    out = model(tokens(), labels=tokens(), output_router_logits=True)
    assert out.loss.isfinite() and out.aux_loss > 0
    leaving = model.eval()(tokens(), output_router_logits=True, exit_threshold=0.0, exit_criterion="confidence")
    assert int(leaving.cycles.max()) == 1


def test_a_model_in_training_generates_with_all_its_cycles():
    model = looped(train_cycles="random")
    knobs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(tokens(), **knobs)
    assert torch.equal(model.train().generate(tokens(), **knobs), want)
    assert torch.equal(looped(train_cycles="grow").train().generate(tokens(), **knobs), want)
