"""Stores against plain NumPy, and the exact sizes of the spec."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import CheckpointError, RecipeError
from modicum.models.router_fitting import stored_bytes
from modicum.registry import expert_store
from modicum.weights.mediator import ExpertSet, build_experts
from modicum.weights.stores import reader_of, store_bytes
from modicum.weights.stores.random_rescaled import drawn_mask
from oracles import mediator as oracle

SHAPES = ((6,), (5, 12), (2, 4, 6), (70, 33))
LAYOUTS = ("bitmask", "csr", "int32")


def pair(shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def read(name, dense, expert, *, key=5, **knobs):
    store = expert_store[name].function(tuple(dense.shape), **knobs, key=key)
    return reader_of(store.encode(dense, expert), dense.shape, key=key, density=knobs.get("density")).dense().double()


def delta_of(dense, expert):
    return (expert - dense).double().numpy()


@pytest.mark.oracle("expert_stores", "random_rescaled")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, "seed_only"])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_random_rescaled_is_the_oracle_s_in_every_layout(shape, layout, density):
    dense, expert = pair(shape)
    got = read("random_rescaled", dense, expert, density=density, layout=layout, values="f32").numpy()
    want = oracle.random_rescaled(delta_of(dense, expert), key=5, density=density)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.oracle("expert_stores", "magnitude", "magnitude_rescaled")
@pytest.mark.parametrize("name", ["magnitude", "magnitude_rescaled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_magnitude_is_the_oracle_s_in_every_layout(name, shape, layout):
    dense, expert = pair(shape)
    got = read(name, dense, expert, density=0.3, layout=layout, values="f32").numpy()
    want = getattr(oracle, name)(delta_of(dense, expert), density=0.3)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.oracle("expert_stores", "sign")
@pytest.mark.parametrize("shape", SHAPES)
def test_sign_is_the_oracle_s(shape):
    dense, expert = pair(shape)
    got = read("sign", dense, expert).numpy()
    np.testing.assert_allclose(got, oracle.sign(delta_of(dense, expert)), rtol=1e-6)


@pytest.mark.oracle("expert_stores", "low_rank")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_the_oracle_s(shape, rank):
    dense, expert = pair(shape)
    got = read("low_rank", dense, expert, rank=rank).numpy()
    want = oracle.low_rank(delta_of(dense, expert), rank=rank)
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())  # factors are stored in bfloat16


@pytest.mark.oracle("expert_stores", "whole")
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_is_the_difference(shape):
    dense, expert = pair(shape)
    np.testing.assert_allclose(read("whole", dense, expert, values="f32").numpy(), delta_of(dense, expert), rtol=1e-6)


@pytest.mark.oracle("expert_stores", "lora")
def test_lora_is_the_product_of_its_factors():
    a, b = pair((3, 8))[0], pair((5, 3))[1]
    store = expert_store["lora"].function((5, 8)).with_factors(a, b, 0.25)
    got = reader_of(store.encode(a, b), (5, 8)).dense()
    np.testing.assert_allclose(got.numpy(), 0.25 * b.double().numpy() @ a.double().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "values", "size"),
    [
        ("bitmask", "bf16", 287_538),
        ("csr", "bf16", 356_200),
        ("int32", "bf16", 530_838),
        ("seed_only", "bf16", 176_946),
        ("bitmask", "int8", 201_369),
    ],
)
def test_m8_sizes_of_a_matrix_of_smollm2(layout, values, size):
    assert store_bytes((576, 1536), 88_473, layout=layout, values=values) == size


def test_m8_a_sign_store_and_a_magnitude_store():
    assert expert_store["sign"].function((576, 1536)).nbytes == 110_596
    assert expert_store["magnitude"].function((576, 1536), density=0.1).nbytes == 287_538


@pytest.mark.parametrize(("store", "share"), [("magnitude", 0.379), ("sign", 0.30)])
def test_m9_four_experts_of_smollm2_with_all_blocks_routed(store, share):
    d, f, kv = 576, 1536, 192
    matrices = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]
    knobs = {"density": 0.1} if store == "magnitude" else {}
    block = sum(expert_store[store].function(shape, **knobs).nbytes for shape in matrices)
    block += 2 * expert_store["whole"].function((d,)).nbytes
    whole = 2 * (49152 * d + d + 30 * (sum(a * b for a, b in matrices) + 2 * d))
    assert whole == 269_030_016
    # A gate's distances, and the headers that name every part, fit into the megabyte beside.
    router = stored_bytes("linear", experts=4, width=d, rank=8, gate=True)
    parts = len(expert_store[store].function((d, d), **knobs).specs) * len(matrices) + 2
    entry = {"dtype": "BF16", "shape": [10**6], "data_offsets": [10**9, 10**9]}
    header = len(json.dumps({"0.model.layers.10.self_attn.q_proj.weight.values": entry})) * (parts * 4 * 30 + 272)
    assert router + header < 1_000_000
    assert whole + 4 * 30 * block + router + header <= share * 4 * whole + 1_000_000


def test_m16_bitdelta_of_four_numbers():
    got = read("sign", torch.zeros(4), torch.tensor([1.0, -2, 0, 3]))
    assert got.tolist() == [1.5, -1.5, 1.5, 1.5]


def test_of_equal_magnitudes_the_first_are_kept():
    expert = torch.tensor([1.0, -1, 1, 1, 0.5, -1])
    assert read("magnitude", torch.zeros(6), expert, density=0.5).tolist() == [1, -1, 1, 0, 0, 0]
    assert read("magnitude", torch.zeros(6), torch.zeros(6), density=0.5).tolist() == [0.0] * 6


@given(st.integers(0, 2**62), st.sampled_from([0.05, 0.1, 0.5]))
def test_the_share_of_drawn_places_is_the_density(key, density):
    n = 20_000
    share = drawn_mask(key, 0, n, density=density).mean()
    assert abs(share - density) < 5 * (density * (1 - density) / n) ** 0.5


def test_the_mean_over_seeds_is_the_difference():
    dense, expert = pair((64,))
    found = torch.stack([read("random_rescaled", dense, expert, density=0.5, key=k, values="f32") for k in range(600)])
    gap = (found.mean(0) - (expert - dense)).abs()
    assert bool((gap < 5 * (expert - dense).abs() / 600**0.5 + 1e-6).all())


def test_int8_is_off_by_half_a_step_at_most():
    dense, expert = pair((9, 40))
    store = expert_store["magnitude"].function((9, 40), density=0.5, values="int8")
    parts = store.encode(dense, expert)
    exact = read("magnitude", dense, expert, density=0.5, values="f32")
    error = (reader_of(parts, (9, 40)).dense() - exact).abs()
    assert bool((error <= parts["scale"][:, None] / 2 + 1e-6).all())


LARGE = [
    *(("random_rescaled", {"layout": layout}) for layout in (*LAYOUTS, "seed_only")),
    *(("magnitude", {"layout": layout}) for layout in LAYOUTS),
    ("sign", {}),
    ("whole", {}),
]


@pytest.mark.parametrize("shape", [(300, 300), (2, 70_000), (3, 200, 210)])
@pytest.mark.parametrize(("name", "knobs"), LARGE)
def test_a_tensor_of_several_blocks_is_mixed_as_it_stands(shape, name, knobs):
    dense, one = pair(shape)
    other = pair(shape, seed=1)[1]
    given = knobs if name == "sign" else {**knobs, "values": "f32"}
    built = build_experts({"w": dense}, [{"w": one}, {"w": other}], ["w"], dense="base", sparsifier=name, **given)

    def stored(t, expert):
        delta = delta_of(dense, expert)
        if name == "random_rescaled":
            return (
                np.where(drawn_mask(built.about.key(t, "w"), 0, delta.size, density=0.1).reshape(shape), delta, 0) / 0.1
            )
        if name == "magnitude":
            kept = np.argsort(-np.abs(delta).ravel(), kind="stable")[: int(0.1 * delta.size)]
            found = np.zeros(delta.size)
            found[kept] = delta.ravel()[kept]
            return found.reshape(shape)
        return oracle.sign(delta) if name == "sign" else delta

    want = dense.double().numpy() + 0.75 * stored(0, one) + 0.25 * stored(1, other)
    np.testing.assert_allclose(built.tensor("w", [0.75, 0.25]).numpy(), want, rtol=1e-4, atol=1e-4)
    low = ExpertSet(built.about, {"w": dense.bfloat16()}, built.parts).tensor("w", [0.75, 0.25])
    gap = want - dense.double().numpy() + dense.bfloat16().double().numpy()
    np.testing.assert_allclose(low.double().numpy(), gap, rtol=0.01, atol=0.01)


def test_places_that_no_seed_gives_back_must_be_stored():
    with pytest.raises(RecipeError, match="seed_only stores no places"):
        expert_store["magnitude"].function((4,), layout="seed_only")


def test_parts_of_no_store_are_refused():
    with pytest.raises(CheckpointError, match="parts delta, more, which no store writes"):
        reader_of({"delta": torch.ones(1), "more": torch.ones(1)}, (1,))


@pytest.mark.parametrize("layout", ["csr", "int32"])
def test_places_that_four_bytes_cannot_count_are_refused(layout):
    shape = (256, 4096, 2048)
    with pytest.raises(RecipeError, match="has 2147483648 entries. Use layout: bitmask"):
        store_bytes(shape, 100, layout=layout)
    assert store_bytes(shape, 100) == 256 * 4096 * 2048 // 8 + 200
