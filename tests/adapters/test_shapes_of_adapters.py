"""Changing an adapter's shape: ranks, squeezing, serving, cores, angles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from modicum.adapters.angles import captured, principal_angles
from modicum.adapters.core import Framed, fold, train_core
from modicum.adapters.layers import factors_of, lora_layers
from modicum.adapters.ranks import redistribute
from modicum.adapters.serving import alpha_for, uniform, without_shift
from modicum.adapters.squeeze import rank_schedule, squeeze
from modicum.errors import ModicumError
from modicum.random import generator
from support import tiny_llama

spectra = st.lists(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6).map(lambda values: sorted(values, reverse=True)),
    min_size=1,
    max_size=5,
)


@given(spectra, st.data())
def test_shared_out_ranks_fill_the_budget_and_never_pass_over_a_larger_share(values, data):
    named = {str(index): torch.tensor(S) for index, S in enumerate(values)}
    budget = data.draw(st.integers(len(values), sum(map(len, values))))
    ranks = redistribute(named, budget=budget)
    assert sum(ranks.values()) == budget and min(ranks.values()) >= 1
    shares = {name: (S.double() ** 2 / (S.double() ** 2).sum()).tolist() for name, S in named.items()}
    kept = [shares[name][rank - 1] for name, rank in ranks.items() if rank > 1]
    dropped = [shares[name][rank] for name, rank in ranks.items() if rank < len(shares[name])]
    assert not kept or not dropped or min(kept) >= max(dropped) - 1e-12


def test_a_budget_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ModicumError, match="Cannot share 1 ranks"):
        redistribute({"a": torch.ones(2), "b": torch.ones(2)}, budget=1)
    with pytest.raises(ModicumError, match="Cannot share 5 ranks"):
        redistribute({"a": torch.ones(2), "b": torch.ones(2)}, budget=5)


def trained(rank=8, seed=0, **fields):
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **fields)
    model = get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for factor in factors_of(layer, "default"):
                factor.copy_(0.1 * torch.randn(factor.shape, generator=generator(seed, name, *factor.shape)))
    return model


IDS = torch.arange(3, 23)[None]


@pytest.mark.parametrize("rslora", [False, True])
def test_squeezing_keeps_the_best_part_and_a_low_rank_change_whole(rslora, tmp_path):
    model = trained(use_rslora=rslora)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight[:, 3:] = 0
    expected = model(IDS).logits
    squeeze(model, 3)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    alpha = 16 / 8**0.5 * 3**0.5 if rslora else 6
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (3, {}, {})
    assert config.lora_alpha == pytest.approx(alpha)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-6 if rslora else 0, rtol=0)
    assert {layer.r["default"] for layer in lora_layers(loaded).values()} == {3}
    with pytest.raises(ModicumError, match="cannot squeeze it to 5"):
        squeeze(model, 5)


def test_a_schedule_falls_to_its_end_by_half_of_the_run():
    schedule = rank_schedule(100, 8, steps=200, stages=5)
    assert list(schedule.values()) == sorted(schedule.values(), reverse=True)
    assert schedule[100] == 8 and max(schedule) == 100
    with pytest.raises(ModicumError, match="from 4 to 8"):
        rank_schedule(4, 8, steps=10)
    with pytest.raises(ModicumError, match="do not fit"):
        rank_schedule(8, 4, steps=4, stages=4)


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 8)), min_size=1, max_size=4), st.floats(0.1, 4))
def test_serving_form_has_one_rank_and_the_same_changes(modules, scaling):
    rng = generator(0, "serve")
    adapter = {
        str(index): (torch.randn(rank, 6, generator=rng), torch.randn(5, rank, generator=rng), own)
        for index, (rank, own) in enumerate(modules)
    }
    made = uniform(adapter, scaling=scaling)
    assert {A.shape[0] for A, _ in made.values()} == {max(rank for rank, _ in modules)}
    for name, (A, B, own) in adapter.items():
        torch.testing.assert_close(scaling * made[name][1] @ made[name][0], own * B @ A, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_is_not_finite_or_empty_cannot_be_served():
    with pytest.raises(ModicumError, match="m: its change would not survive"):
        uniform({"m": (torch.full((1, 2), torch.nan), torch.ones(2, 1), 1.0)})
    with pytest.raises(ModicumError, match="changes no module"):
        uniform({})


def test_a_shift_is_taken_out_at_twice_the_rank():
    rng = generator(0, "shift")
    trained_pair, initial = ((torch.randn(3, 6, generator=rng), torch.randn(5, 3, generator=rng)) for _ in range(2))
    A, B = without_shift(trained_pair, initial)
    assert A.shape == (6, 6)
    torch.testing.assert_close(B @ A, trained_pair[1] @ trained_pair[0] - initial[1] @ initial[0])
    assert alpha_for(2.0, 6) == 12.0 and alpha_for(2.0, 9, rslora=True) == 6.0


def test_a_core_trains_alone_and_folds_into_plain_lora(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    frames = {
        name: torch.linalg.qr(torch.randn(layer.out_features, 2, generator=generator(0, name))).Q
        for name, layer in lora_layers(model).items()
    }
    train_core(model, frames)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [p.shape for p in trainable] == [(2, 2)] * 2 and not any(p.any() for p in trainable)
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    expected = model(IDS).logits
    fold(model)
    assert torch.equal(model(IDS).logits, expected)
    for name, layer in lora_layers(model).items():
        B = layer.lora_B["default"].weight.detach()
        assert B.any() and float(1 - captured(B.T, frames[name].T)) < 1e-6
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, expected)


def test_the_core_of_a_weight_is_found_again():
    frame = torch.randn(7, 3, generator=generator(0, "frame"))
    core = torch.randn(3, 3, generator=generator(0, "core"))
    framed = Framed(frame)
    torch.testing.assert_close(framed(core), frame @ core)
    torch.testing.assert_close(framed.right_inverse(framed(core)), core, atol=1e-4, rtol=1e-4)


def test_angles_are_those_of_the_planes():
    turn = 0.3
    X = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    Y = torch.tensor([[1.0, 0, 0], [0, math.cos(turn), math.sin(turn)]]) * 5
    assert principal_angles(X, Y).tolist() == pytest.approx([0, turn], abs=1e-6)
    assert float(captured(torch.eye(3), Y)) == pytest.approx(2 / 3)
