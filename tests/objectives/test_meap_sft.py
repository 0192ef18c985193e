import pytest
import torch

from modicum.errors import ModicumError, UnsupportedError
from modicum.objectives import chat_row, copies_attention, expand_sft, expand_sft_example, meap_sft_loss
from modicum.objectives.meap_sft import meap_sft
from modicum.objectives.sft_rows import CLEAN, MASKED, SHARED, masked_copy
from modicum.philox import row_keys
from oracles import meap as oracle
from support import tiny_llama

MASK, EOS = 260, 2


def expand(prompt=6, answer=60, **knobs):
    knobs = {"max_length": 200, "generator": torch.Generator().manual_seed(0)} | knobs
    prompt_ids, answer_ids = list(range(10, 10 + prompt)), list(range(100, 100 + answer))
    return expand_sft_example(prompt_ids, answer_ids, mask_token_id=MASK, eos_token_id=EOS, **knobs)


def batch_of(prompt=6, answer=60, rows=2):
    ids = torch.arange(10, 10 + rows * (prompt + answer)).reshape(rows, -1)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (50, 1), (51, 2)])
def test_only_answers_of_more_than_fifty_tokens_get_a_masked_row(tokens, rows):
    assert len(expand(answer=tokens)) == rows


def test_the_masked_row_has_its_loss_at_the_masks_and_the_clean_row_is_plain_fine_tuning():
    clean, masked = expand(answer=51)
    assert clean["labels"] == [-100] * 6 + clean["input_ids"][6:] and clean["input_ids"][-1] == EOS
    at = [i for i, token in enumerate(masked["input_ids"]) if token == MASK]
    assert len(at) == 5  # int(5.1)
    assert [i for i, label in enumerate(masked["labels"]) if label != -100] == at
    assert [masked["labels"][i] for i in at] == [clean["input_ids"][i] for i in at]
    assert masked["input_ids"][:6] == clean["input_ids"][:6]
    assert (
        MASK not in masked["labels"] and set(clean["copy_index"]) == {CLEAN} and set(masked["copy_index"]) == {MASKED}
    )


def test_the_region_says_where_masks_may_stand():
    for region, allowed in (("prompt", range(6)), ("answer", range(6, 66)), ("all", range(66))):
        masked = expand(mask_region=region, ratio=1.0)[1]
        assert [i for i, token in enumerate(masked["input_ids"]) if token == MASK] == list(allowed)


def test_copy_labels_answer_keeps_the_whole_answer():
    clean, masked = expand(copy_labels="answer")
    assert masked["labels"] == clean["labels"] and MASK in masked["input_ids"]


def test_a_row_that_is_too_long_is_cut_in_ids_and_labels_alike():
    clean, masked = expand(prompt=10, answer=80, max_length=70)
    assert len(clean["input_ids"]) == 70 and EOS not in clean["input_ids"]
    assert clean["labels"][10:] == clean["input_ids"][10:]
    assert all(token in (MASK, c) for token, c in zip(masked["input_ids"], clean["input_ids"]))


def test_prompts_that_leave_no_room_are_dropped_and_counted():
    assert expand(prompt=70, max_length=70) == []
    found = expand_sft(
        [([1] * 5, [2] * 60), ([1] * 90, [2] * 60), ([1] * 50, [2] * 60), ([1], [2])],
        max_length=80,
        generator=torch.Generator(),
        mask_token_id=MASK,
        eos_token_id=EOS,
    )
    assert (len(found.rows), found.duplicated, found.dropped, found.truncated) == (5, 2, 1, 1)


@pytest.mark.parametrize("knob", ["layout", "concat_attend", "mask_region", "copy_labels"])
def test_an_unknown_option_of_the_rows_is_refused(knob):
    with pytest.raises(ModicumError, match=f"{knob} is 'other'"):
        expand(**{knob: "other"})


def test_an_empty_answer_is_refused():
    with pytest.raises(ModicumError, match="answer is empty"):
        expand(answer=0)
    with pytest.raises(ModicumError, match="answer of the chat is empty"):
        chat_row([([1], [])], eos_token_id=EOS)
    with pytest.raises(ModicumError, match="share_prefix needs"):
        expand(share_prefix=True)


def loss_of(model, rows, attend="causal"):
    """Mean over all labelled tokens of rows that are dictionaries of lists."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        mask = copies_attention(torch.tensor([row["copy_index"]]), attend=attend)
        logits = model(input_ids=ids, position_ids=torch.tensor([row["position_ids"]]), attention_mask=mask).logits
        items = int((labels[:, 1:] != -100).sum())
        total = total + meap_sft_loss(logits, labels, torch.tensor([False]), num_items=1)
        count += items
    return total / count


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("labels", ["masked", "answer"])
def test_isolated_copies_in_one_row_give_the_loss_of_separate_rows(share, labels):
    model = tiny_llama().eval()
    apart = expand(copy_labels=labels)
    joined = expand(copy_labels=labels, layout="concat", concat_attend="isolated", share_prefix=share)
    assert len(joined) == 1
    # A shared prefix costs one prompt: all but the last prompt token stand once.
    assert len(joined[0]["input_ids"]) == 2 * 67 - (5 if share else 0)
    assert joined[0]["copy_index"].count(SHARED) == (5 if share else 0)
    with torch.no_grad():
        separate, together = loss_of(model, apart), loss_of(model, joined, "isolated")
    assert float(together) == pytest.approx(float(separate), abs=1e-5)


def test_a_causal_copy_sees_the_clean_one():
    model = tiny_llama().eval()
    joined = expand(layout="concat")
    with torch.no_grad():
        assert abs(float(loss_of(model, joined) - loss_of(model, joined, "isolated"))) > 1e-4


def test_the_loss_equals_the_oracle_in_double_precision():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.4] = -100
    masked = torch.tensor([False, True, True])
    got = meap_sft_loss(logits, labels, masked, masked_weight=0.3, num_items=9, dtype=torch.float64)
    expected = oracle.sft_loss(logits.numpy(), labels.numpy(), masked.numpy(), 0.3, 9)
    assert float(got) == pytest.approx(expected, rel=1e-10)


def test_the_loss_does_not_depend_on_how_a_step_is_split():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (4, 7), generator=generator)
    labels[1, 2:] = -100
    masked = torch.tensor([False, True, False, True])
    items = int((labels[:, 1:] != -100).sum())

    def loss(part):
        return meap_sft_loss(logits[part], labels[part], masked[part], masked_weight=0.5, num_items=items)

    whole = loss(slice(None))
    assert float(sum(loss(slice(i, i + 1)) for i in range(4))) == pytest.approx(float(whole), rel=1e-6)
    assert float(loss(slice(0, 3)) + loss(slice(3, 4))) == pytest.approx(float(whole), rel=1e-6)


def test_the_masked_loss_is_an_unbiased_sample_of_the_answers_loss():
    """Under Bernoulli masks the expected sums agree exactly: masked = P × answer; here by enumeration of all masks."""
    model = tiny_llama().eval()
    ids = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(1))
    answer, ratio = [4, 5, 6, 7, 8], 0.3
    sums = {"masked": 0.0, "answer": 0.0}
    with torch.no_grad():
        for bits in range(2 ** len(answer)):
            chosen = [t for i, t in enumerate(answer) if bits >> i & 1]
            hidden = ids.clone()
            hidden[0, chosen] = MASK
            losses = torch.nn.functional.cross_entropy(
                model(input_ids=hidden).logits[0, :-1].double(), ids[0, 1:], reduction="none"
            )
            p = ratio ** len(chosen) * (1 - ratio) ** (len(answer) - len(chosen))
            sums["masked"] += p * float(sum(losses[t - 1] for t in chosen))
            sums["answer"] += p * float(sum(losses[t - 1] for t in answer))
    assert sums["masked"] == pytest.approx(ratio * sums["answer"], rel=1e-6)


def test_the_batch_form_adds_a_row_for_each_long_answer():
    batch = batch_of(rows=2)
    batch["labels"][1, 20:] = -100  # a short answer
    out = meap_sft(batch, mask_token_id=MASK + 1000, rng=row_keys(range(2), seed=0, method="meap_sft"))
    assert out["input_ids"].shape == (3, 66)
    assert torch.equal(out["input_ids"][[0, 2]], batch["input_ids"])
    assert torch.equal(out["labels"][[0, 2]], batch["labels"])
    at = out["input_ids"][1] == MASK + 1000
    assert int(at.sum()) == 6 and torch.equal(out["labels"][1] != -100, at)
    assert torch.equal(out["labels"][1][at], batch["input_ids"][0][at])
    assert torch.equal(out["loss_weights"], (out["labels"] != -100).float())


def test_the_batch_form_agrees_with_the_example_form():
    keys = row_keys([0], seed=0, method="meap_sft")
    rows = expand(generator=keys)
    ids, labels = torch.tensor([rows[0]["input_ids"]]), torch.tensor([rows[0]["labels"]])
    out = meap_sft({"input_ids": ids, "labels": labels}, mask_token_id=MASK, protect_ids=(EOS,), rng=keys)
    assert out["input_ids"].tolist() == [row["input_ids"] for row in rows]
    assert out["labels"].tolist() == [row["labels"] for row in rows]


def test_a_chat_keeps_its_history_and_only_long_answers_are_masked():
    ids, labels = chat_row([(range(5), range(100, 160)), (range(5, 9), range(160, 170))], eos_token_id=EOS)
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    out = meap_sft(batch, mask_token_id=MASK, protect_ids=(EOS,), ratio=1.0, rng=torch.Generator())
    masked = out["input_ids"][1]
    assert masked[:5].tolist() == list(range(5)) and (masked[5:65] == MASK).all()
    assert masked[65:].tolist() == ids[65:]


def test_padding_stays_padding_and_does_not_move_the_masks():
    keys = row_keys([0], seed=0, method="meap_sft")
    plain, padded = batch_of(rows=1), batch_of(rows=1)
    for key, fill in (("input_ids", 1), ("labels", -100), ("attention_mask", 0)):
        padded[key] = torch.nn.functional.pad(padded[key], (3, 4), value=fill)
    a, b = (meap_sft(x, mask_token_id=999, rng=keys) for x in (plain, padded))
    assert torch.equal(a["input_ids"], b["input_ids"][:, :66])
    assert (b["input_ids"][:, 66:] == 1).all() and not b["attention_mask"][:, 66:].any()


def test_concat_batches_carry_positions_and_isolation():
    out = meap_sft(
        batch_of(),
        mask_token_id=999,
        layout="concat",
        concat_attend="isolated",
        share_prefix=True,
        rng=torch.Generator(),
    )
    assert out["input_ids"].shape == (2, 132 - 5) and out["attention_mask"].shape == (2, 1, 127, 127)
    assert out["position_ids"][0, 66] == 5  # the copy begins with the last prompt token
    assert not out["attention_mask"][0, 0, 70, 10] and out["attention_mask"][0, 0, 70, 2]


def test_masked_weight_enters_the_weights():
    out = meap_sft(batch_of(rows=1), mask_token_id=999, masked_weight=0.25, rng=torch.Generator())
    assert out["loss_weights"][0].unique().tolist() == [0.0, 1.0]
    assert out["loss_weights"][1].unique().tolist() == [0.0, 0.25]


def test_packed_rows_are_refused():
    batch = batch_of(rows=1) | {"position_ids": torch.cat((torch.arange(30), torch.arange(36)))[None]}
    with pytest.raises(UnsupportedError, match="packs several documents"):
        meap_sft(batch, mask_token_id=999, rng=torch.Generator())


def test_rows_without_answers_pass_unchanged():
    batch = batch_of(rows=1)
    batch["labels"][:] = -100
    out = meap_sft(batch, mask_token_id=999, rng=torch.Generator())
    assert torch.equal(out["input_ids"], batch["input_ids"])


def test_masked_copy_does_not_touch_its_inputs():
    ids = torch.arange(20)[None]
    before = ids.clone()
    masked_copy(
        ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.long), mask_token_id=99, ratio=0.5
    )
    assert torch.equal(ids, before)
