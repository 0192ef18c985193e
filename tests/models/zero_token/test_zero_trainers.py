"""Looped models under the stock Trainer and its kin: evaluation, resuming, decay, checkpointing, generation."""

import pytest
import torch
from transformers import GenerationConfig

from models.zero_token.support_zero import decode, looped, tokens
from models.zero_token.test_zero_seams import trainer_of
from modicum.errors import RecipeError, UnsupportedError
from modicum.models import TrainingStep, parameter_groups


@pytest.mark.parametrize("grow", [False, True])
def test_random_and_growing_cycles_resume_exactly_under_the_stock_trainer(grow, tmp_path):
    knobs = {"train_cycles": "grow", "cycle_onset": 0.2} if grow else {"train_cycles": "random"}
    extra = [TrainingStep()] if grow else []

    def trained(folder, **resume):
        model = looped(**knobs)
        trainer = trainer_of(model, folder, max_steps=6, save_steps=3, gradient_accumulation_steps=2)
        for callback in extra:
            trainer.add_callback(callback)
        trainer.train(**resume)
        return model

    whole = trained(tmp_path / "whole")
    again = trained(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


def test_growing_cycles_without_the_step_say_what_to_do():
    with pytest.raises(RecipeError, match="TrainingStep"):
        looped(train_cycles="grow").train()(tokens(1, 2))


def test_no_trainer_decays_what_looping_added(tmp_path):
    model = looped(cycle_gate="rezero", cycle_embedding="add", zero_bias=True, lora_rank=2)
    added = {name for name, _ in model.named_parameters() if name.startswith("zero_token.")}
    assert model.no_weight_decay() == added and len(added) > 4
    assert not added & set(trainer_of(model, tmp_path).get_decay_parameter_names(model))
    decays, rest = parameter_groups(model, weight_decay=0.1)
    pool = {id(p) for p in model.zero_token.parameters()}
    assert pool <= {id(p) for p in rest["params"]} and rest["weight_decay"] == 0 and decays["weight_decay"] == 0.1
    assert len(decays["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_the_trainer_evaluates_and_predicts_with_metrics(tmp_path):
    trainer = trainer_of(looped(exit_threshold=0.2), tmp_path)
    trainer.compute_metrics = lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    assert trainer.evaluate(trainer.train_dataset)["eval_right"] >= 0
    assert trainer.predict(trainer.train_dataset).predictions.shape == (16, 12, 40)


def _with_reentrant(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)


@pytest.mark.parametrize("knobs", [{}, {"lora_rank": 2, "ffn_gate": "zero_attention"}, {"train_cycles": "random"}])
def test_custom_checkpoint_functions_change_no_gradient(knobs):
    model, gradients = looped(**knobs).train(), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_training_step(3)
        if checkpointing:
            model.gradient_checkpointing_enable()
            for layer in model.layers:
                layer._gradient_checkpointing_func = _with_reentrant
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("knobs", [{"cache_policy": "share_first"}, {}])
def test_reentrant_checkpointing_is_refused_where_it_would_lose_a_gradient(knobs):
    model = looped(**knobs).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    call = {} if knobs else {"exit_threshold": 0.1}
    with pytest.raises(UnsupportedError, match="use_reentrant"):
        model(tokens(), labels=tokens(), **call)


def test_a_calibrated_threshold_is_off_in_training():
    model = looped(exit_threshold=-1.0)
    assert model(tokens()).layer_calls == 4
    assert model.train()(tokens()).layer_calls == 8
    assert model(tokens(), exit_threshold=-1.0).layer_calls == 4


def test_the_default_scope_is_causal_and_rows_do_not_depend_on_each_other():
    model = looped(exit_threshold=0.12)
    ids = tokens(3, 9)
    out = model(ids, use_cache=False)
    assert model.config.exit_scope == "token" and 1 < out.cycles.float().mean() < 3
    for row in range(3):
        alone = model(ids[row : row + 1], use_cache=False)
        torch.testing.assert_close(alone.logits, out.logits[row : row + 1], atol=1e-4, rtol=0)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded, use_cache=False).logits[:, :9], out.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", ["latest", "share_first"])
@pytest.mark.parametrize("prefill", [0, 3])
def test_rows_that_leave_are_not_computed_any_more(policy, prefill):
    model, ran = looped(cache_policy=policy), []
    depths, ids = torch.tensor([1, 3, 2, 1]), tokens(4, 6)
    hook = model.layers[1].register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    logits, cycles, _ = decode(model, ids, prefill=prefill, n_cycles=depths)
    hook.remove()
    # Of four single tokens, two cost as much as four: a linear map reads its weights whatever their number.
    assert ran == ([4, 2, 1] if prefill else []) + [4, 4, 1] * (6 - prefill)
    for row, depth in enumerate(depths.tolist()):
        alone, _, _ = decode(model, ids[row : row + 1], prefill=prefill, n_cycles=depth)
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=0)
        assert (cycles[row] == depth).all()
    out = model(ids, n_cycles=depths, use_cache=False, output_zero_attention=True)
    assert all(p0.shape == (4, 4, 6) for p0 in out.zero_attention.values())


def test_a_scope_that_reads_the_future_says_so(caplog):
    from transformers.utils import logging

    logging.get_logger("modicum.models.zero_token.body").warning_once.cache_clear()
    logging.get_logger("modicum").propagate = True
    with caplog.at_level("WARNING"):
        looped(exit_threshold=0.1)(tokens())
        assert "exit_scope" not in caplog.text
        looped(exit_threshold=0.1, exit_scope="sequence")(tokens())
    assert "no likelihood" in caplog.text


def test_use_cache_survives_saving(tmp_path):
    model = looped()
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.use_cache is False and again(tokens()).cache is None


@pytest.mark.parametrize("knobs", [{"exit_threshold": -1.0}, {"n_cycles": 1}])
def test_a_generation_config_may_hold_exits(knobs, tmp_path):
    model = looped()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(tokens(), **settings)
    want = model.generate(tokens(), **settings, **knobs)
    assert not torch.equal(plain, want)
    assert torch.equal(model.generate(tokens(), generation_config=GenerationConfig(**settings, **knobs)), want)
    model.generation_config = GenerationConfig(**settings, **knobs)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).generate(tokens()), want)


def test_what_generation_cannot_do_is_refused_by_name():
    model = looped(exit_threshold=0.1)
    for knobs, name in (
        ({"exit_scope": "sequence"}, "exit_scope"),
        ({"exit_threshold": 0.1, "exit_scope": "batch"}, "exit_scope"),
    ):
        with pytest.raises(UnsupportedError, match=name):
            model.generate(tokens(), max_new_tokens=2, pad_token_id=0, **knobs)
    with pytest.raises(RecipeError, match="assistant_early_exit"):
        looped().generate(tokens(1), max_new_tokens=2, pad_token_id=0, assistant_early_exit=3)
    with pytest.raises(UnsupportedError, match="Continuous batching"):
        model.generate_batch([[3, 4]])


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_a_cache_that_leaves_a_device_is_refused_where_there_is_none(kind):
    with pytest.raises(UnsupportedError, match="An offloaded cache waits for a CUDA device, and the model is on cpu"):
        looped().generate(tokens(), max_new_tokens=2, pad_token_id=0, cache_implementation=kind)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_full"])
def test_growing_caches_of_other_kinds_are_right(kind):
    model = looped("mistral")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(tokens(), **settings, use_cache=False)
    try:
        got = model.generate(tokens(), **settings, cache_implementation=kind)
    except (UnsupportedError, ValueError):
        return
    assert torch.equal(got, want)
