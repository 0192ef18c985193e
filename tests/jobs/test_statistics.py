"""Statistics are measured as the oracles say, and merges weigh by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modicum.errors import CheckpointError, RecipeError
from modicum.jobs import execute, plan
from modicum.jobs.statistics import StatisticsRecipe, linear_layers, log_likelihood
from modicum.recipe import parse
from modicum.record import read_record
from modicum.weights import merge
from modicum.weights.measure import LONG, gram_matrices, squared_gradients
from oracles import information as oracle
from oracles import merge as merge_oracle
from support import byte_tokenizer, tiny_llama
from weights.test_adapter import train_adapter

TEXTS = (["abab abab", "abba", "aabb ba"], ["xyzzy", "zyxw", "yy xx zz w"])


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one base, each with a text of its own."""
    root = tmp_path_factory.mktemp("experts")
    for i, texts in enumerate(TEXTS):
        tiny_llama(seed=0, tie_word_embeddings=False).save_pretrained(root / f"m{i}")
        tensors = load_file(root / f"m{i}/model.safetensors")
        rng = torch.Generator().manual_seed(i)
        changed = {name: t + 0.05 * torch.randn(t.shape, generator=rng) for name, t in tensors.items()}
        save_file(changed, root / f"m{i}/model.safetensors", {"format": "pt"})
        byte_tokenizer().save_pretrained(root / f"m{i}")
        (root / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def recipe(root: Path, i: int, kind: str, **changes: Any) -> dict[str, Any]:
    data = {"path": str(root / f"{i}.jsonl")}
    return {"job": "statistics", "model": str(root / f"m{i}"), "kind": kind, "data": data} | changes


def measured(root: Path, out: Path, kind: str, i: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    execute(parse(recipe(root, i, kind, **changes)), out, quiet=True)
    return load_file(out / "statistics/model.safetensors")


# The sums


class Bigram(nn.Module):
    """A table and a linear layer: small enough for derivatives by hand."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.randn(5, 3, generator=rng), freeze=False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight.data = torch.randn(5, 3, generator=rng)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


ROWS = [[0, 1, 2, 1], [3, 3, 4], [2, 0, 0, 4, 1]]


def whole_log_likelihood(model: Bigram, row: list[int], ignored: int = 0) -> torch.Tensor:
    ids = torch.tensor([row])
    labels = ids.clone()
    labels[:, : ignored + 1] = -100
    chosen = StatisticsRecipe(model="m", kind="fisher", data={"path": "d"})  # type: ignore[arg-type]
    return log_likelihood(model(ids), labels, chosen, 0)


@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("count", [3, LONG + 1])
def test_squared_gradients_are_those_of_the_oracle(ignored: int, count: int) -> None:
    model = Bigram()
    found = squared_gradients(
        lambda row: whole_log_likelihood(model, row, ignored), dict(model.named_parameters()), ROWS, count=count
    )
    table, weight = (p.detach().double().numpy() for p in model.parameters())
    expected = oracle.fisher(table, weight, ROWS, ignored)
    for tensor, array in zip(found.values(), expected):
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), array * len(ROWS) / count, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("count", [12, LONG + 1])
def test_gram_matrices_are_those_of_the_oracle(count: int) -> None:
    model = Bigram()
    batches = [torch.tensor([row]) for row in ROWS]
    found = gram_matrices(model, {"head.weight": model.head}, batches, count=count)["head.weight"]
    expected = oracle.gram(model.table.weight.detach().double().numpy(), ROWS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert not model.head._forward_pre_hooks


def test_many_terms_are_summed_in_double_precision() -> None:
    w = torch.tensor([1.0], requires_grad=True)
    # In float32 a sum of so many stops growing long before its end.
    terms = [4096.0] + [0.5] * (1 << 14)
    found = squared_gradients(lambda x: (w * x).sum(), {"w": w}, terms, count=len(terms))["w"].item()
    assert found == pytest.approx((4096.0**2 + 0.25 * (1 << 14)) / len(terms), rel=1e-7)


# The job


def test_fisher_is_the_mean_squared_gradient_of_each_row(experts: Path, tmp_path: Path) -> None:
    import transformers

    found = measured(experts, tmp_path / "run", "fisher")
    model = transformers.AutoModelForCausalLM.from_pretrained(experts / "m0", dtype=torch.float32)
    tokenizer = byte_tokenizer()
    assert set(found) == {name for name, _ in model.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for text in TEXTS[0]:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        model.zero_grad()
        (-model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.square() / len(TEXTS[0])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-6)
    about = json.loads((tmp_path / "run/statistics/statistics.json").read_text())
    assert about["kind"] == "fisher"
    assert about["rows"] == read_record(tmp_path / "run")["metrics"]["rows"] == 3


def test_gram_matrices_are_of_all_tokens_and_no_padding(experts: Path, tmp_path: Path) -> None:
    import transformers

    found = measured(experts, tmp_path / "run", "gram")
    model = transformers.AutoModelForCausalLM.from_pretrained(experts / "m0", dtype=torch.float32)
    tokenizer = byte_tokenizer()
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(found) == set(layers)
    seen: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0][0].double().numpy()))
    with torch.no_grad():
        for text in TEXTS[0]:
            model(input_ids=torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]))
    for name, tensor in found.items():
        inputs = np.concatenate(seen[name])
        np.testing.assert_allclose(tensor.numpy(), inputs.T @ inputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_memory_and_batches_change_nothing(experts: Path, tmp_path: Path, kind: str) -> None:
    whole = measured(experts, tmp_path / "whole", kind)
    parts = measured(experts, tmp_path / "parts", kind, memory=40_000, batch_size=1)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-7)
    fewer = measured(experts, tmp_path / "fewer", kind, exclude="mlp")
    assert set(fewer) == {name for name in whole if "mlp" not in name}


def test_labels_drawn_from_the_model_repeat_and_differ_from_the_data_s(experts: Path, tmp_path: Path) -> None:
    runs = [measured(experts, tmp_path / str(i), "fisher", labels=labels, seed=seed)
            for i, (labels, seed) in enumerate([("model", 0), ("model", 1), ("data", 0)])]  # fmt: skip
    again = measured(experts, tmp_path / "again", "fisher", labels="model", memory=40_000)
    name = "model.norm.weight"
    assert not torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], runs[2][name])
    torch.testing.assert_close(again[name], runs[0][name], rtol=1e-5, atol=1e-7)


def test_a_tied_head_belongs_to_the_embedding() -> None:
    assert not any("lm_head" in name or "embed" in name for name in linear_layers(tiny_llama()))


def test_the_plan_says_what_is_measured(experts: Path) -> None:
    lines = plan(parse(recipe(experts, 0, "gram")))
    assert "Gram matrices of the linear layers' inputs" in lines[0]
    assert "on 3 rows" in lines[0]


# Merges that weigh by them


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_a_pipeline_measures_and_merges(experts: Path, tmp_path: Path, method: str, kind: str) -> None:
    stages = [{"name": f"s{i}", **recipe(experts, i, kind)} for i in range(2)]
    models = [str(experts / f"m{i}") for i in range(2)]
    merge_stage = {"name": "merged", "job": "merge", "experts": models, "method": method,
                   "statistics": ["stage:s0", "stage:s1"]}  # fmt: skip
    execute(parse({"job": "pipeline", "stages": [*stages, merge_stage]}), tmp_path / "run", quiet=True)
    folder = tmp_path / "run/stages"
    merged = load_file(folder / "merged/model/model.safetensors")
    tensors = [load_file(f"{model}/model.safetensors") for model in models]
    found = [load_file(folder / f"s{i}/statistics/model.safetensors") for i in range(2)]
    for name, tensor in merged.items():
        values = [t[name].double().numpy() for t in tensors]
        if name not in found[0]:
            expected = merge_oracle.linear(values, [1.0, 1.0])
        elif method == "fisher":
            expected = merge_oracle.fisher(values, [f[name].double().numpy() for f in found], [1.0, 1.0], 1e-6)
        else:
            expected = merge_oracle.regmean(values, [f[name].double().numpy() for f in found], 0.9)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-3, atol=1e-4)
    weighed = [name for name in found[0] if not torch.allclose(merged[name], (tensors[0][name] + tensors[1][name]) / 2)]
    assert len(weighed) == len(found[0])
    notes = read_record(folder / "merged")["notes"]
    assert any("have no statistics and are averaged" in note for note in notes) == (method == "regmean")


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_without_statistics_a_merge_is_refused_wherever_it_comes_from(
    experts: Path, tmp_path: Path, method: str
) -> None:
    models = [str(experts / f"m{i}") for i in range(2)]
    wanted = f"{method} weighs the experts by statistics of their data, and none are given.*job 'statistics'"
    with pytest.raises(RecipeError, match=wanted) as refused:
        parse({"job": "merge", "experts": models, "method": method})
    assert "\n" not in str(refused.value)
    document = {"merge_method": method, "models": [{"model": model} for model in models]}
    for act in (plan, lambda data: execute(data, tmp_path / "run", quiet=True)):
        with pytest.raises(RecipeError, match=wanted):
            act(parse(document))
    with pytest.raises(RecipeError, match=wanted):
        merge(None, models, tmp_path / "out", method=method, progress=False)
    with pytest.raises(RecipeError, match=wanted):
        import modicum.weights.methods as methods

        getattr(methods, method)(None, [torch.ones(2, 2), torch.ones(2, 2)])
    with pytest.raises(RecipeError, match="uses no statistics"):
        parse({"job": "merge", "experts": models, "method": "linear", "statistics": models})


def test_statistics_of_another_model_kind_or_order_are_refused(experts: Path, tmp_path: Path) -> None:
    models = [str(experts / f"m{i}") for i in range(2)]
    for i in range(2):
        for kind in ("fisher", "gram"):
            measured(experts, tmp_path / f"{kind}{i}", kind, i)
    fishers, grams = ([str(tmp_path / f"{kind}{i}/statistics") for i in range(2)] for kind in ("fisher", "gram"))
    data = {"job": "merge", "experts": models, "method": "fisher", "statistics": fishers}
    assert any("and 2 statistics" in line for line in plan(parse(data)))
    for changes, message in (
        ({"statistics": fishers[::-1]}, r"fisher1/statistics was measured of .*m1, not of .*m0"),
        ({"statistics": grams}, "holds statistics of kind gram, fisher needs fisher|have shape"),
        ({"statistics": fishers[:1]}, "Got 1 statistics for 2 experts"),
        ({"method": {"name": "fisher", "weights": [1.0]}}, "1 values for 2 experts"),
    ):
        with pytest.raises((CheckpointError, RecipeError), match=message):
            plan(parse(data | changes))
    document = {"merge_method": "fisher", "models": [{"model": model} for model in models], "statistics": fishers}
    execute(parse(document), tmp_path / "kit", quiet=True)
    execute(parse(data), tmp_path / "ours", quiet=True)
    ours, kit = (load_file(tmp_path / f"{name}/model/model.safetensors") for name in ("ours", "kit"))
    assert all(torch.equal(ours[name], kit[name]) for name in ours)
    # Statistics that somebody made himself say nothing of their origin: their shapes must do.
    shutil.copytree(fishers[0], tmp_path / "own")
    (tmp_path / "own/statistics.json").unlink()
    tensors = load_file(tmp_path / "own/model.safetensors")
    tensors["model.norm.weight"] = torch.ones(1)
    save_file(tensors, tmp_path / "own/model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' have shape \[1\]"):
        plan(parse(data | {"statistics": [str(tmp_path / "own"), fishers[1]]}))
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "own/model.safetensors")
    with pytest.raises(CheckpointError, match="has no statistics of 'model.norm.weight'"):
        plan(parse(data | {"statistics": [str(tmp_path / "own"), fishers[1]]}))


def test_an_adapter_is_measured_as_the_model_that_it_makes(experts: Path, tmp_path: Path) -> None:
    train_adapter(experts / "m0", tmp_path / "adapter")
    found = measured(experts, tmp_path / "run", "gram", model=str(tmp_path / "adapter"))
    plain = measured(experts, tmp_path / "plain", "gram")
    assert set(found) == set(plain)
    assert not torch.allclose(found["lm_head.weight"], plain["lm_head.weight"])
    data = {"job": "merge", "experts": [str(tmp_path / "adapter"), str(experts / "m0")], "method": "regmean",
            "statistics": [str(tmp_path / "run/statistics"), str(tmp_path / "plain/statistics")]}  # fmt: skip
    execute(parse(data), tmp_path / "merged", quiet=True)
    assert read_record(tmp_path / "merged")["status"] == "done"


def test_every_row_draws_labels_of_its_own() -> None:
    chosen = StatisticsRecipe(model="m", kind="fisher", labels="model", data={"path": "d"})  # type: ignore[arg-type]
    logits, labels = torch.randn(1, 20, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 20, dtype=int)
    found = [float(log_likelihood(logits, labels, chosen, number)) for number in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
