"""Gradient rules inside ``transformers.Trainer``: parity with a plain loop, resuming, logs, faults and refusals."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.jobs.training.gradient import (
    bad_batches,
    check_arguments,
    fault_callback,
    gradient_callback,
)
from modicum.optim import AdaGC
from modicum.optim.gradient.clipping_log import ClippingLog, read_clipping_log
from modicum.optim.gradient.faults import tensor_noise_
from support import tiny_llama

RULES = [("adagc", {"warmup": 3}), ("zclip", {"warmup": 3}), ("stable_spam", {"period": 4}), ("agc_update", {})]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.randint(3, 200, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


def trainer(folder, callbacks, steps=8, **arguments):
    from transformers import PrinterCallback, Trainer, TrainingArguments

    defaults = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_steps": 4,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    made = Trainer(
        model=tiny_llama(),
        args=TrainingArguments(output_dir=str(folder), **defaults | arguments),
        train_dataset=Rows(),
        callbacks=callbacks,
    )
    made.remove_callback(PrinterCallback)
    return made


def weights(made):
    return {name: value.detach().clone() for name, value in made.model.named_parameters()}


@pytest.mark.parametrize(("name", "knobs"), RULES)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name, knobs):
    whole = trainer(tmp_path / "a", [gradient_callback(name, knobs, folder=tmp_path / "a")])
    whole.train()
    for restore in (False, True):
        again = trainer(
            tmp_path / "b",
            [gradient_callback(name, knobs, folder=tmp_path / "b")],
            restore_callback_states_from_checkpoint=restore,
        )
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
        assert all(torch.equal(value, weights(again)[key]) for key, value in weights(whole).items())
    last = [c for c in again.callback_handler.callbacks if type(c).__name__ == "GradientCallback"]
    first = [c for c in whole.callback_handler.callbacks if type(c).__name__ == "GradientCallback"]
    ours, theirs = first[0].clipper.state_dict(), last[0].clipper.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_rule_changes_the_run_and_equals_a_plain_loop(tmp_path):
    plain = trainer(tmp_path / "plain", [], steps=4, save_strategy="no")
    plain.train()
    ruled = trainer(tmp_path / "ruled", [gradient_callback("adagc", {"warmup": 2})], steps=4, save_strategy="no")
    ruled.train()
    assert any(not torch.equal(v, weights(plain)[k]) for k, v in weights(ruled).items())
    byhand = trainer(tmp_path / "hand", [], steps=4, save_strategy="no")
    byhand.create_optimizer()
    AdaGC(byhand.model.named_parameters(), warmup=2).attach(byhand.optimizer)
    byhand.train()
    assert all(torch.equal(v, weights(byhand)[k]) for k, v in weights(ruled).items())


def test_accumulated_gradients_are_clipped_once_a_step(tmp_path):
    callback = gradient_callback("adagc", {"warmup": 2})
    trainer(tmp_path, [callback], steps=3, gradient_accumulation_steps=2, save_strategy="no").train()
    assert callback.clipper.state.step == 3


def test_lora_trains_both_factors_from_a_zero_start(tmp_path):
    from peft import LoraConfig, get_peft_model

    callback = gradient_callback("adagc", {"warmup": 4})
    made = trainer(tmp_path, [callback], steps=8, save_strategy="no")
    made.model = made.model_wrapped = get_peft_model(made.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = {k: v.detach().clone() for k, v in made.model.named_parameters() if v.requires_grad}
    made.train()
    assert len(callback.clipper.units) == 8 == len(before)
    for name, value in made.model.named_parameters():
        if name in before:
            assert not torch.equal(value, before[name]), name


def test_two_clippers_at_once_are_refused_with_the_fix(tmp_path):
    with pytest.raises(UnsupportedError, match=r"max_grad_norm is 1\.0 .* Set trainer\.max_grad_norm: 0"):
        trainer(tmp_path, [gradient_callback("adagc")], max_grad_norm=1.0)


def test_deepspeed_and_shards_are_refused_with_alternatives():
    given = {"max_grad_norm": 0, "world_size": 2}
    with pytest.raises(UnsupportedError, match="DeepSpeed.*DDP.*FSDP2"):
        check_arguments(SimpleNamespace(deepspeed="zero3.json", **given), "adagc", {})
    with pytest.raises(UnsupportedError, match="granularity: tensor"):
        check_arguments(SimpleNamespace(deepspeed=None, **given), "adagc", {"granularity": "shard"})


def test_wrong_rules_and_knobs_fail_before_anything_is_loaded():
    with pytest.raises(RecipeError, match="Did you mean 'adagc'"):
        gradient_callback("adacg")
    with pytest.raises(RecipeError, match="relative"):
        gradient_callback("adagc", {"relative": -1})
    with pytest.raises(UnsupportedError, match="accumulator"):
        gradient_callback("clippy", {"accumulator": 0.1})


def test_a_checkpoint_made_without_or_with_another_rule_is_refused(tmp_path):
    trainer(tmp_path, [], steps=4).train()
    again = trainer(tmp_path, [gradient_callback("adagc")])
    with pytest.raises(CheckpointError, match="step 4 holds no state"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer(tmp_path / "z", [gradient_callback("zclip")], steps=4).train()
    again = trainer(tmp_path / "z", [gradient_callback("adagc")])
    with pytest.raises(CheckpointError, match="made with gradient: zclip"):
        again.train(resume_from_checkpoint=str(tmp_path / "z" / "checkpoint-4"))


def test_advice_is_given_once(tmp_path):
    heard = []
    trainer(
        tmp_path, [gradient_callback("adagc", {"init": "min"}, note=heard.append)], steps=2, save_strategy="no"
    ).train()
    assert len(heard) == 2 and "ema" in heard[0]


def test_the_log_names_tensors_and_survives_a_resume(tmp_path):
    knobs = {"warmup": 3}
    made = trainer(tmp_path, [gradient_callback("adagc", knobs, folder=tmp_path, every=2)])
    made.train()
    names, lines = read_clipping_log(tmp_path)
    assert names == [n for n, _ in made.model.named_parameters()]
    steps = [line["step"] for line in lines if "norm" in line]
    assert steps == [1, 2, 4, 6, 8]
    assert lines[0]["threshold"] == [None] * len(names)
    for line in lines:
        if "norm" in line and line["step"] > 3:
            for n, limit, factor in zip(line["norm"], line["threshold"], line["factor"]):
                assert factor == pytest.approx(min(1, limit / n), rel=2e-3)
    rates = [line for line in lines if "clip_rate" in line]
    assert sum(line["steps"] for line in rates) == 8 and all(0 <= r <= 1 for r in rates[-1]["clip_rate"])
    # A run that is done again from step 4 leaves the same file.
    before = (tmp_path / "clipping.jsonl").read_text()
    again = trainer(tmp_path, [gradient_callback("adagc", knobs, folder=tmp_path, every=2)])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (tmp_path / "clipping.jsonl").read_text() == before


def test_the_log_reads_nothing_back_until_it_is_flushed(tmp_path):
    clipper = AdaGC([torch.nn.Parameter(torch.empty(3, device="meta"))], warmup=1)
    log = ClippingLog(tmp_path / "clipping.jsonl", clipper, every=1)
    for _ in range(3):
        clipper.params["0"].grad = torch.empty(3, device="meta")
        clipper.clip_()
    assert log.step == 3 and len((tmp_path / "clipping.jsonl").read_text().splitlines()) == 1


def test_a_log_cut_off_by_a_crash_is_read_up_to_there(tmp_path):
    (tmp_path / "clipping.jsonl").write_text(json.dumps({"names": ["a"]}) + "\n" + '{"step": 1, "no')
    assert read_clipping_log(tmp_path) == (["a"], [])
    assert read_clipping_log(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize("kind", ["tensor_noise", "loss_burst"])
def test_faults_reach_the_rule_and_the_rule_stops_them(tmp_path, kind):
    moved = {}
    for rule in (None, "adagc"):
        callbacks = [fault_callback(kind, probability=1.0, scale=1e6, first=3)]
        callbacks += [gradient_callback("adagc", {"warmup": 2})] if rule else []
        made = trainer(tmp_path, callbacks, steps=6, save_strategy="no", optim="sgd")
        before = weights(made)
        made.train()
        moved[rule] = max(float((value - before[key]).norm()) for key, value in weights(made).items())
    # Unclipped, the weights leave for good or are no numbers any more.
    assert moved["adagc"] < 0.1 and not moved[None] < 100


@pytest.mark.parametrize("seed", [0, 5])
def test_a_fault_begins_at_its_first_step_and_follows_its_seed(seed):
    model = torch.nn.Linear(4, 3)
    callback = fault_callback("tensor_noise", seed=seed, probability=1.0, scale=2.0, first=3)
    for step in (0, 2, 3, 4):
        for parameter in model.parameters():
            parameter.grad = torch.arange(float(parameter.numel())).reshape(parameter.shape)
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        if step >= 3:
            tensor_noise_(expected, step=step, seed=seed, probability=1.0, scale=2.0)
        callback.on_pre_optimizer_step(None, SimpleNamespace(global_step=step), None, model=model)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected))


def test_bad_batches_follow_their_seed():
    batches = [[Rows()[i], Rows()[i + 1]] for i in range(30)]
    hits = []
    for seed in (0, 1):
        collate = bad_batches(torch.utils.data.default_collate, vocabulary=200, seed=seed, probability=0.3)
        clean = torch.utils.data.default_collate
        hits.append([not torch.equal(collate(b)["input_ids"], clean(b)["input_ids"]) for b in batches])
    assert hits[0] != hits[1] and any(hits[0]) and any(hits[1])


def test_unknown_faults_are_named():
    with pytest.raises(UnsupportedError, match="Known: tensor_noise"):
        fault_callback("gremlins")


def test_bad_batches_are_chosen_by_content():
    collate = bad_batches(torch.utils.data.default_collate, vocabulary=200, probability=0.3)
    rows = [[Rows()[i], Rows()[i + 1]] for i in range(30)]
    clean = [torch.stack([row["input_ids"] for row in batch]) for batch in rows]
    first, second = [collate(batch) for batch in rows], [collate(batch) for batch in reversed(rows)][::-1]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second))
    assert all(torch.equal(a["labels"], ids) for a, ids in zip(first, clean))
    hit = sum(not torch.equal(a["input_ids"], ids) for a, ids in zip(first, clean))
    assert 3 <= hit <= 15 and math.isfinite(hit)
