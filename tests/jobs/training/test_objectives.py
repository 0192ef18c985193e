import copy

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from modicum.errors import ModicumError, UnsupportedError
from modicum.jobs.training.objective import (
    LabelHead,
    build_collator,
    complete_knobs,
    finish_model,
    hook_model,
    lora_options,
    use_objective,
)
from modicum.objectives import meap_sft_loss
from support import byte_tokenizer, tiny_llama


def data(count=8, length=24):
    ids = torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def chats(count=8):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 250, (70,), generator=generator).tolist() for _ in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 8 + row[8:] for row in rows]})


def pad(features):
    return {key: torch.tensor([f[key] for f in features]) for key in features[0]} | {
        "attention_mask": torch.ones(len(features), len(features[0]["input_ids"]), dtype=torch.long)
    }


class Watch(TrainerCallback):
    """Keep every batch that reaches the model, and whether the model was training."""

    def __init__(self, model):
        self.seen = []
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs):
        self.seen.append((module.training, kwargs["input_ids"].clone()))


def trainer_for(tmp_path, model, dataset, *, collator=None, tokenizer=None, **arguments):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "seed": 3,
    } | arguments
    tokenizer = tokenizer or byte_tokenizer()
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        data_collator=collator or DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        train_dataset=dataset,
        eval_dataset=data(4),
    )


def test_a_stock_trainer_masks_in_training_and_never_in_evaluation(tmp_path):
    model = tiny_llama()
    watch = Watch(model)
    trainer = trainer_for(tmp_path, model, data(), eval_strategy="steps", eval_steps=2, eval_on_start=True)
    collator = use_objective(trainer, "meap", ratio=0.25)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    shares = {True: set(), False: set()}
    for training, ids in watch.seen:
        shares[training].add(tuple((ids == 259).sum(-1).tolist()))
    assert shares == {True: {(5, 5)}, False: {(0, 0, 0, 0)}}
    assert not collator.training


def test_every_epoch_masks_anew_and_the_same_again_after_a_resume(tmp_path):
    def run(folder, stop=None, resume=None):
        model = tiny_llama()
        watch = Watch(model)
        trainer = trainer_for(
            tmp_path / folder, model, data(6), max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="no"
        )
        use_objective(trainer, "meap", ratio=0.25)
        if stop:
            trainer.add_callback(Stop(stop))
        trainer.train(resume_from_checkpoint=resume)
        return [ids for _, ids in watch.seen], model

    class Stop(TrainerCallback):
        def __init__(self, at):
            self.at = at

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= self.at

    whole, model = run("whole")
    first, _ = run("cut", stop=2)
    rest, resumed = run("cut", resume=True)
    assert len(whole) == 6 and all(torch.equal(a, b) for a, b in zip(whole, first + rest))
    clean = {tuple(row) for row in data(6)["input_ids"]}
    epochs = [{tuple(row) for ids in part for row in ids.tolist()} for part in (whole[:3], whole[3:])]
    assert len(epochs[0]) == 6 and not epochs[0] & epochs[1] and not epochs[0] & clean
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_loader_workers_give_the_masks_of_the_main_process(tmp_path):
    seen = []
    for workers in (0, 1):
        model = tiny_llama()
        watch = Watch(model)
        trainer = trainer_for(
            tmp_path, model, data(), dataloader_num_workers=workers, eval_strategy="steps", eval_steps=1, max_steps=6
        )
        use_objective(trainer, "meap", ratio=0.25)
        trainer.train()
        seen.append([ids for training, ids in watch.seen if training])
    assert len(seen[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*seen))
    assert all((ids == 259).any() for ids in seen[0])


def test_the_warmup_of_masked_thought_follows_the_trainers_steps(tmp_path):
    model = tiny_llama()
    watch = Watch(model)
    trainer = trainer_for(
        tmp_path, model, data(64, 60), max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    use_objective(trainer, "masked_thought", ratio=0.6)
    trainer.train()
    shares = [float((ids == 259).double().mean()) for _, ids in watch.seen]
    assert shares[:2] == [0, 0]
    assert shares == pytest.approx([0, 0, 0.15, 0.15, 0.3, 0.3, 0.45, 0.45, 0.6, 0.6, 0.6, 0.6], abs=0.1)


def test_the_head_sees_labelled_positions_alone_and_the_loss_is_the_same(tmp_path):
    sizes = []
    losses = []
    for gather in (True, False):
        model = tiny_llama().train()
        collator = build_collator(
            pad, "meap_sft", {"ratio": 0.1}, seed=0, tokenizer=byte_tokenizer(), model=model, gather_labels=gather
        )
        batch = collator(list(chats(3)))
        labels = batch.pop("labels")
        head = LabelHead(model)
        model.get_output_embeddings().register_forward_hook(lambda m, a, out: sizes.append(out.shape[1]))
        loss = head(model(**batch), labels)
        loss.backward()
        losses.append((loss.detach(), model.get_input_embeddings().weight.grad.clone()))
        head.detach()
    items = 3 * (62 + 6)
    assert sizes == [items, 70]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)


def test_a_trainer_takes_the_gathered_loss_and_masked_weight(tmp_path):
    trainer = trainer_for(
        tmp_path, tiny_llama(), chats(), collator=pad, gradient_accumulation_steps=2, eval_strategy="no"
    )
    use_objective(trainer, "meap_sft", masked_weight=0.5)
    assert trainer.train().training_loss > 0
    trainer.eval_dataset = chats(4)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_split_of_a_step_into_batches_does_not_change_the_update(tmp_path):
    updated = []
    for size in (4, 2, 1):
        model = tiny_llama()
        settings = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 4 // size,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.5,
            "max_grad_norm": 0.0,
        }
        trainer = trainer_for(tmp_path, model, chats(), collator=pad, **settings)
        use_objective(trainer, "meap_sft", masked_weight=0.3)
        trainer.train()
        updated.append(model.get_input_embeddings().weight.detach())
    assert not torch.equal(updated[0], tiny_llama().get_input_embeddings().weight)
    for other in updated[1:]:
        torch.testing.assert_close(other, updated[0], atol=1e-6, rtol=1e-5)


def test_lora_gathers_the_labelled_positions_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    tokenizer, model = byte_tokenizer(), tiny_llama()
    knobs = complete_knobs("meap_sft", {}, tokenizer=tokenizer, model=model)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **lora_options(knobs))
    )
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.shape[:2]))
    trainer = trainer_for(tmp_path, model, chats(), collator=pad, tokenizer=tokenizer, max_steps=1)
    use_objective(trainer, "meap_sft", **knobs)
    trainer.train()
    assert seen == [(1, 2 * (62 + 6))]


def test_the_gathered_loss_equals_the_plain_function(tmp_path):
    model = tiny_llama()
    knobs = {"masked_weight": 0.3, "mask_token_id": 260, "protect_ids": ()}
    collator = build_collator(
        pad, "meap_sft", knobs, seed=0, tokenizer=byte_tokenizer(), model=model, gather_labels=True
    )
    batch = collator(list(chats(2)))
    labels = batch.pop("labels")
    head = LabelHead(model)
    gathered = head(model(**batch), labels, num_items_in_batch=100)
    plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    masked = torch.tensor([False, True, False, True])
    expected = meap_sft_loss(plain, labels, masked, masked_weight=0.3, num_items=100)
    torch.testing.assert_close(gathered, expected)


def test_masked_weight_without_its_loss_is_refused():
    collator = build_collator(
        pad, "meap_sft", {"masked_weight": 0.5}, seed=0, tokenizer=byte_tokenizer(), model=tiny_llama()
    )
    with pytest.raises(UnsupportedError, match="masked_weight"):
        collator(list(chats(2)))


def test_fine_tuning_draws_once_where_it_is_told_to():
    def epochs(**knobs):
        collator = build_collator(pad, "meap_sft", knobs, seed=0, tokenizer=byte_tokenizer(), model=tiny_llama())
        out = []
        for epoch in range(2):
            collator.start_epoch(epoch)
            out.append(collator(list(chats(2)))["input_ids"])
        return out

    assert torch.equal(*epochs(redraw_each_epoch=False)) and not torch.equal(*epochs())


def test_lora_learns_the_masks_row_and_the_export_fits_the_base(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    tokenizer = byte_tokenizer()
    base = tiny_llama(vocab_size=len(tokenizer))
    untouched = copy.deepcopy(base)
    knobs = complete_knobs("meap", {"ratio": 0.25}, tokenizer=tokenizer, model=base)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **lora_options(knobs))
    model = get_peft_model(base, config)
    rows = [p for n, p in model.named_parameters() if "trainable_tokens" in n]
    assert len(rows) == 1 and rows[0].shape == (1, 32)
    before = rows[0].detach().clone()
    trainer = trainer_for(tmp_path, model, data(), tokenizer=tokenizer)
    use_objective(trainer, "meap", **knobs)
    trainer.train()
    assert not torch.equal(before, rows[0].detach())
    ids = torch.tensor([[5, 6, 7, 8]])
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits[..., :259]
        finish_model(model, mask_token_id=knobs["mask_token_id"], rows=259)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(untouched, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, trained)


def test_a_full_model_is_delivered_without_the_mask(tmp_path):
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    trainer = trainer_for(tmp_path, model, data(), tokenizer=tokenizer)
    use_objective(trainer, "meap")
    trainer.train()
    assert model.config.vocab_size == 260
    finish_model(model, mask_token_id=259, rows=259)
    assert model.config.vocab_size == 259 == model.get_input_embeddings().weight.shape[0]


def test_a_mask_with_a_row_of_its_own_is_suppressed_in_generation():
    model = tiny_llama()
    finish_model(model, mask_token_id=259, rows=264)
    assert model.generation_config.suppress_tokens == [259]


@pytest.mark.parametrize("name", ["neftune", "dropout"])
def test_hooks_change_training_forwards_and_no_others(name):
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = model.eval()(input_ids=ids).logits
        handles = hook_model(model, name, {}, seed=0)
        assert torch.equal(model(input_ids=ids).logits, plain)
        first, second = (model.train()(input_ids=ids).logits for _ in range(2))
        assert not torch.equal(first, plain) and not torch.equal(first, second)
        for handle in handles:
            handle.remove()
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("name", ["ntp", "neftune", "dropout", "token_dropout"])
def test_the_baselines_train_under_a_stock_trainer(tmp_path, name):
    trainer = trainer_for(tmp_path, tiny_llama(), data(), max_steps=2)
    use_objective(trainer, name)
    assert trainer.train().training_loss > 0


def test_knobs_are_completed_from_the_model_and_the_tokenizer():
    knobs = complete_knobs("meap", {"ratio": 0.3}, tokenizer=byte_tokenizer(), model=tiny_llama())
    assert knobs["mask_token_id"] == 259 and knobs["protect_ids"] == (0, 1, 2) and knobs["ratio"] == 0.3
    reference = complete_knobs("meap", {"scope": "reference"}, tokenizer=byte_tokenizer(), model=tiny_llama())
    assert reference["protect_ids"] == ()
    random = complete_knobs("token_dropout", {}, tokenizer=byte_tokenizer(), model=tiny_llama())
    assert random["vocab_size"] == 259 and random["mask_token_id"] is None


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"ratio": 1.2}, "ratio"),
        ({"rate": 0.2}, "unknown key 'rate'"),
        ({"mask_token_id": 2}, "eos_token_id"),
        ({"mask_token_id": 264}, "has no embedding"),
    ],
)
def test_wrong_knobs_are_refused_before_training(knobs, says):
    with pytest.raises(ModicumError, match=says):
        complete_knobs("meap", knobs, tokenizer=byte_tokenizer(), model=tiny_llama())


def test_isolated_copies_need_an_attention_that_takes_a_free_mask():
    model = tiny_llama()
    model.config._attn_implementation = "eager"
    knobs = {"layout": "concat", "concat_attend": "isolated"}
    with pytest.raises(UnsupportedError, match="expected 'sdpa'"):
        complete_knobs("meap_sft", knobs, tokenizer=byte_tokenizer(), model=model)
