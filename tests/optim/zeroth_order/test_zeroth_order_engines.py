"""Every engine computes the same run; the adapter engines do so without touching the weights."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from zeroth_order_models import IDS, LABELS, ScaleRMSNorm, flat, paired_task, task, tied, train

from modicum.errors import UnsupportedError
from modicum.optim import LOZO, MeZO, SubZero, TeZO
from modicum.optim.zeroth_order.engines import expand_batch, trainable_weights
from support import tiny_llama

FAMILY = {
    "tezo": (TeZO, {"rank": 3}),
    "tezo-momentum": (TeZO, {"rank": 3, "variant": "momentum"}),
    "tezo-factor-adam": (TeZO, {"rank": 3, "variant": "factor_adam"}),
    "tezo-adam": (TeZO, {"rank": 3, "variant": "adam"}),
    "tezo-refresh": (TeZO, {"rank": 3, "refresh_every": 7}),
    "tezo-queries": (TeZO, {"rank": 3, "queries": 3}),
    "lozo": (LOZO, {"rank": 2, "refresh_every": 7}),
    "subzero": (SubZero, {"rank": 3, "refresh_every": 9}),
    "subzero-plus": (SubZero, {"rank": 3, "variant": "adam", "queries": 3, "sides": 1, "scale": "none"}),
}


@pytest.mark.parametrize("engine", ["adapter", "paired"])
@pytest.mark.parametrize("name", FAMILY)
def test_adapter_engines_equal_the_mutating_engine(name, engine):
    method, knobs = FAMILY[name]
    mutated, kappas, _ = train(method, steps=50, lr=1e-3, **knobs)
    adapted, other, _ = train(method, steps=50, lr=1e-3, engine=engine, **knobs)
    torch.testing.assert_close(flat(adapted), flat(mutated), rtol=0, atol=1e-12)
    torch.testing.assert_close(other, kappas, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", [ScaleRMSNorm, nn.RMSNorm])
@pytest.mark.parametrize("engine", ["adapter", "paired"])
def test_every_kind_of_norm_is_perturbed(norm, engine):
    model = tied(norm)
    mutated, _, _ = train(TeZO, steps=20, model=model, rank=2)
    adapted, _, _ = train(TeZO, steps=20, model=model, rank=2, engine=engine)
    torch.testing.assert_close(flat(adapted), flat(mutated), rtol=0, atol=1e-12)
    assert not torch.equal(model.norm.weight, adapted.norm.weight)


@pytest.mark.parametrize(("method", "knobs"), [(TeZO, {"rank": 3}), (MeZO, {}), (LOZO, {"rank": 2})])
def test_a_probe_estimates_the_exact_derivative(method, knobs):
    model = tied()
    exact, probe = copy.deepcopy(model), copy.deepcopy(model)
    one = method(exact.named_parameters(), lr=0.0, engine="jvp", **knobs)
    one.attach(exact)
    two = method(probe.named_parameters(), lr=0.0, eps=1e-5, **knobs)
    for _ in range(5):
        loss = one.step(task(exact))
        two.step(task(probe))
        torch.testing.assert_close(one.kappas, two.kappas, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(loss, task(model)().detach())


def test_the_exact_engine_agrees_with_backward():
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=0.0, rank=2, engine="jvp")
    optimizer.attach(model)
    optimizer.step(task(model))
    tangents = optimizer._tangents((0, 0))
    task(model)().backward()
    slope = sum((leaf.param.grad * tangents[leaf]).sum() for leaf in optimizer.leaves)
    torch.testing.assert_close(optimizer.kappas[0], slope)


def test_probing_leaves_every_weight_bit_identical_until_folded():
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=1e-2, rank=3, engine="adapter", vectors="freeze")
    optimizer.attach(model)
    before = flat(model)
    for _ in range(5):
        optimizer.step(task(model))
    assert torch.equal(flat(model), before)
    learned = model(IDS)
    optimizer.detach()
    assert not torch.equal(flat(model), before)
    torch.testing.assert_close(model(IDS), learned, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_is_a_seed_and_a_few_numbers():
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=1e-2, rank=3, engine="adapter", vectors="freeze", seed=3)
    optimizer.attach(model)
    for _ in range(5):
        optimizer.step(task(model))
    learned = optimizer.position.clone()
    assert learned.shape == (9,)
    fresh = tied()
    again = TeZO(fresh.named_parameters(), lr=1e-2, rank=3, engine="adapter", vectors="freeze", seed=3)
    again.attach(fresh)
    again.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(fresh(IDS), model(IDS), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("engine", ["adapter", "paired"])
def test_an_adapter_run_resumes_to_the_same_bytes(name, engine):
    method, knobs = FAMILY[name]

    def start(model):
        optimizer = method(model.named_parameters(), lr=1e-3, engine=engine, **knobs)
        optimizer.attach(model)
        return optimizer, paired_task(model, optimizer) if engine == "paired" else task(model)

    model = tied()
    optimizer, closure = start(model)
    for _ in range(8):
        optimizer.step(closure)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    other = tied()
    other.load_state_dict(saved)
    resumed, again = start(other)
    resumed.load_state_dict(state)
    for _ in range(8):
        optimizer.step(closure)
        resumed.step(again)
    optimizer.detach()
    resumed.detach()
    assert torch.equal(flat(model), flat(other))


class Experts(nn.Module):
    """Two experts whose matrices lie in one tensor, mixed by a gate, as model libraries store them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 2, bias=False)
        rng = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(2, 8, 6, generator=rng) / 4)
        self.down = nn.Parameter(torch.randn(2, 6, 8, generator=rng) / 4)

    def forward(self, x):
        mixed = torch.tanh(torch.einsum("btd,edh->beth", x, self.up))
        each = torch.einsum("beth,ehd->betd", mixed, self.down)
        return torch.einsum("betd,bte->btd", each, self.gate(x).softmax(-1))


def test_stacks_of_experts_run_under_the_adapter_engine():
    model = tied()
    model.down = nn.Sequential(nn.Linear(12, 8), Experts()).double()
    knobs = {"rank": 2, "variant": "momentum", "steps": 20, "model": model, "lr": 1e-3}
    mutated, _, _ = train(TeZO, **knobs)
    adapted, _, optimizer = train(TeZO, **knobs, engine="adapter")
    assert [tuple(leaf.basis[0].shape) for leaf in optimizer.leaves if leaf.name.endswith("1.up")] == [(2, 8, 2)]
    assert not torch.equal(adapted.down[1].up, model.down[1].up)
    torch.testing.assert_close(flat(adapted), flat(mutated), rtol=0, atol=1e-12)
    with pytest.raises(UnsupportedError, match="different weights inside Experts"):
        train(TeZO, **knobs, engine="paired")


@pytest.mark.parametrize("engine", ["adapter", "paired"])
def test_layers_that_store_their_inputs_first_are_perturbed(engine):
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval()
    # Positions are one row that serves the whole batch: they cannot differ between the points of a paired pass.
    knobs = {"rank": 2, "lr": 1e-3, "exclude": ["wpe"]}

    def run(engine):
        copied = copy.deepcopy(model)
        optimizer = TeZO(copied.named_parameters(), engine=engine, **knobs)
        optimizer.attach(copied)

        def closure():
            ids = IDS.repeat(optimizer.branches if engine == "paired" else 1, 1)
            parts = copied(input_ids=ids).logits.chunk(len(ids) // len(IDS))
            losses = [nn.functional.cross_entropy(part.flatten(0, 1), LABELS.flatten()) for part in parts]
            return torch.stack(losses) if engine == "paired" else losses[0]

        for _ in range(5):
            optimizer.step(closure)
        optimizer.detach()
        return flat(copied)

    torch.testing.assert_close(run(engine), run("mutate"), rtol=0, atol=1e-11)


def test_a_failing_forward_pass_leaves_no_scratch_weight_behind():
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=1e-2, rank=3, engine="adapter")
    optimizer.attach(model)
    weight = model.up.weight

    def broken(module, inputs, output):
        raise RuntimeError("no memory")

    handle = model.up.register_forward_hook(broken, prepend=True)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step(task(model))
    handle.remove()
    assert model.up.weight is weight
    optimizer.step(task(model))


def test_tied_weights_see_one_direction_in_both_uses():
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=1e-2, rank=3, engine="adapter")
    assert [leaf.name for leaf in optimizer.leaves].count("embed.weight") == 1
    optimizer.attach(model)
    embed = next(leaf for leaf in optimizer.leaves if leaf.name == "embed.weight")
    assert len(optimizer._hooks.owners[embed]) == 2


class Int8Linear(nn.Module):
    """A quantized layer as serving libraries have it: integer weight, one scale."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("engine", ["adapter", "paired"])
def test_a_quantized_base_learns_and_stays_as_it_is(engine):
    model = tied()
    model.down = Int8Linear(model.down)
    weights = trainable_weights(model)
    assert [name for name, _ in weights] == ["up.weight", "down.weight", "head.weight"]
    optimizer = TeZO([weights[1]], lr=1e-2, rank=3, engine=engine)
    optimizer.attach(model)
    before = model.down.weight.clone()
    closure = task(model) if engine == "adapter" else paired_task(model, optimizer)
    start = task(model)().item()
    for _ in range(40):
        optimizer.step(closure)
    assert torch.equal(before, model.down.weight) and task(model)().item() < start
    with pytest.raises(UnsupportedError, match="quantized: nothing can be folded"):
        optimizer.fold_()


@pytest.mark.parametrize("knobs", [{"engine": "mutate"}, {"engine": "adapter", "variant": "adam"}])
def test_a_quantized_base_cannot_be_written(knobs):
    model = tied()
    model.down = Int8Linear(model.down)
    with pytest.raises(UnsupportedError, match="is quantized and cannot be written"):
        TeZO([trainable_weights(model)[1]], lr=1e-2, rank=3, **knobs)


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.BatchNorm1d(3)])
def test_a_model_that_answers_by_chance_is_refused(module):
    model = nn.Sequential(nn.Linear(3, 3), module).train()
    optimizer = TeZO(model.named_parameters(), lr=1e-3, rank=2, engine="adapter")
    with pytest.raises(UnsupportedError, match=r"is in training mode.*model\.eval\(\)"):
        optimizer.attach(model)


def test_what_an_engine_cannot_reach_is_named():
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=1e-3, rank=2, engine="adapter")
    with pytest.raises(UnsupportedError, match="Call attach"):
        optimizer.step(task(model))
    with pytest.raises(UnsupportedError, match=r"The model does not hold embed\.weight"):
        optimizer.attach(nn.Linear(3, 3))
    unused = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)}).eval()
    optimizer = TeZO(unused.named_parameters(), lr=1e-3, rank=2, engine="adapter")
    optimizer.attach(unused)
    with pytest.raises(UnsupportedError, match=r"never called the module of unused\.weight"):
        optimizer.step(lambda: unused["used"](torch.ones(2, 3)).sum())
    paired = TeZO([("w", nn.Conv1d(2, 2, 1).weight)], lr=1e-3, rank=1, engine="paired")
    conv = nn.Conv1d(2, 2, 1).eval()
    conv.weight = paired.leaves[0].param
    with pytest.raises(UnsupportedError, match="cannot give the rows of a batch different weights inside Conv1d"):
        paired.attach(conv)


def test_a_paired_closure_answers_for_every_branch():
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=1e-3, rank=2, engine="paired")
    optimizer.attach(model)
    with pytest.raises(UnsupportedError, match="expected one loss for each of 2 branches"):
        optimizer.step(task(model))


@pytest.mark.parametrize("engine", ["adapter", "paired"])
def test_a_llama_learns_the_same_under_every_engine(engine):
    model = tiny_llama().double().eval()
    ids = torch.arange(24).view(2, 12) % 50

    def run(engine):
        copied = copy.deepcopy(model)
        optimizer = TeZO(copied.named_parameters(), lr=1e-4, rank=4, engine=engine)
        optimizer.attach(copied)

        def closure():
            if engine == "paired":
                batch = expand_batch({"input_ids": ids}, optimizer.branches)
                logits = copied(**batch).logits[:, :-1].chunk(optimizer.branches)
                return torch.stack([nn.functional.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten()) for x in logits])
            return nn.functional.cross_entropy(copied(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        for _ in range(4):
            optimizer.step(closure)
        optimizer.detach()
        return flat(copied)

    torch.testing.assert_close(run(engine), run("mutate"), rtol=0, atol=1e-10)


def test_a_backward_pass_between_probes_does_not_meet_the_shared_buffer():
    model = tiny_llama().double().eval()
    ids = torch.randint(5, 60, (4, 20), generator=torch.Generator().manual_seed(0))
    optimizer = TeZO(model.named_parameters(), lr=1e-2, rank=4, engine="adapter")
    optimizer.attach(model)
    for _ in range(3):
        optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    hooks = optimizer._hooks
    # The batch is large enough for every linear layer to add its direction to its weight.
    assert hooks._scratch.numel() == max(p.numel() for p in model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    beside = {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith("norm.weight")}
    model.zero_grad()
    optimizer.detach()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in beside.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-6, atol=1e-9)


def test_the_shared_buffer_outlives_inference_mode():
    model = tiny_llama().eval()
    ids = torch.randint(5, 60, (4, 20), generator=torch.Generator().manual_seed(0))
    optimizer = TeZO(model.named_parameters(), lr=1e-2, rank=4, engine="adapter")
    optimizer.attach(model)

    def inside():
        with torch.inference_mode():
            return model(input_ids=ids, labels=ids).loss.item()

    first = optimizer.step(inside)
    second = optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    assert torch.isfinite(first) and torch.isfinite(second)
