from itertools import combinations

import torch

from modicum.optim.gradient.faults import bad_batch, is_hit, loss_burst_, tensor_noise_


def grads():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(20, 20, generator=g), torch.randn(7, generator=g), torch.randn((), generator=g)]


def test_the_share_of_steps_hit_is_the_probability():
    share = sum(is_hit(0.02, "x", step, seed=0) for step in range(20000)) / 20000
    assert 0.017 < share < 0.023
    assert [is_hit(0.5, "x", s, seed=1) for s in range(20)] != [is_hit(0.5, "x", s, seed=2) for s in range(20)]


def test_noise_hits_one_tensor_a_thousand_times_its_spread_and_the_same_every_time():
    places = set()
    for step in range(40):
        first, second, clean = grads(), grads(), grads()
        place = tensor_noise_(first, step=step, probability=1.0)
        assert place == tensor_noise_(second, step=step, probability=1.0)
        places.add(place)
        assert all(a.equal(b) for a, b in zip(first, second))
        assert [i for i, (a, b) in enumerate(zip(first, clean)) if not a.equal(b)] == [place]
        if place == 0:
            assert 800 < float((first[0] - clean[0]).std() / clean[0].std()) < 1200
    assert places == {0, 1, 2}


def noise(step, seed, size=1.0):
    """The noise of one step in units of the gradient's own deviation."""
    clean = [torch.arange(40.0) * size]
    hit = [clean[0].clone()]
    tensor_noise_(hit, step=step, seed=seed, probability=1.0, scale=10.0)
    return (hit[0] - clean[0]) / clean[0].std(correction=0) / 10


def test_noise_is_another_one_in_every_step_and_for_every_seed_and_grows_with_the_gradient():
    draws = [noise(step, seed) for step, seed in ((0, 0), (1, 0), (0, 1))]
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in combinations(draws, 2))
    assert all(0.6 < float(draw.std()) < 1.4 for draw in draws)
    torch.testing.assert_close(noise(0, 0, size=1000.0), draws[0], atol=1e-4, rtol=1e-3)


def test_the_tensor_that_is_hit_follows_the_seed():
    places = [[tensor_noise_(grads(), step=step, seed=seed, probability=1.0) for step in range(20)] for seed in (0, 1)]
    assert places[0] != places[1]


def test_events_of_other_names_happen_in_other_steps():
    hits = [[is_hit(0.5, name, step, seed=0) for step in range(40)] for name in ("tensor_noise", "loss_burst")]
    assert hits[0] != hits[1]


def test_a_bad_batch_is_another_one_in_every_step_and_for_every_seed():
    ids = torch.zeros(2, 32, dtype=torch.long)
    made = [bad_batch(ids, vocabulary=50, step=t, seed=s, probability=1.0) for t, s in ((0, 0), (1, 0), (0, 1))]
    assert not any(torch.equal(a, b) for a, b in combinations(made, 2))


def test_without_a_hit_nothing_changes():
    before, after = grads(), grads()
    assert tensor_noise_(after, step=0, probability=0.0) is None
    assert not loss_burst_(after, step=0, probability=0.0)
    assert all(a.equal(b) for a, b in zip(before, after))


def test_a_burst_scales_everything():
    scaled = grads()
    assert loss_burst_(scaled, step=5, probability=1.0, scale=7.0)
    assert all(a.equal(b * 7) for a, b in zip(scaled, grads()))


def test_a_bad_batch_keeps_shape_and_type_and_loses_the_text():
    ids = torch.zeros(4, 64, dtype=torch.int32)
    bad = bad_batch(ids, vocabulary=50, step=1, probability=1.0)
    assert bad.shape == ids.shape and bad.dtype == ids.dtype
    assert int(bad.min()) >= 0 and int(bad.max()) < 50 and len(bad.unique()) > 40
    assert (ids == 0).all()
