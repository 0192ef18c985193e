import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.errors import RecipeError
from modicum.evaluate.logistic import auroc, fit
from modicum.evaluate.representation import (
    centroid_gap,
    distance_of_error,
    first_token_predictability,
    fit_pca,
    hidden_states,
    probe_transfer,
    project,
    proxy_a_distance,
)
from oracles import safety as oracle


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def rotation(d, seed=9):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def test_distances_of_errors():
    assert [distance_of_error(e) for e in (0, 0.1, 0.25, 0.5, 0.6)] == pytest.approx([2, 1.6, 1, 0, 0])
    with pytest.raises(ValueError):
        distance_of_error(1.2)


@pytest.mark.parametrize("seed", range(5))
def test_two_halves_are_near_and_two_clouds_far(seed):
    h = normal(400, 8, seed=seed)
    assert 0 <= proxy_a_distance(h[:200], h[200:], generator=rng(seed)) < 6 / 200**0.5
    assert proxy_a_distance(h[:200], h[200:] + 20, generator=rng(seed)) == 2


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_distance_and_gap_do_not_depend_on_the_axes(scale, seed):
    a, b, ood = normal(30, 6, seed=seed), normal(30, 6, seed=seed + 50) + 0.8, normal(10, 6, seed=seed + 90) + 0.4
    turn, shift = rotation(6), normal(6, seed=3)
    moved = [(h @ turn) * scale + shift for h in (a, b, ood)]
    before, after = (proxy_a_distance(x, y, generator=rng(1)) for x, y in ((a, b), moved[:2]))
    assert after == pytest.approx(before, abs=1e-6)
    assert centroid_gap(*moved) == pytest.approx(centroid_gap(a, b, ood), rel=1e-6)


def test_the_gap_of_the_numbered_case_and_of_the_oracle():
    harmful, ood = torch.tensor([[2.0, 0], [0, 0], [1, 1], [1, -1]]), torch.tensor([[0.5, 0]])
    assert centroid_gap(harmful, -harmful, ood, ridge=0.0) == pytest.approx(1.414214, abs=1e-6)
    assert centroid_gap(harmful, -harmful, ood) == pytest.approx(1.407195, abs=1e-6)
    a, b, c = normal(20, 5), normal(15, 5, seed=1) + 1, normal(7, 5, seed=2)
    assert centroid_gap(a, b, c) == pytest.approx(oracle.gap(a.numpy(), b.numpy(), c.numpy(), 0.01))
    with pytest.raises(ValueError, match="singular"):
        centroid_gap(normal(2, 9), normal(2, 9, seed=1), normal(7, 9), ridge=0.0)


def test_attacked_prompts_do_not_move_the_known_ones():
    harmful, helpful = normal(20, 7) + 2, normal(20, 7, seed=1)
    pca = fit_pca(harmful, helpful)
    both = torch.cat([harmful, helpful])
    assert torch.allclose(project(both, pca).mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    values = torch.linalg.eigvalsh((both - both.mean(0)).T @ (both - both.mean(0)))[-2:].flip(0)
    assert torch.allclose(project(both, pca).square().sum(0), values)
    assert (project(harmful, pca).mean(0) >= project(helpful, pca).mean(0)).all()
    for bad in (0, 40):
        with pytest.raises(ValueError, match="n_components"):
            fit_pca(harmful, helpful, n_components=bad)


@given(st.integers(0, 20), st.sampled_from([(20, 3), (12, 30)]), st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=20, deadline=None)
def test_the_classifier_is_at_the_minimum(seed, shape, l2):
    x = normal(*shape, seed=seed)
    y = torch.arange(len(x)) % 2 == 0
    probe = fit(x, y, l2=l2)
    signs = torch.where(y, 1.0, -1.0).numpy()
    best = oracle.logistic_loss(x.numpy(), signs, probe.weight.numpy(), probe.bias, l2)
    for step in range(6):
        move = normal(shape[1], seed=step) * 1e-3
        other = oracle.logistic_loss(
            x.numpy(), signs, (probe.weight + move).numpy(), probe.bias + 1e-3 * (step - 3), l2
        )
        assert other >= best - 1e-12


def test_classifiers_of_one_class_or_broken_rows_are_refused():
    x = normal(4, 2)
    for bad in (
        lambda: fit(x, torch.ones(4).bool()),
        lambda: fit(x * torch.nan, torch.tensor([True, False, True, False])),
        lambda: fit(x, torch.tensor([True, False, True, False]), l2=0.0),
        lambda: auroc(x[:, 0], torch.zeros(4).bool()),
        lambda: proxy_a_distance(x, x, folds=5, generator=rng()),
    ):
        with pytest.raises(ValueError):
            bad()


SETS = {  # each function of sets of states, by the number of sets it takes
    "pca": (2, lambda a, b: fit_pca(a, b)),
    "projection": (1, lambda a: project(a, fit_pca(normal(9, 3), normal(9, 3)))),
    "distance": (2, lambda a, b: proxy_a_distance(a, b, generator=rng())),
    "gap": (3, centroid_gap),
    "transfer": (4, probe_transfer),
    "outcomes": (1, lambda a: first_token_predictability(a, torch.arange(9) % 2 == 0, folds=2, generator=rng())),
}
BROKEN = {
    "NaN": normal(9, 3).index_fill(0, torch.tensor(4), torch.nan),
    "infinite": normal(9, 3).index_fill(1, torch.tensor(1), torch.inf),
    "empty": normal(0, 3),
    "of other width": normal(9, 4),
    "flat": normal(9),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", SETS)
def test_states_that_mean_nothing_are_refused_whichever_set_they_are(name, how):
    count, function = SETS[name]
    sound = [normal(9, 3, seed=i) + i for i in range(count)]
    assert function(*sound) is not None
    for place in range(count):
        if how == "of other width" and name == "outcomes":
            continue  # there is no other set
        with pytest.raises(ValueError, match="hidden states"):
            function(*[BROKEN[how] if i == place else h for i, h in enumerate(sound)])


def test_masks_and_outcomes_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match="one for each of 9 rows"):
        first_token_predictability(normal(9, 3), torch.ones(8).bool(), generator=rng())
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="one mask for each"):
        hidden_states(model, ids, torch.ones(2, 3))
    states = [hidden_states(model, ids, torch.ones(2, 4, dtype=kind)) for kind in (torch.long, torch.bool, torch.float)]
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_a_probe_that_knows_the_wrapper_alone_does_not_transfer():
    harm, wrapper = torch.eye(2, dtype=torch.float64) * 4
    noise = [normal(40, 2, seed=i) * 0.1 for i in range(4)]
    good = probe_transfer(noise[0] + harm, noise[1], noise[2] + harm + wrapper, noise[3] + wrapper)
    assert good.auroc == 1 and good.recall == 1 and good.false_alarms == 0
    blind = probe_transfer(noise[0] + wrapper, noise[1], noise[2] + wrapper, noise[3] + wrapper)
    assert blind.auroc < 0.7 and blind.false_alarms > 0.9


def test_outcomes_settled_at_the_first_token_are_foretold():
    h, outcome = normal(60, 5), torch.arange(60) % 2 == 0
    settled = first_token_predictability(h + outcome[:, None] * 9, outcome, generator=rng())
    assert settled.auroc == 1 and settled.balanced_accuracy == 1
    assert abs(first_token_predictability(h, outcome, generator=rng()).auroc - 0.5) < 0.25


def test_a_request_in_several_wrappers_is_held_out_in_all_of_them():
    """States that name the request, and nothing else, foretell its outcome only where it stands in another fold."""
    goals = torch.arange(20).repeat(3)
    h, outcome = torch.eye(20, dtype=torch.float64)[goals], (goals % 2 == 0)
    known = first_token_predictability(h, outcome, generator=rng(), l2=0.01)
    held = first_token_predictability(h, outcome, generator=rng(), l2=0.01, groups=goals.tolist())
    assert known.auroc == 1 and held.auroc < 0.6
    for groups, said in (([0] * 59, "59 groups"), ([0] * 30 + [1] * 30, "2 or fewer")):
        with pytest.raises(RecipeError, match=said):
            first_token_predictability(h, outcome, generator=rng(), groups=groups)


def test_area_under_the_curve_counts_pairs():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, True, False, True])
    pairs = [(a, b) for a in scores[labels] for b in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs).item() / len(pairs))


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_states_do_not_depend_on_company_or_padding(model):
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
    width = max(map(len, prompts))
    alone = torch.cat(
        [hidden_states(model, torch.tensor([p]), torch.ones(1, len(p), dtype=torch.long)) for p in prompts], 1
    )
    assert alone.shape == (4, 3, 32)
    for left in (True, False):
        pads = [[0] * (width - len(p)) for p in prompts]
        ids = torch.tensor([pad + p if left else p + pad for p, pad in zip(prompts, pads)])
        ones = [[1] * len(p) for p in prompts]
        mask = torch.tensor([pad + one if left else one + pad for one, pad in zip(ones, pads)])
        assert (hidden_states(model, ids, mask) - alone).abs().max() < 1e-5
    assert torch.equal(hidden_states(model, ids, mask, layers=[2])[0], hidden_states(model, ids, mask)[2])
    for bad in ({"layers": [9]}, {"position": "somewhere"}):
        with pytest.raises(ValueError):
            hidden_states(model, ids, mask, **bad)
    with pytest.raises(ValueError, match="no token"):
        hidden_states(model, ids, mask * 0)
