"""The job route: small models in, a folder out that transformers loads."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.models import RoutedForCausalLM
from modicum.recipe import parse
from modicum.weights import Checkpoint, extract_lora
from support import byte_tokenizer, tiny_llama

WORDS = {"low": "abcdef", "high": "uvwxyz"}


def expert(seed, scale=0.02):
    model = tiny_llama(seed=0, num_hidden_layers=3)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=rng))
    return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name, model in (("base", expert(0, 0.0)), ("low", expert(1)), ("high", expert(2))):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    rng = torch.Generator().manual_seed(0)
    for name, letters in {**WORDS, "other": "012345"}.items():
        rows = []
        for _ in range(24):
            picks = torch.randint(len(letters), (6,), generator=rng).tolist()
            rows.append(json.dumps({"prompt": "".join(letters[i] for i in picks), "completion": "x"}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def recipe(parts, **more):
    return {
        "job": "route",
        "base": str(parts / "base"),
        "experts": {name: str(parts / name) for name in WORDS},
        "data": {name: str(parts / f"{name}.jsonl") for name in WORDS},
        "rule": "all",
        "store": "sign",
        **more,
    }


def test_a_folder_that_transformers_loads(parts, tmp_path):
    given = recipe(parts, unknown={"other": str(parts / "other.jsonl")}, variants=["top1"], router={"gate": 0.9})
    run = execute(parse(given), tmp_path / "run", quiet=True)
    metrics = run.record["metrics"]
    assert len(metrics["routing_conflict"]["values"]) == 3 and len(metrics["routing_conflict"]["routed"]) == 3
    assert metrics["router"]["accuracy"] > 0.8 and metrics["router"]["threshold"] > 0
    assert sum(map(sum, metrics["router"]["confusion"]["counts"])) == metrics["router"]["held_out"]
    assert [row["task"] for row in metrics["router"]["uncertainty"]] == ["low", "high", "other"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert isinstance(model, RoutedForCausalLM) and model.experts.nbytes == metrics["routing_bytes"]["stored"]
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "variants" / "top1")
    assert other.config.routing["selection"] == "top1"
    # A control says what a selection is worth without the gate of the model beside it.
    assert model.config.routing["threshold"] == metrics["router"]["threshold"]
    assert other.config.routing["threshold"] is None and other.router.threshold is None
    assert not (tmp_path / "run" / ".building").exists()
    dense = Checkpoint(tmp_path / "run" / "model")
    assert all(torch.equal(dense[name], model.experts.dense[name]) for name in dense)


def test_the_same_recipe_gives_the_same_bytes_and_goes_on_after_a_stop(parts, tmp_path, monkeypatch):
    given = parse(recipe(parts))
    execute(given, tmp_path / "one", quiet=True)
    from modicum.jobs import routing

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(routing, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(given, tmp_path / "two", quiet=True)
    assert not (tmp_path / "two" / "model").exists()
    execute(given, tmp_path / "two", quiet=True)
    for path in sorted((tmp_path / "one" / "model").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "model" / path.name).read_bytes(), path.name


def test_check_tells_every_layer_and_the_bytes(parts):
    lines = plan(parse(recipe(parts, rule={"name": "topk", "k": 1})))
    assert sum("conflict" in line for line in lines) == 3 and sum("routed (" in line for line in lines) == 1
    assert any(line.startswith("stored by sign:") for line in lines)
    assert any(line.startswith("on disk") for line in lines)


def test_adapters_keep_their_factors(parts, tmp_path):
    for name in WORDS:
        extract_lora(parts / name, parts / "base", tmp_path / name, max_rank=4, progress=False)
    given = recipe(parts, experts={n: str(tmp_path / n) for n in WORDS}, store="lora", dense="base", rule="all")
    execute(parse(given), tmp_path / "run", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.side is not None
    ids = torch.tensor([[70, 71, 72], [90, 91, 92]])
    rows = torch.tensor([[1.0, 0], [0, 1.0]])
    beside = model(ids, weights=rows).logits
    for i, name in enumerate(WORDS):
        folded = Checkpoint(tmp_path / name)
        whole = expert(0, 0.0)
        state = model.experts.state_dict(rows[i].tolist())
        for tensor in model.experts.routed:
            torch.testing.assert_close(state[tensor], folded[tensor].to(state[tensor].dtype), atol=1e-5, rtol=1e-4)
        whole.load_state_dict(state, strict=False)
        torch.testing.assert_close(beside[i : i + 1], whole(ids[i : i + 1]).logits, atol=1e-4, rtol=1e-4)
    together = model.generate(ids, weights=rows, max_new_tokens=4, do_sample=False)
    for i in range(2):
        alone = model.generate(ids[i : i + 1], weights=rows[i], max_new_tokens=4, do_sample=False)
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


def test_an_evaluation_routes_every_prompt(parts, tmp_path):
    execute(parse(recipe(parts)), tmp_path / "run", quiet=True)
    data = {"path": str(parts / "low.jsonl"), "size": 5}
    given = {
        "job": "evaluate",
        "models": {"routed": str(tmp_path / "run" / "model"), "expert": str(parts / "low")},
        "tasks": {"t": {"kind": "exact_match", "data": data, "max_new_tokens": 3}},
    }
    run = execute(parse(given), tmp_path / "scores", quiet=True)
    assert len(run.record["metrics"]["cells"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["experts"].pop("low"), "experts: got 1"),
        (lambda r: r["data"].pop("low"), "data has prompts of high"),
        (lambda r: r.update(budget_bytes=5, rule="mean_std"), "Give at least"),
        (lambda r: r.update(budget_bytes=5), "exclude each other"),
        (lambda r: r.update(budget_share=0.4, rule="mean_std"), "budget_share is 0.4.*Give at least 0.5"),
        (lambda r: r.update(store={"name": "magnitude", "density": 0}), "density"),
        (lambda r: r.update(store={"name": "magnitude", "density": 1.5}), "density"),
        (lambda r: r.update(store="lora"), "needs dense: base"),
        (lambda r: r.update(store="lora", dense="base"), "is a whole model"),
        (lambda r: r.update(rule="topk"), "needs k"),
        (lambda r: r.update(router={"tap": 2}), "router.tap is block 2"),
        (lambda r: r.update(base="/nowhere"), "nowhere"),
    ],
)
def test_what_a_run_would_refuse_is_found_by_check(parts, tmp_path, change, message):
    given = recipe(parts)
    change(given)
    with pytest.raises(ModicumError, match=message):
        plan(parse(given))
    with pytest.raises(ModicumError, match=message):
        execute(parse(given), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_training_cannot_convert_its_model_to_a_routed_one(parts):
    given = {"job": "train", "model": {"path": str(parts / "base"), "convert": "routed"}, "data": "x.jsonl"}
    with pytest.raises(ModicumError, match="made of several trained ones"):
        parse(given)
