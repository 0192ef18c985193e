import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from transformers import DataCollatorForLanguageModeling

from modicum.errors import ModicumError, UnsupportedError
from modicum.objectives import MEAPCollator, ObjectiveCollator
from support import byte_tokenizer

MASK = 263


def plain(features):
    """Pad on the right; labels are the clean ids."""
    rows = [torch.tensor(f["input_ids"]) for f in features]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(r) for r in rows], batch_first=True),
    }


def samples(count=12):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(3, 250, (8 + 3 * i,), generator=generator).tolist(), "sample_id": i}
        for i in range(count)
    ]


def by_sample(loader, count=12):
    """Return the masked ids of each sample, without padding, in the order of the data."""
    found = []
    for batch in loader:
        found += [ids[real.bool()].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"])]
    assert len(found) == count
    return found


def test_masks_are_the_same_for_any_batch_size_order_and_number_of_workers():
    data = samples()
    expected = by_sample(DataLoader(data, batch_size=1, collate_fn=MEAPCollator(plain, mask_token_id=MASK)))
    for batch_size, workers in ((4, 0), (3, 2), (12, 0)):
        loader = DataLoader(
            data, batch_size=batch_size, num_workers=workers, collate_fn=MEAPCollator(plain, mask_token_id=MASK)
        )
        assert by_sample(loader) == expected
    reverse = DataLoader(data[::-1], batch_size=5, collate_fn=MEAPCollator(plain, mask_token_id=MASK))
    assert by_sample(reverse)[::-1] == expected


def test_two_processes_see_the_masks_of_one():
    data = samples()
    expected = by_sample(DataLoader(data, batch_size=4, collate_fn=MEAPCollator(plain, mask_token_id=MASK)))
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
        loader = DataLoader(data, batch_size=2, sampler=sampler, collate_fn=MEAPCollator(plain, mask_token_id=MASK))
        assert by_sample(loader, 6) == expected[rank::2]


def test_the_content_names_a_sample_that_has_no_id():
    data = [{"input_ids": s["input_ids"]} for s in samples()]
    one, four = (
        by_sample(DataLoader(data, batch_size=n, collate_fn=MEAPCollator(plain, mask_token_id=MASK))) for n in (1, 4)
    )
    assert one == four


def test_epoch_and_seed_change_the_masks_and_nothing_else_does():
    batch = samples(3)

    def masked(seed=0, epoch=0):
        collator = MEAPCollator(plain, mask_token_id=MASK, seed=seed)
        collator.start_epoch(epoch)
        return collator(batch)["input_ids"].tolist()

    assert masked() == masked()
    assert len({str(masked(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_workers_that_outlive_an_epoch_see_the_next_one():
    data, collator = samples(4), MEAPCollator(plain, mask_token_id=MASK)
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=True, collate_fn=collator)
    epochs = []
    for epoch in range(2):
        collator.start_epoch(epoch)
        epochs.append(by_sample(loader, 4))
    alone = MEAPCollator(plain, mask_token_id=MASK)
    alone.start_epoch(1)
    assert epochs[0] != epochs[1] == by_sample(DataLoader(data, batch_size=2, collate_fn=alone), 4)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_step_is_that_of_training_however_far_the_loader_runs_ahead(workers):
    def tell(batch, step, total_steps, *, rng):
        return {"step": step, "total": total_steps}

    collator = ObjectiveCollator(plain, tell, method="m")
    loader = DataLoader(samples(10), batch_size=1, num_workers=workers, collate_fn=collator)
    collator.start_epoch(0, step=5, total_steps=50, accumulation_steps=2)
    assert [batch["step"] for batch in loader] == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    collator.start_epoch(1, step=10)
    assert [batch["step"] for batch in loader][:3] == [10, 10, 11]


def test_the_reference_scope_follows_the_step():
    collator = MEAPCollator(plain, mask_token_id=MASK, scope="reference")
    batches = [collator([{"input_ids": [5] * 16}])["input_ids"][0] for _ in range(52)]
    assert (batches[0] == MASK).nonzero().flatten().tolist() == [7, 13]
    assert torch.equal(batches[0], batches[51]) and not torch.equal(batches[0], batches[1])


def test_evaluation_batches_are_clean():
    collator = MEAPCollator(plain, mask_token_id=MASK)
    collator.eval()
    batch = collator(samples(3))
    assert torch.equal(batch["input_ids"], plain(samples(3))["input_ids"])
    collator.train()
    assert (collator(samples(3))["input_ids"] == MASK).any()


def test_transformers_own_collator_keeps_clean_labels_and_special_tokens():
    tokenizer = byte_tokenizer()
    collator = MEAPCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False), mask_token_id=MASK, ratio=1.0)
    features = [{"input_ids": [1, 5, 6, 7, 2]}, {"input_ids": [1, 8, 9]}]
    batch = collator(features)
    assert batch["input_ids"].tolist() == [[1, MASK, MASK, MASK, 2], [1, MASK, 9, 0, 0]]
    assert batch["labels"][0, 1:4].tolist() == [5, 6, 7] and not (batch["labels"] == MASK).any()


def test_packed_rows_without_padding_are_masked_document_by_document():
    def flat(features):
        ids = torch.tensor([t for f in features for t in f["input_ids"]])[None]
        positions = torch.tensor([i for f in features for i in range(len(f["input_ids"]))])[None]
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}

    data = [{"input_ids": s["input_ids"]} for s in samples(5)]
    packed = MEAPCollator(flat, mask_token_id=MASK)(data)["input_ids"][0].tolist()
    alone = by_sample(DataLoader(data, batch_size=1, collate_fn=MEAPCollator(plain, mask_token_id=MASK)), 5)
    assert packed == [t for row in alone for t in row]


def test_a_collator_survives_pickling_and_copying():
    collator = MEAPCollator(plain, mask_token_id=MASK)
    collator.start_epoch(3)
    expected = collator(samples(2))["input_ids"]
    for twin in (pickle.loads(pickle.dumps(collator)), copy.deepcopy(collator)):
        assert torch.equal(twin(samples(2))["input_ids"], expected)


def test_gathered_label_positions_point_before_the_labels():
    def identity(batch, step, total_steps, *, rng):
        return batch

    collator = ObjectiveCollator(plain, identity, method="m", gather_labels=True)
    batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert batch["label_positions"].tolist() == [0, 1, 3]
    assert batch["labels"].flatten()[batch["label_positions"] + 1].tolist() == [6, 7, 9]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"mask_token_id": 0}, "is the tokenizer's pad_token_id"),
        ({"mask_token_id": 1}, "is the tokenizer's bos_token_id"),
        ({"mask_token_id": 2}, "is the tokenizer's eos_token_id"),
        ({"mask_token_id": 264, "vocab_size": 264}, "has no embedding"),
        ({"ratio": 2.0}, "ratio is 2.0"),
        ({"scope": "rows"}, "scope is 'rows'. Did you mean 'row'"),
        ({"sampling": "count"}, "sampling is 'count'"),
        ({"schedule": "Constant"}, "schedule is 'Constant'. Did you mean 'constant'"),
    ],
)
def test_wrong_mask_ids_and_ratios_are_refused_when_the_collator_is_made(knobs, says):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    inner = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(ModicumError, match=says):
        MEAPCollator(inner, **{"mask_token_id": MASK} | knobs)


def test_a_mask_in_the_clean_data_and_missing_labels_are_refused():
    with pytest.raises(ModicumError, match="occurs in the clean"):
        MEAPCollator(plain, mask_token_id=MASK)([{"input_ids": [5, MASK, 6]}])

    def unlabelled(features):
        return {"input_ids": plain(features)["input_ids"]}

    with pytest.raises(ModicumError, match="no labels"):
        MEAPCollator(unlabelled, mask_token_id=MASK)(samples(2))
    with pytest.raises(UnsupportedError, match="no input_ids"):
        MEAPCollator(lambda features: {"pixel_values": None}, mask_token_id=MASK)(samples(2))
