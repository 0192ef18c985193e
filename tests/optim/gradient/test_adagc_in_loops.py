"""AdaGC in the loops people write: every optimiser, loss scaling, accumulation, LoRA, and the step inside backward."""

import warnings

import pytest
import torch

from modicum.errors import UnsupportedError
from modicum.optim import AdaGC
from modicum.optim.gradient.backward import BackwardStep
from modicum.optim.gradient.make import make_clipper
from support import tiny_llama

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-2),
}


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, generator=g), torch.randint(3, (16,), generator=g)


def loss_of(model, step):
    x, y = batch(step)
    return torch.nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_equals_called_by_hand(name):
    results = []
    for attached in (True, False):
        model = net()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        clipper = AdaGC(model.named_parameters(), warmup=3)
        if attached:
            clipper.attach(optimizer)
        for step in range(8):
            loss_of(model, step).backward()
            if not attached:
                clipper.clip_()
            optimizer.step()
            optimizer.zero_grad()
        assert clipper.state.step == 8
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_detached_it_clips_no_more():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = AdaGC(model.parameters(), absolute=1e-9).attach(optimizer)
    clipper.detach()
    loss_of(model, 0).backward()
    optimizer.step()
    assert clipper.state is None and model[0].weight.grad.norm() > 1e-6


def test_attaching_twice_or_to_a_stranger_is_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = AdaGC(model.parameters()).attach(optimizer)
    with pytest.raises(UnsupportedError, match="attached already"):
        clipper.attach(optimizer)
    with pytest.raises(UnsupportedError, match="holds none of the 4 parameters"):
        AdaGC(net().parameters()).attach(optimizer)


@pytest.mark.parametrize("name", ["adagc", "zclip", "agc", "agc_update"])
def test_two_clippers_on_one_optimiser_warn_unless_they_share_nothing(name):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    first = make_clipper(name, model[0].named_parameters()).attach(optimizer)
    AdaGC(model[2].named_parameters()).attach(optimizer)
    second = AdaGC(model[0].named_parameters())
    with pytest.warns(UserWarning, match=f"A {type(first).__name__} is attached .* twice"):
        second.attach(optimizer)
    second.detach()
    first.detach()
    AdaGC(model[0].named_parameters()).attach(optimizer)


@pytest.mark.parametrize("limit", [1.0, 0.0])
@pytest.mark.parametrize("early", [True, False])
def test_a_clipper_on_the_optimiser_of_a_trainer_that_clips_warns(tmp_path, limit, early):
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Attach(TrainerCallback):
        def on_train_begin(self, _args, _state, _control, **given):
            AdaGC(given["model"].named_parameters()).attach(given["optimizer"])

    settings = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), max_grad_norm=limit, dataloader_pin_memory=False, **settings)
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[5, 6, 7]] * 2})
    callbacks = [] if early else [Attach()]
    trainer = Trainer(model=tiny_llama(), args=arguments, train_dataset=rows, callbacks=callbacks)
    if early:
        AdaGC(trainer.model.named_parameters()).attach(trainer.create_optimizer())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(each.message) for each in caught if "clipped twice" in str(each.message)]
    assert len(told) == (limit > 0) and all("max_grad_norm is 1.0" in each for each in told)


def test_a_closure_is_refused_because_it_computes_gradients_too_late():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaGC(model.parameters()).attach(optimizer)
    with pytest.raises(UnsupportedError, match=r"step\(closure\)"):
        optimizer.step(lambda: loss_of(model, 0))


def test_works_through_accelerates_wrapper():
    from accelerate import Accelerator

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    clipper = AdaGC(model.named_parameters()).attach(wrapped)
    loss_of(model, 0).backward()
    wrapped.step()
    assert clipper.state.step == 1 and "gamma.0.weight" in clipper.state_dict()


def test_accumulated_gradients_are_clipped_once():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = AdaGC(model.parameters()).attach(optimizer)
    for step in range(4):
        (loss_of(model, step) / 4).backward()
    optimizer.step()
    assert clipper.state.step == 1


def test_loss_scaling_is_undone_before_clipping_and_overflows_are_not_seen():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = AdaGC(model.parameters(), absolute=1e9).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0)).backward()
    reference = torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    scaler.step(optimizer)
    scaler.update()
    assert torch.allclose(clipper.state.gamma, torch.stack([g.norm() for g in reference]), rtol=1e-5)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.zeros(1))
    scaler.step(optimizer)
    scaler.update()
    assert clipper.state.step == 1


def test_a_fused_optimizer_with_scaled_gradients_is_refused_until_they_are_unscaled():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = AdaGC(model.parameters()).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(UnsupportedError, match="unscale_"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    del optimizer.grad_scale, optimizer.found_inf
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert clipper.state.step == 1


def lora(literal, steps=60):
    """Train two factors, the second from zero; return how far the first moves after the warm-up."""
    torch.manual_seed(0)
    weight, target = torch.randn(6, 6), torch.randn(6, 6)
    factors = {"A": torch.nn.Parameter(torch.randn(2, 6)), "B": torch.nn.Parameter(torch.zeros(6, 2))}
    start = factors["A"].detach().clone()
    optimizer = torch.optim.SGD(factors.values(), lr=0.05)
    knobs = {"init": "min", "ignore_zero": False} if literal else {}
    AdaGC(factors.items(), warmup=20, **knobs).attach(optimizer)
    for step in range(steps):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        error = x @ (weight + factors["B"] @ factors["A"] - target)
        error.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 19:
            start = factors["A"].detach().clone()
    return (factors["A"].detach() - start).norm().item()


def test_zero_initialized_matrix_still_moves():
    assert lora(literal=False) > 0.1


def test_the_literal_rule_freezes_loras_first_factor():
    assert lora(literal=True) == 0


def in_backward(steps, warmup=3, **knobs):
    model = net()
    clipper = AdaGC(model.named_parameters(), warmup=warmup, **knobs)
    stepper = BackwardStep(clipper, lambda params: torch.optim.AdamW(params, lr=1e-2))
    kept = []
    for step in range(steps):
        loss_of(model, step).backward()
        kept.append(sum(p.grad is not None for p in model.parameters()))
        stepper.step()
    return model, clipper, kept


def test_stepping_inside_backward_equals_stepping_after_it_and_frees_the_gradients():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper = AdaGC(model.named_parameters(), warmup=3).attach(optimizer)
    for step in range(8):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    other, theirs, kept = in_backward(8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert torch.equal(clipper.state.gamma, theirs.state.gamma) and theirs.state.step == 8
    assert kept == [4, 4, 4, 0, 0, 0, 0, 0]


def test_stepping_inside_backward_from_the_first_pass_on_counts_every_step():
    _, clipper, kept = in_backward(3, warmup=0)
    assert clipper.state.step == 3 and kept == [0, 0, 0]
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain = AdaGC(model.named_parameters(), warmup=0).attach(optimizer)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(plain.state.gamma, clipper.state.gamma)


@pytest.mark.parametrize("warmup", [0, 5])
def test_accumulating_where_every_backward_pass_is_a_step_warns_once(warmup):
    model = net()
    stepper = BackwardStep(
        AdaGC(model.named_parameters(), warmup=warmup), lambda params: torch.optim.SGD(params, lr=1e-2)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            loss_of(model, step).backward()
            if step % 2:
                stepper.step()
    assert [("second gradient before step()" in str(each.message)) for each in caught] == [True]


def test_stepping_inside_backward_needs_local_clipping():
    for knobs in ({"granularity": "global"}, {"groups": {"[02]": "x"}}):
        with pytest.raises(UnsupportedError, match="each tensor alone"):
            in_backward(1, **knobs)
    with pytest.raises(UnsupportedError, match="nonfinite is 'raise'"):
        in_backward(1, nonfinite="raise")
