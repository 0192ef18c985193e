"""Draws of objectives in training: named, so that computing again, accumulating and resuming give the same ones."""

import inspect

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from modicum.jobs.training.objective import Moment, hook_model, use_objective
from modicum.registry import objective
from support import byte_tokenizer, tiny_llama

DRAWING = sorted(
    name
    for name, entry in objective.items()
    if "rng" in inspect.signature(entry.function).parameters and entry.facts.acts_on not in ("answers", "contrasts")
)
INSIDE = [name for name in DRAWING if objective[name].facts.acts_on != "input_ids"]
CHECKPOINTING = [
    {},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
]


def rows(count=20):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (60,), generator=generator).tolist() for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 8 + row[8:] for row in ids]})


def trained(folder, name, *, resume=None, model=None, data=None, **arguments):
    """Return the weights after 4 steps of 2 micro-batches, over the border of an epoch."""
    tokenizer = byte_tokenizer()
    settings = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    trainer = Trainer(
        model=model or tiny_llama(),
        args=TrainingArguments(output_dir=str(folder), **settings | arguments),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        train_dataset=data or rows(),
    )
    use_objective(trainer, name, **({"min_answer_tokens": 0} if name == "meap_sft" else {}))
    trainer.train(resume_from_checkpoint=resume)
    return {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}


def test_objectives_that_draw_are_found():
    assert {"dropout", "neftune", "meap", "token_dropout"} <= set(DRAWING) and INSIDE == ["dropout", "neftune"]


@pytest.mark.parametrize("name", DRAWING)
def test_resumed_and_recomputed_runs_are_the_run(tmp_path, name):
    whole = trained(tmp_path, name, save_strategy="steps", save_steps=1)
    for step in (1, 3):
        resumed = trained(tmp_path / "again", name, resume=str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    for arguments in CHECKPOINTING[1:]:
        again = trained(tmp_path / "again", name, **arguments)
        for key, value in whole.items():
            torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_loop_of_ones_own_draws_anew_in_each_forward_and_the_same_in_its_backward(name, reentrant):
    def gradients(checkpointing):
        model = tiny_llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        hook_model(model, name, {}, seed=0)
        ids = torch.arange(5, 37).reshape(2, 16)
        found = []
        for _ in range(2):
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return found

    plain, again = gradients(False), gradients(True)
    assert not torch.equal(*plain)
    for one, other in zip(plain, again):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", INSIDE)
def test_steps_micro_batches_rows_and_processes_have_draws_of_their_own(name):
    model, ids = tiny_llama().train(), torch.full((2, 8), 7)
    moment = Moment()
    hook_model(model, name, {}, seed=0, moment=moment)
    seen = []
    for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        moment.step, moment.micro_batch, moment.process = place
        with torch.no_grad():
            seen.append(model(input_ids=ids).logits)
    assert torch.equal(seen[0], seen[-1])
    different = [row for logits in seen[:-1] for row in logits]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


@pytest.mark.parametrize("name", INSIDE)
def test_every_micro_batch_of_a_training_has_a_draw_of_its_own_and_the_seeds(tmp_path, name):
    seen = []
    for seed in (3, 4):
        model = tiny_llama()
        model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[2].detach()))
        data = Dataset.from_dict({"input_ids": [[7] * 8] * 4, "labels": [[7] * 8] * 4})
        trained(tmp_path, name, model=model, data=data, seed=seed, learning_rate=0.0, per_device_train_batch_size=1)
    assert len(seen) == 16
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_modules_have_draws_of_their_own():
    model, dropped = tiny_llama().train(), []
    hook_model(model, "dropout", {"ratio": 0.5}, seed=0)
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            module.register_forward_hook(lambda *given: dropped.append(given[2]))
    model(input_ids=torch.arange(5, 21)[None])
    zeros = [(output[0] if isinstance(output, tuple) else output) == 0 for output in dropped]
    assert len(zeros) == 4 and not any(torch.equal(a, b) for i, a in enumerate(zeros) for b in zeros[:i])
