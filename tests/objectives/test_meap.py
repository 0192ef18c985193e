import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import ModicumError
from modicum.objectives import mask_inputs, mask_ratio_at, reference_mask_positions
from modicum.objectives.meap import meap
from modicum.objectives.selection import select_positions
from modicum.philox import row_keys
from oracles import meap as oracle
from support import tiny_llama

MASK = 999


def positions(masked):
    return (masked == MASK).nonzero().flatten().tolist()


@st.composite
def rows(draw):
    length = draw(st.integers(1, 40))
    ids = draw(st.lists(st.integers(0, 9), min_size=length, max_size=length))
    real = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return ids, real


@given(
    row=rows(),
    ratio=st.floats(0, 1),
    key=st.integers(0, 2**63 - 1),
    least=st.integers(0, 3),
    last=st.booleans(),
    protect=st.sets(st.integers(0, 9), max_size=3),
)
def test_fixed_count_equals_the_oracle_and_keeps_every_law(row, ratio, key, least, last, protect):
    ids, real = row
    clean = torch.tensor([ids])
    before = clean.clone()
    masked = mask_inputs(
        clean,
        ratio=ratio,
        mask_token_id=MASK,
        eligible_mask=torch.tensor([real]),
        keys=torch.tensor([key]),
        min_masks=least,
        exclude_last=last,
        protect_ids=sorted(protect),
    )
    end = max((i for i, r in enumerate(real) if r), default=-1) if last else -1
    eligible = [r and t not in protect and i != end for i, (t, r) in enumerate(zip(ids, real, strict=True))]
    found = set(positions(masked[0]))
    assert found == oracle.selected(eligible, real, key, ratio, least)
    n = sum(eligible)
    assert len(found) == (min(n, max(least, math.floor(ratio * n))) if ratio > 0 else 0)
    assert all(eligible[i] for i in found)
    untouched = [i for i in range(len(ids)) if i not in found]
    assert masked[0, untouched].tolist() == [ids[i] for i in untouched]
    assert torch.equal(clean, before) and masked.dtype == clean.dtype


@given(length=st.integers(2, 40), spans=st.integers(1, 6), key=st.integers(0, 2**63 - 1), ratio=st.floats(0.05, 0.9))
def test_spans_equal_the_oracle_and_keep_the_count(length, spans, key, ratio):
    spans = min(spans, length)
    masked = mask_inputs(
        torch.zeros(1, length, dtype=torch.long), ratio=ratio, mask_token_id=MASK, spans=spans, keys=torch.tensor([key])
    )
    eligible = [True] * (length - 1) + [False]
    expected = oracle.selected(eligible, [True] * length, key, ratio, spans=spans)
    assert set(positions(masked[0])) == expected
    assert len(expected) == max(1, math.floor(ratio * (length - 1)))


def test_long_spans_are_contiguous():
    masked = mask_inputs(torch.zeros(1000, dtype=torch.long), ratio=0.15, mask_token_id=MASK, spans=50)
    found = positions(masked)
    runs = 1 + sum(b - a != 1 for a, b in itertools.pairwise(found))
    assert len(found) == 149 and runs <= 4


def test_the_official_positions_are_exact():
    first = reference_mask_positions(4096, ratio=0.15, step=0)
    second = reference_mask_positions(4096, ratio=0.15, step=1)
    assert first[:6] == [2037, 3504, 1090, 1491, 2610, 3648] and sum(first) == 1261120
    assert second[:6] == [997, 3434, 2057, 2262, 663, 1007] and sum(second) == 1296185
    assert len(first) == 614
    assert reference_mask_positions(16, ratio=0.15, step=0) == [7, 13]


def test_the_official_positions_repeat_after_51_steps():
    sets = [tuple(reference_mask_positions(64, ratio=0.15, step=s)) for s in range(102)]
    assert sets[:51] == sets[51:] and len(set(sets)) == 51
    assert list(sets[7]) == oracle.reference_columns(64, 0.15, 7)


def test_reference_scope_masks_the_official_columns_in_every_row():
    masked = mask_inputs(torch.zeros(3, 16, dtype=torch.long), ratio=0.15, mask_token_id=MASK, scope="reference")
    assert [positions(row) for row in masked] == [[7, 13]] * 3


def test_reference_scope_never_masks_what_is_not_eligible():
    eligible = torch.ones(16, dtype=torch.bool)
    eligible[7] = False
    ids = torch.zeros(16, dtype=torch.long)
    masked = mask_inputs(ids, ratio=0.15, mask_token_id=MASK, scope="reference", eligible_mask=eligible)
    assert positions(masked) == [13]


def test_ratio_zero_returns_the_same_object_and_one_masks_all_but_the_last():
    ids = torch.arange(12).reshape(2, 6)
    assert mask_inputs(ids, ratio=0, mask_token_id=MASK) is ids
    assert mask_inputs(ids, ratio=1, mask_token_id=MASK).tolist() == [[MASK] * 5 + [5], [MASK] * 5 + [11]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (2,), (0,), (3, 1), (0, 5), (2, 0)])
def test_edge_sizes_keep_shape_and_type(dtype, shape):
    masked = mask_inputs(torch.zeros(shape, dtype=dtype), ratio=0.5, mask_token_id=MASK)
    assert masked.shape == shape and masked.dtype == dtype
    if shape == (2,):
        assert masked.tolist() == [MASK, 0]
    if shape == (1,):
        assert masked.tolist() == [0]


def test_batch_shared_masks_the_same_columns_in_every_row():
    ids = torch.zeros(4, 50, dtype=torch.long)
    shared = mask_inputs(ids, ratio=0.2, mask_token_id=MASK, scope="batch_shared")
    own = mask_inputs(ids, ratio=0.2, mask_token_id=MASK, scope="row")
    assert all(torch.equal(row, shared[0]) for row in shared)
    assert not torch.equal(own[0], own[1])


def test_padding_on_either_side_does_not_move_the_masks():
    keys = row_keys(["sample"], seed=0, method="meap")
    ids, pad = torch.arange(20)[None], torch.full((1, 7), 500)
    plain = positions(mask_inputs(ids, ratio=0.3, mask_token_id=MASK, keys=keys)[0])
    real = torch.ones(1, 20, dtype=torch.bool), torch.zeros(1, 7, dtype=torch.bool)
    left = mask_inputs(
        torch.cat((pad, ids), 1), ratio=0.3, mask_token_id=MASK, keys=keys, eligible_mask=torch.cat(real[::-1], 1)
    )
    right = mask_inputs(
        torch.cat((ids, pad), 1), ratio=0.3, mask_token_id=MASK, keys=keys, eligible_mask=torch.cat(real, 1)
    )
    assert positions(left[0, 7:]) == plain == positions(right[0])
    assert (left[0, :7] == 500).all()


def test_fixed_counts_are_uniform_over_positions_and_independent_between_rows():
    rows_, length, ratio = 4000, 41, 0.2
    keys = row_keys(range(rows_), seed=0, method="meap")
    chosen = select_positions(torch.ones(rows_, length, dtype=torch.bool), keys, ratio=ratio)
    counts, k = chosen.sum(0).double(), int(length * ratio)
    expected = rows_ * k / length
    # A fixed count per row makes the counts negatively correlated; this is the scaled statistic.
    chi2 = float(((counts - expected) ** 2 / (expected * (1 - k / length))).sum() * (length - 1) / length)
    assert abs(chi2 - (length - 1)) < 5 * (2 * (length - 1)) ** 0.5
    overlap = (chosen[::2] & chosen[1::2]).sum(-1).double().mean()
    assert abs(float(overlap) - k * k / length) < 0.15


def test_bernoulli_has_the_mean_and_variance_of_independent_draws():
    n, ratio = 100, 0.3
    keys = row_keys(range(5000), seed=1, method="meap")
    full = torch.ones(5000, n, dtype=torch.bool)
    counts = select_positions(full, keys, ratio=ratio, sampling="bernoulli").sum(-1).double()
    assert abs(float(counts.mean()) - n * ratio) < 0.3
    assert abs(float(counts.var()) / (n * ratio * (1 - ratio)) - 1) < 0.1
    assert select_positions(full, keys, ratio=1.0, sampling="bernoulli").all()


def test_global_random_state_is_neither_used_nor_moved():
    torch.manual_seed(1)
    random.seed(1)
    before, state = torch.get_rng_state(), random.getstate()
    ids = torch.zeros(2, 30, dtype=torch.long)
    kinds = [{}, {"scope": "reference"}, {"generator": torch.Generator().manual_seed(4)}]
    first = [mask_inputs(ids, ratio=0.2, mask_token_id=MASK, **kind) for kind in kinds]
    assert torch.equal(before, torch.get_rng_state()) and state == random.getstate()
    torch.manual_seed(2)
    random.seed(2)
    kinds[2] = {"generator": torch.Generator().manual_seed(4)}
    assert all(torch.equal(a, mask_inputs(ids, ratio=0.2, mask_token_id=MASK, **kind)) for a, kind in zip(first, kinds))


def test_masking_compiles_without_a_graph_break():
    ids, keys = torch.zeros(2, 32, dtype=torch.long), row_keys(range(2), seed=0, method="meap")

    def mask(ids, keys):
        return mask_inputs(ids, ratio=0.25, mask_token_id=MASK, keys=keys)

    compiled = torch.compile(mask, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, keys), mask(ids, keys))


def test_the_mask_at_a_target_does_not_change_its_own_loss():
    model = tiny_llama().eval()
    ids = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = model(input_ids=ids).logits
        for t in (5, 12):
            hidden = ids.clone()
            hidden[0, t] = 260
            logits = model(input_ids=hidden).logits
            assert torch.equal(logits[0, :t], clean[0, :t])
            assert not torch.allclose(logits[0, t], clean[0, t])


def test_the_masks_embedding_learns_only_when_something_is_masked():
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    for ratio, moves in ((0.2, True), (0.0, False)):
        model = tiny_llama(tie_word_embeddings=False)
        masked = mask_inputs(ids, ratio=ratio, mask_token_id=260)
        model(input_ids=masked, labels=ids).loss.backward()
        assert bool(model.get_input_embeddings().weight.grad[260].any()) is moves


def test_the_objective_leaves_all_but_the_ids_alone():
    ids = torch.arange(24).reshape(2, 12)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "cu_seq_lens_q": torch.tensor([0]),
    }
    out = meap(batch, mask_token_id=MASK, ratio=0.3, rng=torch.Generator())
    assert all(out[key] is batch[key] for key in batch if key != "input_ids")
    assert (out["input_ids"] == MASK).sum(-1).tolist() == [3, 3]
    assert torch.equal(ids, torch.arange(24).reshape(2, 12))


def test_packed_documents_are_masked_as_if_they_stood_alone():
    keys = row_keys(["a", "b"], seed=0, method="meap")
    a, b = torch.arange(10), torch.arange(10, 31)
    packed = {
        "input_ids": torch.cat((a, b))[None],
        "labels": torch.cat((a, b))[None],
        "position_ids": torch.cat((torch.arange(10), torch.arange(21)))[None],
    }
    out = meap(packed, mask_token_id=MASK, ratio=0.3, rng=keys)["input_ids"][0]
    alone = [
        mask_inputs(row[None], ratio=0.3, mask_token_id=MASK, keys=keys[i : i + 1])[0] for i, row in enumerate((a, b))
    ]
    assert torch.equal(out, torch.cat(alone))


def test_the_ratio_grows_over_the_warmup_and_stays():
    ratios = [mask_ratio_at(s, 90, ratio=0.6, schedule="linear_warmup") for s in (0, 30, 60, 89)]
    assert ratios == pytest.approx([0.0, 0.3, 0.6, 0.6])
    assert mask_ratio_at(0, 1, ratio=0.2) == 0.2


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"mask_token_id": -1}, "mask_token_id is -1"),
        ({"mask_token_id": 7, "protect_ids": [7, 8]}, "among the protected"),
        ({"mask_token_id": 3}, "occurs in the clean"),
        ({"spans": 9}, "spans is 9"),
        ({"spans": 0}, "spans is 0"),
        ({"scope": "reference", "sampling": "bernoulli"}, "fixes the draw"),
        ({"eligible_mask": torch.ones(4, dtype=torch.bool)}, "eligible_mask"),
        ({"eligible_mask": torch.ones(8)}, "eligible_mask"),
        ({"keys": torch.zeros(3, dtype=torch.long)}, "keys has shape"),
        ({"scope": "batch"}, "scope is 'batch'"),
        ({"sampling": "fixed"}, "sampling is 'fixed'. Did you mean 'fixed_count'"),
    ],
)
def test_wrong_knobs_are_named(knobs, says):
    with pytest.raises(ModicumError, match=says):
        mask_inputs(torch.arange(8), **{"ratio": 0.2, "mask_token_id": 99} | knobs)


def test_embeddings_instead_of_ids_are_refused():
    with pytest.raises(ModicumError, match="expected integers"):
        mask_inputs(torch.rand(8), ratio=0.2, mask_token_id=99)


def test_a_generator_on_another_device_is_refused():
    with pytest.raises(ModicumError, match="generator is on"):
        mask_inputs(
            torch.zeros(2, 8, dtype=torch.long, device="meta"), ratio=0.2, mask_token_id=99, generator=torch.Generator()
        )


def test_a_batch_without_labels_or_mask_token_is_refused():
    ids = torch.arange(8)[None]
    with pytest.raises(ModicumError, match="no labels"):
        meap({"input_ids": ids}, mask_token_id=99, rng=torch.Generator())
    with pytest.raises(ModicumError, match="mask_token_id is missing"):
        meap({"input_ids": ids, "labels": ids}, rng=torch.Generator())
