"""A state is continued bit for bit by the optimizer that wrote it, and refused by every other."""

import copy
import io
import warnings
from itertools import product

import pytest
import torch
from torch import nn
from zeroth_order_models import IDS, LABELS, flat, task, tied

from modicum.errors import CheckpointError
from modicum.optim import LOZO, MeZO, SubZero, TeZO
from modicum.registry import zeroth_order

OLDER = ("variant", "engine", "lift", "scale", "refresh_every", "shapes", "ranks", "order", "epoch")  # unsaid in 0.1.0
KNOBS = {
    "lozo": {"refresh_every": 5},  # due in the first step that a loaded state goes on with
    "subzero": {"rank": 3, "refresh_every": 4},
    "tezo": {"rank": 3},
    "zo_adamu": {"hold": 2, "fall": 4},
    "hizoo": {"smooth": 1e-3},
}


def choices(entry, knob):
    """The values that a knob of few values can take; none where a method lacks it."""
    field = entry.schema.model_fields.get(knob)
    return [None] if field is None else field.annotation.__args__


CASES = [
    (name, variant, engine)
    for name, entry in zeroth_order.items()
    for variant, engine in product(choices(entry, "variant"), choices(entry, "engine"))
]


def made(case, **knobs):
    name, variant, engine = case
    model = tied()
    knobs = {"lr": 1e-3, **KNOBS.get(name, {}), "variant": variant, "engine": engine, **knobs}
    given = {knob: value for knob, value in knobs.items() if value is not None}
    optimizer = zeroth_order[name].function(model.named_parameters(), **given)
    optimizer.attach(model)
    return model, optimizer


def run(model, optimizer, steps):
    def closure():
        copies = optimizer.branches if optimizer.settings.engine == "paired" else 1
        parts = model(IDS.repeat(copies, 1)).chunk(copies)
        losses = [nn.functional.cross_entropy(part.flatten(0, 1), LABELS.flatten()) for part in parts]
        return torch.stack(losses) if optimizer.settings.engine == "paired" else losses[0]

    for _ in range(steps):
        optimizer.step(closure)
    optimizer.settle_()


def saved(case, steps=5, **knobs):
    """State and weights in the middle of a run, as they come back from a file, and the weights at its end."""
    model, optimizer = made(case, **knobs)
    run(model, optimizer, steps)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict()), file)
    run(model, optimizer, 4)
    optimizer.detach()
    file.seek(0)
    return *torch.load(file, weights_only=True), flat(model)


@pytest.fixture(scope="module")
def states():
    return {case: saved(case) for case in CASES}


def continues(case, state, **knobs):
    """Whether a new optimizer goes on with a state to the same bytes."""
    state, weights, end = state
    model, optimizer = made(case, **knobs)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    run(model, optimizer, 4)
    optimizer.detach()
    return torch.equal(flat(model), end)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_a_state_is_continued_by_its_own_kind_and_refused_by_all_others(case, states):
    assert continues(case, states[case])
    model, optimizer = made(case)
    run(model, optimizer, 2)
    before, kept = flat(model), copy.deepcopy(optimizer.state_dict())
    for other in CASES:
        if other == case:
            continue
        name = next(n for n, a, b in zip(("method", "variant", "engine"), other, case) if a != b)
        with pytest.raises(CheckpointError, match=rf"^The optimizer state has {name} '.*', this optimizer has '.*'\. "):
            optimizer.load_state_dict(states[other][0])
    # A refusal changes nothing.
    assert torch.equal(flat(model), before) and str(optimizer.state_dict()) == str(kept)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_a_state_of_version_0_1_0_is_continued_with_a_note_where_it_fits_and_refused_elsewhere(case, states):
    def older(state):
        mine = {name: value for name, value in state["zeroth_order"].items() if name not in OLDER}
        return state | {"zeroth_order": mine}

    state, weights, end = states[case]
    with pytest.warns(UserWarning, match="written by an older version, does not say its variant, engine"):
        assert continues(case, (older(state), weights, end))
    for other in CASES:
        if other[0] != case[0]:
            continue
        model, optimizer = made(case)
        theirs = older(states[other][0])
        learned = theirs["zeroth_order"]["position"]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                optimizer.load_state_dict(theirs)
            except CheckpointError as error:
                assert other != case and "\n" not in str(error)
                continue
        assert "older version" in str(seen[0].message)
        # What was learned beside the weights is there, and the run goes on.
        assert (learned is None) == (optimizer.position is None)
        run(model, optimizer, 2)


@pytest.mark.parametrize(
    ("wrote", "reads", "message"),
    [
        ((TeZO, {"rank": 2}), (TeZO, {"rank": 3}), "ranks 2 for embed.weight, this optimizer has 3"),
        ((TeZO, {"seed": 0}), (TeZO, {"seed": 1}), "seed 0, this optimizer has 1"),
        ((TeZO, {}), (TeZO, {"refresh_every": 3}), "refresh_every None, this optimizer has 3"),
        ((LOZO, {"refresh_every": 2}), (LOZO, {"refresh_every": 3}), "refresh_every 2, this optimizer has 3"),
        ((SubZero, {"scale": "none"}), (SubZero, {}), "scale 'none', this optimizer has 'unit'"),
        ((TeZO, {"vectors": "freeze"}), (TeZO, {}), r"shapes None for norm.weight, this optimizer has \(8,\)"),
        ((TeZO, {}), (TeZO, {"dense": ["up"]}), "ranks 8 for up.weight, this optimizer has 0"),
        ((MeZO, {}), (MeZO, {"exclude": ["up"]}), r"shapes \(12, 8\) for up.weight, this optimizer has None"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.filterwarnings("ignore:The rank is larger")
def test_what_shapes_a_state_must_be_the_same(wrote, reads, message, steps):
    model, other = tied(), tied()
    optimizer, reader = (
        method(m.named_parameters(), lr=1e-3, **knobs) for m, (method, knobs) in ((model, wrote), (other, reads))
    )
    run(model, optimizer, steps)
    with pytest.raises(CheckpointError, match=f"^The optimizer state has {message}. Make the optimizer with the knobs"):
        reader.load_state_dict(optimizer.state_dict())


def test_a_state_of_other_names_order_or_shapes_is_refused():
    def weights(**shapes):
        return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]

    state = TeZO(weights(a=(4, 3), b=(5, 3)), lr=1e-3, rank=2).state_dict()
    for named, message in (
        (weights(a=(4, 3), c=(5, 3)), "shapes .* for b, this optimizer has None"),
        (weights(b=(5, 3), a=(4, 3)), "order 'a' for 0, this optimizer has 'b'"),
        (weights(a=(4, 3), b=(6, 3)), r"shapes \(5, 3\) for b, this optimizer has \(6, 3\)"),
        (weights(a=(4, 3)), r"shapes \(5, 3\) for b, this optimizer has None"),
        ([*weights(a=(4, 3), b=(5, 3)), ("frozen", nn.Parameter(torch.zeros(1), requires_grad=False))], "parameters"),
    ):
        with pytest.raises(CheckpointError, match=message):
            TeZO(named, lr=1e-3, rank=2).load_state_dict(state)


@pytest.mark.parametrize("part", ["method", "seed", "steps", "memory", "position", "dense_memory", "square"])
def test_a_state_that_is_not_whole_is_refused(part):
    case = ("conmezo", None, None) if part == "square" else ("tezo", "momentum", "adapter")
    model, optimizer = made(case)
    run(model, optimizer, 2)
    state = optimizer.state_dict()
    del state["zeroth_order"][part]
    with pytest.raises(CheckpointError, match=f"The optimizer state lacks {part}"):
        made(case)[1].load_state_dict(state)


def test_knobs_that_shape_no_state_may_change():
    case = ("tezo", "adam", "mutate")
    state, weights, _ = saved(case)
    model, optimizer = made(case, lr=1e-4, eps=1e-2, queries=3, passes=2, betas=(0.5, 0.5))
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-3  # as any torch optimizer, the groups are those of the state
    run(model, optimizer, 2)


@pytest.mark.parametrize("method", [LOZO, SubZero])
def test_a_step_that_failed_after_a_refresh_is_repeated_without_another(method):
    def broken():
        raise KeyError("out of data")

    ends = []
    for fails in (False, True):
        model = tied()
        optimizer = method(model.named_parameters(), lr=1e-3, rank=2, variant="momentum", refresh_every=3)
        run(model, optimizer, 3)
        if fails:
            with pytest.raises(KeyError):
                optimizer.step(broken)
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = method(model.named_parameters(), lr=1e-3, rank=2, variant="momentum", refresh_every=3)
            optimizer.load_state_dict(state)
        run(model, optimizer, 2)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-13)


def test_a_state_from_before_the_first_refresh_brings_its_factors_along():
    model, late = tied(), tied()
    knobs = {"lr": 1e-3, "rank": 2, "refresh_every": 2}
    state = LOZO(model.named_parameters(), **knobs).state_dict()
    optimizer = LOZO(late.named_parameters(), **knobs)
    run(late, optimizer, 5)
    late.load_state_dict(model.state_dict())
    optimizer.load_state_dict(state)
    fresh = LOZO(model.named_parameters(), **knobs)
    run(model, fresh, 3)
    run(late, optimizer, 3)
    assert torch.equal(flat(model), flat(late))


@pytest.mark.parametrize("name", sorted(zeroth_order))
def test_what_surrounds_a_model_changes_neither_directions_nor_state(name):
    found = []
    for prefix in ("", "module.", "_orig_mod.", "_orig_mod.module."):
        model = tied()
        named = [(prefix + key, param) for key, param in model.named_parameters()]
        optimizer = zeroth_order[name].function(named, lr=1e-2, **KNOBS.get(name, {}))
        optimizer.step(task(model))
        found.append((flat(model), optimizer.state_dict()["zeroth_order"]))
    for weights, state in found[1:]:
        assert torch.equal(weights, found[0][0]) and repr(state) == repr(found[0][1])
