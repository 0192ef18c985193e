"""What zeroth-order training does not honour is refused, and what it turns off is said, wherever one enters."""

import json
from dataclasses import MISSING, fields
from functools import partial

import pytest
import torch
from test_zeroth_order import ROWS, collator, trainer
from torch import nn
from torch.nn import functional
from transformers import TrainingArguments

from modicum import registry
from modicum.errors import ModicumError, UnsupportedError
from modicum.jobs import execute, plan
from modicum.jobs.training.zeroth_order import ZerothOrderStep, attach_optimizer, zeroth_order_callback
from modicum.jobs.training.zeroth_order_arguments import IGNORED, check_arguments
from modicum.optim import MeZO, TeZO
from modicum.recipe import parse
from support import tiny_llama

FIELDS = {field.name: field for field in fields(TrainingArguments)}
# Read by the loop around the step, by the data loaders, by evaluation, by saving, or by scripts alone.
NAMES = """
output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps
gradient_accumulation_steps label_smoothing_factor bf16 bf16_full_eval fp16_full_eval tf32 torch_compile
torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache auto_find_batch_size
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
train_sampling_strategy length_column_name ddp_broadcast_buffers ddp_backend ddp_timeout debug skip_memory_metrics
do_train do_eval do_predict resume_from_checkpoint local_rank
"""
HONOURED = set(NAMES.split())


def away(name):
    """Return a value of an argument's kind that is not its default."""
    default = FIELDS[name].default
    known = {"optim": "sgd", "fsdp": ["full_shard"], "fsdp_config": {"min_num_params": 1}, "deepspeed": {"stage": 2}}
    if name in known:
        return known[name]
    if isinstance(default, bool) or default in (None, MISSING):
        return default is not True
    return "other" if isinstance(default, str) else default + 1


@pytest.fixture
def made(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")


def test_every_argument_of_the_trainer_is_honoured_or_refused():
    assert not HONOURED & IGNORED.keys()
    # Installed versions differ by a few; each one that is there must have been looked at.
    assert FIELDS.keys() <= HONOURED | IGNORED.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_only_arguments_without_effect_are_refused(name, made):
    check_arguments(made)
    setattr(made, name, away(name))
    if name in HONOURED:
        return check_arguments(made)
    with pytest.raises(UnsupportedError, match=rf"trainer\.{name} is .*, which zeroth-order training would ignore"):
        check_arguments(made)


REFUSED = sorted(IGNORED.keys() & FIELDS.keys())
TOLD = sorted(set(REFUSED) - {"fsdp", "fsdp_config", "deepspeed", "parallelism_config", "fp16"})  # others refuse these


@pytest.mark.parametrize("name", TOLD)
def test_a_trainer_refuses_them(name, tmp_path):
    with pytest.raises(UnsupportedError, match=r"trainer\.\w+ is .*, which zeroth-order training would ignore"):
        trainer(tmp_path, tiny_llama(), **{name: argument(name)})


def argument(name):
    return {"optim_args": "a=1", "optim_target_modules": "all-linear"}.get(name) or (
        {"use_reentrant": False} if name.endswith("kwargs") else away(name)
    )


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_changed_later_are_refused_when_training_begins(name, tmp_path):
    late = trainer(tmp_path, tiny_llama())
    setattr(late.args, name, away(name))
    with pytest.raises(UnsupportedError, match=rf"trainer\.{name} is"):
        late.callback_handler.on_train_begin(late.args, late.state, late.control)


@pytest.mark.parametrize("name", TOLD)
def test_check_and_run_refuse_them_in_a_recipe(name, tiny_model, tmp_path):
    for number, value in enumerate((argument(name), FIELDS[name].default)):
        data = recipe(tiny_model, tmp_path, trainer={name: value})
        off = value in IGNORED[name].off
        if off:
            plan(data)
            continue
        for enter in (plan, partial(execute, folder=tmp_path / str(number), quiet=True)):
            with pytest.raises(ModicumError, match=r"trainer\.(\w+) is .*, which zeroth-order training would ignore"):
                enter(data)


def recipe(model, folder, **changes):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "say", "completion": "abc"}) for _ in range(12)))
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1}
    data = {"job": "train", "model": str(model), "data": str(path), "optimizer": {"name": "mezo", "lr": 1e-3}}
    return parse(data | changes | {"trainer": steps | changes.get("trainer", {})})


@pytest.mark.parametrize("group", ["weight_decay", "betas", "momentum"])
def test_settings_of_a_group_that_nothing_reads_are_refused(group):
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(UnsupportedError, match=f"A parameter group sets {group}, which would be ignored"):
        MeZO([{"params": [weight], group: 0.1}], lr=1e-3)
    MeZO([{"params": [weight], "lr": 0.1, "name": "all"}], lr=1e-3)


# Dropout: as a module, as a rate that a module hands to the function, in attention, in an adapter.


def dropping(kind):
    if kind == "adapter":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    model = tiny_llama(attention_dropout=0.1 if kind == "attention" else 0.0)
    if kind != "attention":
        held = nn.Dropout(0.1) if kind == "module" else Rate()
        model.model.norm = nn.Sequential(model.model.norm, held)
    return model


class Rate(nn.Module):
    dropout: float

    def __init__(self):
        super().__init__()
        self.dropout = 0.1

    def forward(self, x):
        return functional.dropout(x, self.dropout, self.training)


KINDS = ["module", "rate", "attention", "adapter"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_says_that_dropout_is_off(kind, tmp_path):
    with pytest.warns(UserWarning, match="Dropout is off in zeroth-order training"):
        trainer(tmp_path, dropping(kind), max_steps=1).train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["mutate", "adapter", "paired", "jvp"])
def test_an_optimizer_refuses_a_model_whose_dropout_is_active(kind, engine):
    optimizer = TeZO(dropping(kind).named_parameters(), lr=1e-3, rank=2, engine=engine)
    with pytest.raises(UnsupportedError, match=r"is in training mode, so the two losses .* differ by chance"):
        optimizer.attach(dropping(kind).train())


@pytest.mark.parametrize("name", registry.zeroth_order)
@pytest.mark.filterwarnings("ignore:The rank is larger")
def test_an_optimizer_without_a_model_refuses_a_closure_that_draws(name):
    entry = registry.zeroth_order[name]
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).double()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = entry.function(model.named_parameters(), **entry.knobs({"lr": 1e-3}))
    with pytest.raises(UnsupportedError, match=r"draws random numbers, .*model\.eval\(\)"):
        optimizer.step(lambda: model(torch.ones(3, 6).double()).square().sum())
    for now, before in zip(model.parameters(), start):  # the probe was taken out again
        torch.testing.assert_close(now.detach(), before, rtol=0, atol=1e-12)

    def seeded():
        torch.manual_seed(5)
        return model(torch.ones(3, 6).double()).square().sum()

    optimizer.step(seeded)
    optimizer.settle_()
    model.eval()
    optimizer.step(lambda: model(torch.ones(3, 6).double()).square().sum())


def test_a_run_notes_that_dropout_is_off(tiny_model, tmp_path):
    data = recipe(tiny_model, tmp_path, adapter={"rank": 2, "config": {"lora_dropout": 0.1}})
    run = execute(data, tmp_path / "run", quiet=True)
    assert any("Dropout is off" in note for note in run.record["notes"])
    plain = execute(recipe(tiny_model, tmp_path), tmp_path / "plain", quiet=True)
    assert not any("Dropout" in note for note in plain.record.get("notes", []))


def logged(folder, *, size, parts, **arguments):
    """Return the losses of three steps on batches of four rows with very uneven numbers of targets."""
    counts = [1 + 8 * (i % 4 == 3) for i in range(len(ROWS))]
    labels = [torch.where(torch.arange(10) < 1 + count, row["labels"], -100) for row, count in zip(ROWS, counts)]
    rows = [row | {"labels": label} for row, label in zip(ROWS, labels)]
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
    made = trainer(folder, tiny_llama().double(), max_steps=3, logging_steps=1, rows=rows, **split, **arguments)
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line]


@pytest.mark.parametrize("optimizer", [{}, {"engine": "adapter"}, {"engine": "paired"}])
def test_the_logged_loss_does_not_depend_on_the_split(optimizer, tmp_path):
    whole = logged(tmp_path, size=4, parts=1, optimizer=optimizer)
    for size, parts in ((2, 2), (1, 4)):
        split = logged(tmp_path, size=size, parts=parts, optimizer=optimizer)
        # The model computes its loss in float32.
        assert split == pytest.approx(whole, rel=2e-4)


@pytest.mark.parametrize("optimizer", [{"engine": "adapter"}, {"passes": 2}])
def test_the_best_model_is_the_one_that_was_saved(optimizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 9}
    made = trainer(tmp_path, model, eval_dataset=ROWS[:4], optimizer={"lr": 1e-3} | optimizer, **often, **best)
    made.train()
    saved = AutoModelForCausalLM.from_pretrained(made.state.best_model_checkpoint).eval()
    for (name, now), (_, then) in zip(model.named_parameters(), saved.named_parameters()):
        assert torch.equal(now, then), name


def test_the_step_and_the_callback_alone_check_too(tmp_path):
    from modicum.jobs.training.trainer import PartsTrainer

    model = tiny_llama()
    optimizer = attach_optimizer("mezo", {"lr": 1e-3}, model)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", weight_decay=0.1)
    given = {"train_dataset": ROWS, "data_collator": collator, "optimizers": (optimizer, None)}
    with pytest.raises(UnsupportedError, match=r"trainer\.weight_decay is 0\.1"):
        PartsTrainer(
            model=model,
            args=args,
            own_step=ZerothOrderStep(optimizer),
            callbacks=[zeroth_order_callback(optimizer)],
            **given,
        )
