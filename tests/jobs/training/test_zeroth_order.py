import copy
import math

import pytest
import torch

from modicum import registry
from modicum.errors import ModicumError, UnsupportedError
from modicum.jobs import execute
from modicum.jobs.training.zeroth_order import (
    attach_optimizer,
    check_knobs,
    export_lora,
    paired_losses,
    zeroth_order_trainer,
)
from modicum.optim import TeZO
from modicum.recipe import parse, read
from modicum.record import read_log
from support import tiny_llama

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(5, 60, (24, 10), generator=torch.Generator().manual_seed(0))
]


def collator(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trainer(folder, model, name="tezo", *, optimizer=None, eval_dataset=None, rows=ROWS, **arguments):
    from transformers import TrainingArguments

    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 2,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            "seed": 0,
            **arguments,
        },
    )
    knobs = {"lr": 1e-2, **({"rank": 4} if name == "tezo" else {}), **(optimizer or {})}
    data = {"train_dataset": rows, "eval_dataset": eval_dataset, "data_collator": collator}
    return zeroth_order_trainer(name, knobs, model=model, args=args, **data)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", [{}, {"engine": "adapter"}, {"engine": "paired"}, {"passes": 2}])
def test_engines_agree_and_learn_inside_the_trainer(tmp_path, optimizer):
    model = tiny_llama().double()
    reference = copy.deepcopy(model)
    trainer(tmp_path, reference, max_steps=4).train()
    made = trainer(tmp_path, model, optimizer=optimizer, max_steps=4)
    made.train()
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(flat(model), flat(reference), rtol=0, atol=1e-9)


def test_the_loss_falls(tmp_path):
    made = trainer(tmp_path, tiny_llama(), max_steps=60, logging_steps=10, optimizer={"lr": 1e-3, "engine": "adapter"})
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@pytest.mark.parametrize("optimizer", [{"variant": "momentum", "engine": "adapter"}, {"variant": "adam", "passes": 2}])
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path, optimizer):
    whole, resumed = tiny_llama(), tiny_llama()
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer(tmp_path / "whole", whole, optimizer=optimizer, **saving).train()
    again = trainer(tmp_path / "again", resumed, optimizer=optimizer, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(flat(whole), flat(resumed))


@pytest.mark.parametrize("uneven", [False, True])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, uneven):
    def labelled(row, count):
        return {**row, "labels": torch.where(torch.arange(10) < count, row["labels"], -100)}

    rows = [labelled(row, 3 + 6 * (i % 2)) for i, row in enumerate(ROWS)] if uneven else ROWS
    one, many = tiny_llama().double(), tiny_llama().double()
    whole = trainer(tmp_path, one, max_steps=3, rows=rows, logging_steps=1)
    whole.train()
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    split = trainer(tmp_path, many, max_steps=3, rows=rows, logging_steps=1, **parts)
    split.train()
    # The model computes its loss in float32, so the coefficients agree to about 1e-4.
    assert (flat(one) - flat(tiny_llama().double())).abs().max() > 1e-2
    torch.testing.assert_close(flat(one), flat(many), rtol=0, atol=3e-4)
    losses = [[line["loss"] for line in made.state.log_history if "loss" in line] for made in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_paired_losses_follow_the_kept_positions():
    model = tiny_llama().eval()
    batch = collator(ROWS[:3])
    kept = {"logits_to_keep": torch.tensor([2, 5]), "shift_labels": batch["labels"][:, [3, 6]], **batch}
    expected = model(**kept).loss
    torch.testing.assert_close(paired_losses(model, kept, 2), torch.stack([expected, expected]))


def test_a_checkpoint_holds_the_trained_model(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    trainer(tmp_path, model, optimizer={"engine": "adapter"}, save_strategy="steps", save_steps=6).train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").eval()
    ids = ROWS[0]["input_ids"][None]
    torch.testing.assert_close(saved(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_evaluation_sees_settled_weights(tmp_path):
    model = tiny_llama().double()
    often = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "eval_dataset": ROWS[:4]}
    made = trainer(tmp_path, model, optimizer={"lr": 0.0, "passes": 2}, **often)
    plain = tiny_llama().double()(**collator(ROWS[:4])).loss.item()
    made.train()
    values = [line["eval_loss"] for line in made.state.log_history if "eval_loss" in line]
    assert values == pytest.approx([plain, plain], rel=1e-12)


def test_a_loss_that_is_not_finite_is_counted_then_stops_the_run(tmp_path):
    made = trainer(tmp_path, tiny_llama(), max_steps=20, logging_steps=1)
    made.compute_loss_func = lambda *_, **__: torch.tensor(math.nan)
    with pytest.raises(ModicumError, match="NaN or infinite in 10 steps in a row"):
        made.train()
    assert any(line.get("skipped_steps") for line in made.state.log_history)


KNOBS = [
    *({"engine": engine} for engine in ("mutate", "adapter", "paired", "jvp")),
    *({"engine": engine, "weight_decay": 0.1} for engine in ("mutate", "adapter")),
    *({"engine": engine, "passes": 2} for engine in ("mutate", "adapter")),
    *({"engine": engine, "parallel": "query"} for engine in ("mutate", "adapter")),
    *({"variant": variant, "passes": 2} for variant in ("momentum", "adam")),
]


@pytest.mark.filterwarnings("ignore:The rank is larger")
@pytest.mark.parametrize("name", registry.zeroth_order)
def test_knobs_are_refused_without_a_model_as_they_are_with_one(name):
    def outcome(function, *values):
        try:
            function(name, *values)
        except ModicumError as error:
            return str(error)
        return None

    for given in KNOBS:
        try:
            knobs = registry.zeroth_order[name].knobs({"lr": 1e-3, "exclude": ["embed"]} | given)
        except ModicumError:
            continue  # refused as the recipe is parsed
        assert outcome(check_knobs, knobs) == outcome(attach_optimizer, knobs, tiny_llama())


def test_sharded_trainers_are_refused(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args.fsdp = ["full_shard"]
    with pytest.raises(UnsupportedError, match="one process or with DDP"):
        zeroth_order_trainer("tezo", {"lr": 1e-3}, model=tiny_llama(), args=args)


def learned(model, **knobs):
    optimizer = TeZO(model.named_parameters(), lr=1e-2, rank=4, engine="adapter", **knobs)
    optimizer.attach(model)
    ids = ROWS[0]["input_ids"][None]
    for _ in range(5):
        optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    return optimizer, ids


def test_what_was_learned_loads_as_a_lora(tmp_path):
    from peft import PeftModel

    model = tiny_llama().eval()
    optimizer, ids = learned(model, vectors="freeze", exclude=["embed", "norm"])
    export_lora(optimizer, tmp_path / "adapter", base="tiny")
    loaded = PeftModel.from_pretrained(tiny_llama().eval(), str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny_llama().eval()(ids).logits, model(ids).logits, atol=1e-4)


def test_what_a_lora_cannot_hold_is_named(tmp_path):
    optimizer, _ = learned(tiny_llama().eval())
    with pytest.raises(UnsupportedError, match="is not the weight of one linear layer"):
        export_lora(optimizer, tmp_path, base="tiny")
    with pytest.raises(UnsupportedError, match="Only a run with engine="):
        export_lora(TeZO(tiny_llama().named_parameters(), lr=1e-3, rank=2), tmp_path, base="tiny")


def shipped(folder, **changes):
    """Run the shipped recipe; return its measurements before and after, and what a step cost."""
    recipe = read("forward-only")
    recipe["trainer"] |= {"save_strategy": "no", "use_cpu": True, **changes.pop("trainer", {})}
    run = execute(parse(recipe | changes), folder, quiet=True)
    metrics = run.record["metrics"]
    return read_log(run.folder, "eval")[0], metrics, metrics["zeroth_order"]


def test_the_shipped_recipe_runs(tiny_model, tmp_path):
    # The tiny tokenizer cuts the label words into letters, so they are compared as candidates.
    changes = {"model": str(tiny_model), "objective": "multiple_choice", "trainer": {"max_steps": 2}}
    data = {"path": "task:polarity", "size": 8}
    before, after, costs = shipped(tmp_path / "run", data=data, eval_data=data | {"split": "test"}, **changes)
    assert before["step"] == 0 and before["eval_loss"] != after["eval_loss"]
    assert costs["weight_passes_per_step"] == 0 and costs["forwards_per_step"] == 2


@pytest.mark.slow
def test_the_shipped_recipe_teaches_the_real_model(tmp_path):
    before, after, _ = shipped(tmp_path / "run")
    assert after["eval_loss"] < 0.75 * before["eval_loss"]
    assert after["eval_accuracy"] >= before["eval_accuracy"] + 0.1
