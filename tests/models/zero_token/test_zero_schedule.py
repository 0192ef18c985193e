import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import RecipeError
from modicum.models.zero_token.schedule import cache_slot, cycle_schedule, stages
from oracles import zero_token as oracle


def layers(*args, **kwargs):
    return [layer for layer, _ in cycle_schedule(*args, **kwargs)]


def test_known_schedules():
    assert layers(6, 2) == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert layers(6, 2, n_head=0, n_tail=0) == [*range(6), *range(6)]
    assert layers(6, 1) == layers(6, 1, n_head=0, n_tail=0) == list(range(6))
    assert layers(4, 1, n_head=2, n_tail=2) == list(range(4))
    assert layers(4, 2, order="sequence") == [0, 1, 1, 2, 2, 3]
    assert layers(4, 2, order="cycle_rev") == [0, 1, 2, 2, 1, 3]
    assert cycle_schedule(5, 1, order=[0, 1, 2, 3, 2, 3, 4])[4:6] == [(2, 1), (3, 1)]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_every_named_order_visits_each_middle_layer_in_each_cycle(n_layers, n_cycles, n_head, n_tail):
    if n_head + n_tail >= n_layers:
        return
    reference = cycle_schedule(n_layers, n_cycles, n_head=n_head, n_tail=n_tail)
    assert reference == oracle.schedule(n_layers, n_cycles, n_head, n_tail)
    assert len(reference) == n_head + n_tail + n_cycles * (n_layers - n_head - n_tail)
    for order in ("sequence", "cycle_rev"):
        other = cycle_schedule(n_layers, n_cycles, n_head=n_head, n_tail=n_tail, order=order)
        assert sorted(other) == sorted(reference)
    for slot, (layer, cycle) in enumerate(reference):
        where = cache_slot(layer, cycle, n_layers=n_layers, n_head=n_head, n_tail=n_tail)
        assert range(len(reference))[where] == slot


@pytest.mark.parametrize(
    ("arguments", "knobs"),
    [
        ((6, 0), {}),
        ((6, True), {}),
        ((6, 2.0), {}),
        ((2, 2), {}),
        ((1, 1), {}),
        ((4, 2), {"n_head": 2, "n_tail": 2}),
        ((4, 2), {"n_head": -1}),
        ((4, 2), {"order": [0, 4]}),
        ((4, 2), {"order": []}),
        ((4, 2), {"order": "zigzag"}),
    ],
)
def test_schedules_that_make_no_sense_are_refused(arguments, knobs):
    with pytest.raises(RecipeError):
        cycle_schedule(*arguments, **knobs)


def test_a_schedule_is_cut_into_head_cycles_and_tail():
    cut = stages(cycle_schedule(4, 2), [1, 2])
    assert cut.head == ((0, 0, 0),)
    assert cut.cycles == (((1, 0, 1), (2, 0, 2)), ((1, 1, 3), (2, 1, 4)))
    assert cut.tail == ((3, 0, 5),)
    assert len(stages(cycle_schedule(4, 2, order="sequence"), [1, 2]).cycles) == 1
