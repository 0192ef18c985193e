"""Conflict and rules: the numbered cases of the spec, an independent version, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import ModicumError
from modicum.weights.mediator import build_experts, chance_level, layer_conflict, select_layers, units_of
from oracles import mediator as oracle

T1, T2, T3 = (1.0, -2, 0, 3), (2.0, 1, 5, -1), (-1.0, -2, 4, 1)
A, B = (1.0, -2, 3, 4), (-2.0, -1, 5, -3)


def model(*values, name="w"):
    return {name: torch.tensor(values)}


def d_of(*experts, **knobs):
    base = {"w": torch.zeros(len(experts[0]))}
    return layer_conflict(base, [model(*e) for e in experts], **{"denoise": "none", **knobs})["w"]


@pytest.mark.parametrize(
    ("experts", "knobs", "value"),
    [
        ((T1, T2), {}, 2 / 3),
        ((T1, T3), {}, 1 / 3),
        ((T2, T3), {}, 3 / 4),
        ((T1, T2, T3), {}, 0.583333),
        ((T1, T2), {"weight": "magnitude"}, 2 / 3),
        ((T1, T3), {"weight": "magnitude"}, 1 / 4),
        ((T2, T3), {"weight": "magnitude"}, 3 / 7),
        ((T1, T2, T3), {"weight": "magnitude"}, 0.448413),
        ((T1, T2, T3), {"aggregate": "any"}, 3 / 4),
        ((A, B), {"denoise": "topk", "keep": 0.5}, 0.5),
        ((A, B), {"denoise": "topk", "keep": 1.0}, 0.5),
        ((T1, T2), {"denoise": "topk", "keep": 0.5}, 0.0),
    ],
)
def test_m1_m2_m3_m5_conflicts(experts, knobs, value):
    assert d_of(*experts, **knobs) == pytest.approx(value, abs=1e-6)


def test_m4_counts_are_summed_before_they_are_divided():
    one = {"h.0.a": torch.ones(3), "h.0.b": torch.ones(97)}
    two = {"h.0.a": torch.tensor([-1.0, -1, 1]), "h.0.b": torch.ones(97)}
    base = {name: torch.zeros_like(t) for name, t in one.items()}
    assert layer_conflict(base, [one, two], denoise="none") == {"h.0": 0.02}


@pytest.mark.parametrize(
    ("values", "routed"),
    [((0.2, 0.3, 0.25, 0.7), ["d"]), ((0, 0, 0.9, 1), ["d"]), ((0, 1), []), ((0.1, 0.1, 0.1), []), ((), [])],
)
def test_m6_mean_and_deviation(values, routed):
    assert select_layers(dict(zip("abcd", values))) == routed


@pytest.mark.parametrize(("budget", "routed"), [(12, ["a", "b"]), (11, ["a", "b"]), (10, ["a"])])
def test_m7_a_budget(budget, routed):
    conflict, sizes = dict(zip("abcd", (0.7, 0.3, 0.25, 0.2))), dict(zip("abcd", (10, 1, 5, 1)))
    assert select_layers(conflict, rule="budget_bytes", budget=budget, unit_bytes=sizes) == routed
    with pytest.raises(ModicumError, match="budget is 9 bytes.*Give at least 10"):
        select_layers(conflict, rule="budget_bytes", budget=9, unit_bytes=sizes)
    with pytest.raises(ModicumError, match="budget is 9 bytes.*Give at least 10"):  # alike or not
        select_layers(dict.fromkeys("abcd", 0.5), rule="budget_bytes", budget=9, unit_bytes=sizes)


SIZES = st.integers(1, 30)
KNOBS = st.fixed_dictionaries(
    {"aggregate": st.sampled_from(["pairwise_mean", "any"]), "weight": st.sampled_from(["count", "magnitude"])}
)


def drawn(data, n, sizes, base=True):
    seed = data.draw(st.integers(0, 999))
    rng = torch.Generator().manual_seed(seed)
    # Few different numbers, so that zeros and equal magnitudes occur.
    made = [
        {f"h.{i}.w": torch.randint(-3, 4, (s,), generator=rng).float() for i, s in enumerate(sizes)} for _ in range(n)
    ]
    return {k: torch.randint(-3, 4, t.shape, generator=rng).float() for k, t in made[0].items()}, made


@given(data=st.data(), n=st.integers(2, 4), size=SIZES, keep=st.sampled_from([None, 0.2, 0.5, 1.0]), knobs=KNOBS)
def test_conflict_is_the_oracle_s(data, n, size, keep, knobs):
    base, experts = drawn(data, n, [size, 3])
    denoise = {"denoise": "none"} if keep is None else {"keep": keep}
    got = layer_conflict(base, experts, **knobs, **denoise)
    for name, value in got.items():
        tensor = f"{name}.w"
        deltas = [(e[tensor] - base[tensor]).double().numpy() for e in experts]
        if keep is not None:
            deltas = [oracle.trimmed(d, max(1, int(keep * d.size))) for d in deltas]
        assert value == pytest.approx(oracle.conflict([[d] for d in deltas], **knobs), abs=1e-6)
        assert 0 <= value <= 1


@given(data=st.data(), knobs=KNOBS, factor=st.sampled_from([0.25, 8.0]))
def test_conflict_knows_neither_order_nor_scale(data, knobs, factor):
    base, experts = drawn(data, 3, [9, 5])
    base = {name: torch.zeros_like(t) for name, t in base.items()}
    first = layer_conflict(base, experts, **knobs)
    turned = layer_conflict(dict(reversed(base.items())), experts[::-1], **knobs)
    assert turned == pytest.approx(first)
    if knobs["weight"] == "count":
        scaled = [{k: t * factor for k, t in experts[0].items()}, *experts[1:]]
        assert layer_conflict(base, scaled, **knobs) == pytest.approx(first)


def test_extreme_conflicts():
    assert d_of(T1, T1) == 0 and d_of(T1, tuple(-x for x in T1)) == 1
    assert d_of((1.0, 0, 0, 2), (0.0, 1, 1, 0)) == 0


def test_independent_signs_are_at_the_chance_level():
    rng = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(40_000)}
    experts = [{"w": torch.randn(40_000, generator=rng)} for _ in range(3)]
    for aggregate in ("pairwise_mean", "any"):
        for denoise in ("none", "topk"):
            got = layer_conflict(base, experts, aggregate=aggregate, denoise=denoise)["w"]
            assert got == pytest.approx(chance_level(3, aggregate=aggregate, denoise=denoise), abs=0.03)


def test_only_the_layer_of_turned_signs_is_routed():
    rng = torch.Generator().manual_seed(1)
    one = {f"h.{i}.w": torch.randn(64, generator=rng) for i in range(4)}
    two = {name: -t if name == "h.2.w" else t for name, t in one.items()}
    base = {name: torch.zeros_like(t) for name, t in one.items()}
    assert select_layers(layer_conflict(base, [one, two])) == ["h.2"]


def test_a_threshold_over_a_whole_layer_keeps_the_larger_tensor():
    one = {"h.0.a": torch.full((10,), 9.0), "h.0.b": torch.full((10,), 1.0)}
    two = {"h.0.a": torch.full((10,), 9.0), "h.0.b": torch.full((10,), -1.0)}
    base = {name: torch.zeros(10) for name in one}
    assert layer_conflict(base, [one, two], keep=0.5)["h.0"] == 0.5
    assert layer_conflict(base, [one, two], keep=0.5, scope="unit")["h.0"] == 0.0


def test_units():
    tensors = {
        "model.layers.10.mlp.up.weight": torch.ones(2, 2),
        "model.layers.2.mlp.up.weight": torch.ones(2, 2),
        "model.layers.2.mlp.up.bias": torch.ones(2),
        "model.layers.2.norm.weight": torch.ones(2),
        "model.embed_tokens.weight": torch.ones(2, 2),
    }
    assert list(units_of(tensors)) == ["model.layers.2", "model.layers.10"]
    assert next(iter(units_of(tensors, unit="matrix"))) == "model.layers.2.mlp.up"
    assert len(units_of(tensors, unit="matrix")["model.layers.2.mlp.up"]) == 2


CONFLICT = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), min_size=1)


@given(CONFLICT, st.sampled_from([0.5, 1.0, 2.0]))
def test_mean_std_is_the_oracle_s(conflict, c):
    got = select_layers(conflict, c=c)
    assert set(got) == oracle.mean_std(conflict, c) or max(conflict.values()) - min(conflict.values()) < 1e-9
    assert got == sorted(got, key=lambda n: (-conflict[n], n))


@given(CONFLICT, st.integers(1, 9), st.integers(0, 60), st.integers(0, 10))
def test_a_larger_budget_routes_a_superset(conflict, size, budget, more):
    sizes = {name: size + i % 3 for i, name in enumerate(conflict)}

    def chosen(budget):
        try:
            return select_layers(conflict, rule="budget_bytes", budget=budget, unit_bytes=sizes)
        except ModicumError:
            return []

    assert chosen(budget) == oracle.within(conflict, sizes, budget)
    assert set(chosen(budget)) <= set(chosen(budget + more))


@given(CONFLICT, st.integers(1, 8))
def test_the_controls(conflict, k):
    n = min(k, len(conflict))
    first, least = (select_layers(conflict, rule=rule, k=k) for rule in ("first", "least"))
    assert set(first) == set(list(conflict)[:n])
    assert sorted(conflict[x] for x in least) == sorted(conflict.values())[:n]
    drawn = [tuple(select_layers(conflict, rule="random", k=k, seed=s)) for s in range(12)]
    assert all(len(r) == n for r in drawn) and drawn[0] == tuple(select_layers(conflict, rule="random", k=k))
    assert select_layers(conflict, rule="all") == sorted(conflict, key=lambda name: (-conflict[name], name))
    assert not select_layers(conflict, rule="none")


def test_a_random_rule_takes_every_layer_as_often():
    conflict = {f"h.{i}": 0.1 * i for i in range(5)}
    drawn = [select_layers(conflict, rule="random", k=2, seed=seed) for seed in range(400)]
    counts = [sum(name in found for found in drawn) for name in conflict]
    assert sum(counts) == 800 and all(abs(count - 160) < 5 * (400 * 0.4 * 0.6) ** 0.5 for count in counts)


@pytest.mark.parametrize("rule", ["mean_std", "topk", "quantile", "budget_bytes"])
def test_layers_that_are_alike_are_not_routed(rule):
    knobs = {"k": 2, "budget": 99, "unit_bytes": dict.fromkeys("abc", 1)}
    for d in (0.0, 0.4):
        assert select_layers(dict.fromkeys("abc", d), rule=rule, **knobs) == []
    assert select_layers({"a": 0.5, "b": 0.5, "c": 0.4}, rule="topk", k=2) == ["a", "b"]


def test_every_rule_takes_what_it_says():
    conflict = {f"h.{i}": d for i, d in enumerate((0.1, 0.5, 0.3, 0.45, 0.2))}
    for knobs, want in (
        ({"rule": "topk", "k": 2}, ["h.1", "h.3"]),
        ({"rule": "topk", "k": 0.4}, ["h.1", "h.3"]),
        ({"rule": "topk", "k": 0.01}, ["h.1"]),
        ({"rule": "quantile", "q": 0.5}, ["h.1", "h.3"]),
        ({"rule": "quantile", "q": 1.0}, []),
        ({"rule": "absolute", "threshold": 0.3}, ["h.1", "h.3"]),
        ({"rule": "chance", "chance": 0.5, "c": 0.8}, ["h.1", "h.3"]),
        ({"rule": "chance"}, []),
    ):
        assert select_layers(conflict, **knobs) == want, knobs


def test_denoising_by_deviations_keeps_what_is_far_from_zero():
    one, two = (8.0, 0.1, -0.1, 6.0), (-9.0, 0.1, 0.1, 5.0)
    assert d_of(one, two, denoise="none") == 0.5
    assert d_of(one, two, denoise="sigma", sigma=1.0) == 1.0  # root mean squares of 5.0 and 5.1: one place is left
    assert d_of(one, two, denoise="sigma", sigma=0.9) == 0.5


def test_conflict_and_routes_of_single_matrices_and_parts_of_a_block():
    base = {f"h.0.{p}.weight": torch.zeros(3, 3) for p in ("attn.q", "attn.k", "mlp.up")}
    one = {name: torch.ones(3, 3) for name in base}
    two = {name: -t if name == "h.0.attn.q.weight" else t for name, t in one.items()}
    by_matrix = layer_conflict(base, [one, two], unit="matrix", denoise="none")
    assert by_matrix == {"h.0.attn.k": 0.0, "h.0.attn.q": 1.0, "h.0.mlp.up": 0.0}
    by_part = layer_conflict(base, [one, two], unit="sublayer", denoise="none")
    assert by_part == {"h.0.attn": 0.5, "h.0.mlp": 0.0}
    for unit, routed, held in (("matrix", "h.0.attn.q", 1), ("sublayer", "h.0.attn", 2)):
        built = build_experts(base, [one, two], [routed], unit=unit, sparsifier="sign")
        assert len(built.routed) == held and all(name.startswith(routed) for name in built.routed)
        assert torch.equal(built.state_dict([0, 1])["h.0.attn.q.weight"], two["h.0.attn.q.weight"])


BASE = {"h.0.w": torch.zeros(3, 3)}
ONE = {"h.0.w": torch.ones(3, 3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_conflict(BASE, [ONE]), "experts: got 1, expected at least 2"),
        (lambda: layer_conflict(BASE, [ONE, ONE], keep=0.0), "keep is 0.0"),
        (lambda: layer_conflict(BASE, [ONE, ONE], denoise="sigma", sigma=0), "sigma is 0"),
        (lambda: layer_conflict(BASE, [ONE, ONE], aggregate="mean"), "aggregate 'mean' is not known"),
        (lambda: layer_conflict(BASE, [ONE, {"h.0.w": torch.ones(3, 2)}]), "shape"),
        (lambda: layer_conflict(BASE, [ONE, {"h.0.v": torch.ones(3, 3)}]), "no tensor"),
        (lambda: layer_conflict(BASE, [ONE, {"h.0.w": torch.full((3, 3), float("nan"))}]), "NaN or infinite"),
        (lambda: layer_conflict({"h.0.w.qweight": torch.ones(2)}, [{"h.0.w.qweight": torch.ones(2)}] * 2), "quantised"),
        (lambda: select_layers({"a": float("nan")}), "conflict of 'a'"),
        (lambda: select_layers({"a": 0.5}, rule="topk"), "needs k"),
        (lambda: select_layers({"a": 0.5}, rule="budget_bytes"), "needs budget"),
        (lambda: select_layers({"a": 0.5}, rule="quantile", q=2), "q is 2"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ModicumError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


def test_parameters_of_a_model_are_compared_like_tensors():
    base, one, two = ({"w": torch.nn.Parameter(torch.tensor(v))} for v in ((0.0,) * 4, T1, T2))
    assert layer_conflict(base, [one, two], denoise="none")["w"] == pytest.approx(2 / 3)
    assert layer_conflict(base, [one, two], keep=1.0)["w"] == pytest.approx(2 / 3)
