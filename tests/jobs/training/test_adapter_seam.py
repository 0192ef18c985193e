"""The seam does for every method what its function and its facts say, and asks none for its name."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import modicum
from modicum.adapters import Preheat, get_hrp_state_dict, initialize_lora_hrp_weights
from modicum.adapters.calibrate import base_weight, input_moments, weight_gradients
from modicum.adapters.layers import factors_of, lora_layers
from modicum.errors import UnsupportedError
from modicum.facts import AdapterFacts, GradientFacts
from modicum.jobs.training.adapter import initialize, make_optimizer, peft_config, step_callback
from modicum.random import generator
from modicum.registry import adapter_init, gradient_rule
from modicum.types import Positive
from support import tiny_llama, with_own_entries

SOURCES = Path(modicum.__file__).parent
SEAMS = ["jobs/training/adapter.py", "jobs/training/adapter_start.py", "jobs/training/adapter_files.py"]
SEAMS += ["jobs/training/gradient.py", "jobs/loading/serving.py", "optim/gradient/make.py"]
OWN = sorted(name for name, entry in adapter_init.items() if not entry.facts.stock)
LR, SEED = 1e-3, 7


def batches(count=10):
    rng = generator(0, "batches")
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 264, (count, 2, 12), generator=rng)]


def wrap(name="default", knobs=None, **fields):
    settings = {"rank": 4, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "up_proj"]} | fields
    return get_peft_model(tiny_llama(), peft_config(name, knobs or {}, **settings)).eval()


def start(model, name, knobs=None, **options):
    given = {"batches": batches, "lr": LR, "seed": SEED, "total_steps": 10} | options
    return initialize(model, name, knobs or {}, **given)


def data_of(model, entry, layer, name, found):
    weight = base_weight(layer, name).detach()
    known = {"weight": weight, "gradient": found.get("gradient", {}).get(name), "moment": found["moment"][name]}
    return [known[key] for key in entry.parameters[0]]


@pytest.mark.parametrize("name", [name for name in OWN if adapter_init[name].facts.preheated is None])
def test_a_start_on_a_model_is_the_function_on_each_module(name):
    entry, model = adapter_init[name], wrap()
    sample = batches()[:3]
    found = {"gradient": weight_gradients(model, sample), "moment": input_moments(model, sample)}
    inputs = {
        key: [t.clone() for t in data_of(model, entry, layer, key, found)] for key, layer in lora_layers(model).items()
    }
    started = start(model, name, {"batches": 3} if entry.facts.gather else {})
    takes = inspect.signature(entry.function).parameters
    for key, layer in lora_layers(model).items():
        knobs = {"scaling": 3.0} if "scaling" in takes else {}
        knobs |= {"rng": generator(SEED, name, key)} if "rng" in takes else {}
        A, B = entry.function(*inputs[key], rank=4, **knobs)
        ours = started.start[key]
        assert torch.equal(ours[0], A) and torch.equal(ours[1], B)
        if not entry.facts.core:
            assert torch.equal(factors_of(layer, "default")[0], A) and torch.equal(factors_of(layer, "default")[1], B)
        if entry.facts.shifts_base:
            shifted = tiny_llama().get_parameter(f"{key}.weight") - 3.0 * B @ A
            torch.testing.assert_close(base_weight(layer, key), shifted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "entry", [entry for entry in adapter_init.values() if entry.facts.gather], ids=lambda e: e.name
)
def test_a_recipe_may_set_every_knob_of_collecting_the_data(entry):
    assert {item.name for item in fields(entry.facts.gather)} <= entry.schema.model_fields.keys()


@pytest.mark.parametrize("name", [name for name in OWN if adapter_init[name].facts.preheated is not None])
def test_a_preheated_start_is_the_function_on_what_preheating_learned(name):
    entry, model = adapter_init[name], wrap()
    made, rates = [], []

    class Main(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    def main(parameters, lr):
        made.append(lr)
        return Main(parameters, lr=lr)

    def loss(model, batch):
        return 3 * model(**batch).loss

    options = {"lr": 0.5, "seed": SEED, "accumulation": 2, "loss": loss, "optimizer": main}
    state = get_hrp_state_dict(model, batches(), config=Preheat(preheat_rank=8, preheat_steps=3), **options)
    started = start(model, name, {"preheat_rank": 8, "preheat_steps": 3}, **options)
    assert made == [0.5, 0.5] and len(rates) == 6
    for key, layer in lora_layers(model).items():
        U, S, V = (state[f"{key}.{part}"] for part in "USV")
        A, B = entry.function(V.T, U * S / layer.scaling["default"], rank=4)
        for ours, expected in zip(factors_of(layer, "default"), (A, B)):
            torch.testing.assert_close(ours.detach(), expected, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(started.spectra[key], S)


def test_directions_that_complete_a_preheated_start_follow_the_seed():
    # One learned position teaches few directions, and a high rtol counts most as missing. The first position sees
    # itself alone, and teaches a query nothing but rounding.
    ids = torch.tensor([[5, 6, 7]])
    data = [{"input_ids": ids, "labels": ids}] * 2
    rows = []
    for seed in (1, 2):
        model, other = wrap(target_modules=["q_proj"]), wrap(target_modules=["q_proj"])
        start(model, "hrp", {"preheat_rank": 8, "preheat_steps": 1, "rtol": 0.5}, batches=lambda: data, seed=seed)
        config = Preheat(preheat_rank=8, preheat_steps=1)
        state = get_hrp_state_dict(other, data, lr=LR, config=config, keep=4, seed=seed)
        initialize_lora_hrp_weights(other, state, rtol=0.5, seed=seed)
        for ours, expected in zip(model.parameters(), other.parameters()):
            assert torch.equal(ours, expected)
        initialize_lora_hrp_weights(other, state, rtol=0.5, seed=seed + 1)
        rows.append([factors_of(next(iter(lora_layers(m).values())), "default")[0].detach() for m in (model, other)])
    assert all(torch.equal(a[0], b[0]) and not torch.allclose(a[1:], b[1:]) for a, b in rows)


def test_the_loss_of_the_run_is_the_one_whose_gradient_starts_an_adapter():
    def loss(model, batch):
        return model(**batch).logits[..., 7].square().mean()

    model, sample = wrap(), batches()[:3]
    gradients = weight_gradients(model, sample, loss=loss)
    started = start(model, "lora_ga", {"batches": 3}, loss=loss)
    for name, (A, B) in started.start.items():
        expected = adapter_init["lora_ga"].function(gradients[name], rank=4)
        assert torch.equal(A, expected[0]) and torch.equal(B, expected[1])


def test_rho_bounds_the_rank_of_a_module():
    highest = {}
    for rho in (1.0, 3.0):
        model = wrap(target_modules="all-linear")
        start(model, "eva", {"rank_redistribution": "eva", "rho": rho})
        highest[rho] = max(layer.r["default"] for layer in lora_layers(model).values())
    assert highest[1.0] == 4 < highest[3.0] <= 12


@pytest.mark.parametrize("rslora", [False, True])
def test_a_shift_is_taken_out_of_adapters_of_uneven_ranks_and_alphas(rslora, tmp_path):
    uneven = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 5, "up_proj": 7}, "use_rslora": rslora}
    model, ids = wrap("pissa", **uneven), batches(1)[0]["input_ids"]
    started = start(model, "pissa")
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            factor = factors_of(layer, "default")[1]
            factor.add_(0.1 * torch.randn(factor.shape, generator=generator(0, name)))
    expected = model(ids).logits
    assert not torch.allclose(expected, tiny_llama()(ids).logits, atol=1e-3)
    started.prepare(model)
    model.save_pretrained(tmp_path)
    started.finish(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, atol=2e-5, rtol=1e-4)
    assert {layer.r["default"] for layer in lora_layers(loaded).values()} == {4, 8}


@pytest.fixture
def register(monkeypatch):
    """Register toys that are gone after the test."""
    with_own_entries(monkeypatch, adapter_init)
    return adapter_init


def test_a_method_with_its_own_start_configuration_and_optimizer_is_one_function(register, tmp_path):
    made = []

    def optimizer(peft_model, knobs, *, lr, weight_decay):
        made.append((knobs["ratio"], lr, weight_decay))
        return torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=lr)

    @register("toy", supplied={"rank"}, config={"use_rslora": True}, optimizer=optimizer, frozen="A", shape_only=True)
    def toy(weight: torch.Tensor, *, rank: int, ratio: Positive = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Start A at a constant."""
        return torch.full((rank, weight.shape[1]), ratio), torch.zeros(weight.shape[0], rank)

    model = wrap("toy")
    started = start(model, "toy", {"ratio": 5.0})
    for layer in lora_layers(model).values():
        A, B = factors_of(layer, "default")
        assert (A == 5).all() and not B.any() and B.requires_grad and not A.requires_grad
        assert layer.scaling["default"] == 12 / 2
    assert isinstance(make_optimizer(model, "toy", {"ratio": 5.0}, lr=0.1, weight_decay=0.2), torch.optim.SGD)
    assert made == [(5.0, 0.1, 0.2)] and step_callback("toy") is None
    model.save_pretrained(tmp_path)
    started.finish(tmp_path)
    assert '"ratio": 5.0' in (tmp_path / "adapter_init.json").read_text()


def test_a_method_with_its_own_kind_of_adapter_is_one_file(register, tmp_path):
    seen = []

    def config(knobs, *, rank, **fields):
        from peft import LoraConfig

        seen.append(("config", knobs, rank))
        return LoraConfig(r=2 * rank, **fields)

    def requires():
        if "missing" in seen:
            raise UnsupportedError("toy needs a machine that is not here.")

    @register(
        "toy",
        stock=True,
        requires=requires,
        config=config,
        schedule=lambda config, knobs, *, total_steps: seen.append(("schedule", config.r, total_steps)),
        after_backward=lambda model, step: seen.append(("step", step)),
        before_save=lambda config: seen.append(("save", config.r)),
        plain=lambda tensors, config: (tensors, config | {"lora_alpha": 99}),
    )
    def toy(weight: torch.Tensor, *, depth: int = 3) -> None:
        """PEFT starts it."""

    model = wrap("toy")
    started = start(model, "toy")
    callback = step_callback("toy")
    callback.on_optimizer_step(None, type("State", (), {"global_step": 4}), None, model=model)
    started.prepare(model)
    model.save_pretrained(tmp_path)
    started.finish(tmp_path)
    assert seen == [("config", {"depth": 3}, 4), ("schedule", 8, 10), ("step", 4), ("save", 8)]
    assert '"lora_alpha": 99' in (tmp_path / "adapter_config.json").read_text()
    with pytest.raises(UnsupportedError, match="toy cannot go on from a checkpoint"):
        callback.on_train_begin(None, type("State", (), {"global_step": 4}), None)
    seen.append("missing")
    with pytest.raises(UnsupportedError, match="a machine that is not here"):
        wrap("toy")


@pytest.mark.parametrize("facts", [AdapterFacts, GradientFacts])
def test_every_fact_is_read_by_a_seam(facts):
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py") if path.name != "facts.py")
    unread = [item.name for item in fields(facts) if not re.search(rf"\bfacts\.{item.name}\b", text)]
    assert not unread


@pytest.mark.parametrize("path", SEAMS)
def test_no_seam_knows_a_method_by_its_name(path):
    tree = ast.parse((SOURCES / path).read_text(encoding="utf-8"))
    # `default` is also PEFT's name for a model's first adapter.
    names = {*adapter_init, *gradient_rule} - {"default"}
    named = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names]
    assert not named
