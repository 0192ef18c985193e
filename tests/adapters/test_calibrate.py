"""Gradients and moments of a model's frozen weights: against autograd and a sum by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from modicum.adapters.calibrate import base_weight, input_moments, weight_gradients
from modicum.adapters.layers import factors_of, lora_layers
from modicum.errors import ModicumError
from modicum.jobs.training.adapter import initialize
from modicum.random import generator
from support import tiny_llama


def batches(count=3, vocabulary=264):
    rng = generator(0, "batches")
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, vocabulary, (count, 2, 12), generator=rng)]


def tiny_gpt2(dropout=0.0):
    """A model whose linear layers store their weights as (in, out)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=264,
            n_positions=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
            embd_pdrop=dropout,
        )
        return GPT2LMHeadModel(config).eval()


def gpt2(**options):
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return get_peft_model(tiny_gpt2(**options), config).eval()


def active(model):
    """Give every ``lora_B`` values, so that the adapter changes the model."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            factors_of(layer, "default")[1].fill_(0.1)
    return model


def test_gradients_of_transposed_weights_are_turned():
    base, sample = tiny_gpt2(), batches()
    base.zero_grad()
    for batch in sample:
        (base.train()(**batch).loss / len(sample)).backward()
    for name, gradient in weight_gradients(gpt2(), sample).items():
        torch.testing.assert_close(gradient, base.get_parameter(f"{name}.weight").grad.T, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora", "lora_ga", "corda"])
def test_what_leaves_a_transposed_weight_leaves_the_model_as_it_was(name):
    model, ids = gpt2(), batches(1)[0]["input_ids"]
    initialize(model, name, {}, batches=batches, lr=1e-3)
    torch.testing.assert_close(model.eval()(ids).logits, tiny_gpt2()(ids).logits, atol=1e-5, rtol=1e-4)
    for key, layer in lora_layers(model).items():
        assert base_weight(layer, key).shape == (layer.out_features, layer.in_features)


def test_an_active_adapter_is_off_while_the_base_is_looked_at():
    model, sample = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])), batches()
    gradients, moments = weight_gradients(model, sample), input_moments(model, sample)
    active(model)
    for before, after in ((gradients, weight_gradients(model, sample)), (moments, input_moments(model, sample))):
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not torch.equal(model(sample[0]["input_ids"]).logits, tiny_llama()(sample[0]["input_ids"]).logits)


def test_moments_are_means_over_the_tokens_of_all_batches():
    model, sample = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])), batches()
    # Batches of different lengths: a mean over batches is another number than one over tokens.
    sample[1] = {key: value[:1, :5] for key, value in sample[1].items()}
    seen = {name: [] for name in lora_layers(model)}
    for name in seen:
        module = lora_layers(model)[name].get_base_layer()
        module.register_forward_pre_hook(lambda _, inputs, rows=seen[name]: rows.append(inputs[0].flatten(0, 1)))
    found = input_moments(model, sample)
    for name, rows in seen.items():
        X = torch.cat(rows).double()
        assert len(X) == 24 + 5 + 24
        torch.testing.assert_close(found[name].double(), X.T @ X / len(X), atol=1e-5, rtol=1e-4)


def test_gradients_see_dropout_and_moments_do_not():
    model, sample = gpt2(dropout=0.5), batches()
    without = input_moments(gpt2(), sample)
    assert all(torch.equal(moment, without[name]) for name, moment in input_moments(model, sample).items())
    modes = []
    weight_gradients(model, sample, loss=lambda m, b: modes.append(m.training) or m(**b).loss)
    assert modes == [True] * 3 and not model.training


def test_gradients_that_were_there_are_neither_counted_nor_left():
    model, sample = gpt2(), batches()
    expected = weight_gradients(model, sample)
    for layer in lora_layers(model).values():
        weight = layer.get_base_layer().weight
        weight.requires_grad_(True)
        weight.grad = torch.ones_like(weight)
        weight.requires_grad_(False)
    again = weight_gradients(model, sample)
    assert all(torch.equal(value, again[name]) for name, value in expected.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_to_look_at_is_said():
    model = gpt2()
    for look in (weight_gradients, input_moments):
        with pytest.raises(ModicumError, match="no calibration batches"):
            look(model, [])
    with pytest.raises(ModicumError, match="c_attn was not reached by any calibration batch"):
        weight_gradients(model, batches(1), loss=lambda m, b: m.get_input_embeddings().weight.requires_grad_().sum())
