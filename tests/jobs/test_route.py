"""The job route: small models in, a folder out that transformers loads."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs.support_route import WORDS, expert, recipe, write_parts
from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.models import RoutedForCausalLM
from modicum.recipe import parse, read
from modicum.registry import expert_store
from modicum.weights import Checkpoint, extract_lora
from support import byte_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


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


def test_check_tells_every_layer_and_the_bytes(parts):
    lines = plan(parse(recipe(parts, rule={"name": "topk", "k": 1})))
    assert sum("conflict" in line for line in lines) == 3 and sum("routed (" in line for line in lines) == 1
    stores = [line.split()[2].rstrip(":") for line in lines if line.startswith("stored by")]
    assert set(stores) == {name for name in expert_store if not expert_store[name].facts.factors}
    assert "router: 24 prompts of low" in " ".join(lines)


@pytest.mark.parametrize("store", ["sign", "random_rescaled"])
@pytest.mark.parametrize("router", [{}, {"gate": 0.9}, {"kind": "subspace", "rank": 3}, {"kind": "mlp"}, None])
def test_what_check_tells_of_bytes_is_what_lies_on_disk(parts, tmp_path, store, router):
    if store != "sign" and router:
        pytest.skip("told once")
    given = recipe(parts, store=store, router=router, rule={"name": "topk", "k": 2})
    told = int(next(line for line in plan(parse(given)) if line.startswith("on disk")).split()[2])
    run = execute(parse(given), tmp_path / "run", quiet=True)
    found = run.record["metrics"]["routing_bytes"]
    files = sorted((tmp_path / "run" / "model").glob("*.safetensors"))
    numbers = {path.name: sum(t.nbytes for t in load_file(path).values()) for path in files}
    assert sum(numbers.values()) == told == found["dense"] + found["stored"] + found["router"]
    assert numbers.get("router.safetensors", 0) == found["router"]
    assert found["share"] == told / (2 * found["whole_model"])
    # Headers are all that the numbers are not: a name, a dtype and a shape for each part.
    assert sum(path.stat().st_size for path in files) - told < 200 * sum(len(load_file(path)) for path in files) + 100


def test_a_router_of_entropies_needs_no_prompts_and_asks_every_expert(parts, tmp_path):
    given = recipe(parts, router={"kind": "entropy"}, selection="soft", data={})
    given["unknown"] = {"other": {"path": str(parts / "other.jsonl"), "size": 4}}
    assert any("each prompt is read 2 times" in line for line in plan(parse(given)))
    run = execute(parse(given), tmp_path / "run", quiet=True)
    assert "accuracy" not in run.record["metrics"]["router"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.router.kind == "entropy" and model.router.temperature == 1
    ids = torch.tensor([[70, 71, 72], [90, 91, 92]])
    each = []
    for weights in ([1.0, 0], [0, 1.0]):
        logs = model(ids, weights=weights).logits[:, -1].double().log_softmax(-1)
        each.append(-(logs.exp() * logs).sum(-1))
    torch.testing.assert_close(model.route(ids).weights, (-torch.stack(each, 1)).softmax(1), atol=1e-6, rtol=1e-5)


def test_prompts_tell_how_good_a_router_of_entropies_is(parts, tmp_path):
    given = recipe(parts, router={"kind": "entropy", "held_out": 0.5})
    metrics = execute(parse(given), tmp_path / "run", quiet=True).record["metrics"]["router"]
    assert metrics["held_out"] == 24 and [sum(row) for row in metrics["confusion"]["counts"]] == [12, 12]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.router.temperature == metrics["temperature"] != 1


def test_mixtures_are_centred_where_that_is_exact(parts, tmp_path):
    given = recipe(parts, store={"name": "random_rescaled", "density": 0.5}, router={"centred": True})
    execute(parse(given), tmp_path / "run", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    model.materialise([1.0, 0.0])
    want = model.experts.state_dict([1.0, 0.0], centred=True)
    assert all(torch.equal(target, want[name]) for name, target in model.working.targets.items())


def test_knobs_of_the_router_reach_it(parts, tmp_path):
    router = {"kind": "subspace", "rank": 3, "least": 0.3}
    execute(parse(recipe(parts, router=router, selection="standardised")), tmp_path / "run", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.router.tensors["bases"].shape[1] == 3
    assert model.config.routing["least"] == 0.3 and model.config.routing["selection"] == "standardised"


def other_tokens(folder):
    """Exchange two tokens of a folder's tokenizer."""
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    rows = text["model"]["vocab"]
    rows["a"], rows["b"] = rows["b"], rows["a"]
    file.write_text(json.dumps(text))


def test_experts_of_other_tokens_are_refused_and_other_settings_are_said(parts, tmp_path):
    for name in ("low", "high"):
        shutil.copytree(parts / name, tmp_path / name)
    given = recipe(parts, experts={name: str(tmp_path / name) for name in WORDS})
    config = tmp_path / "high" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    assert any("rms_norm_eps" in line for line in plan(parse(given)))
    run = execute(parse(given), tmp_path / "run", quiet=True)
    assert any("rms_norm_eps" in note for note in run.record["notes"])
    other_tokens(tmp_path / "low")
    for act in (lambda: plan(parse(given)), lambda: execute(parse(given), tmp_path / "other", quiet=True)):
        with pytest.raises(ModicumError, match="other tokens than .* in 2 rows"):
            act()


def test_experts_without_a_prefix_are_those_with_it(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=264, n_embd=16, n_head=2, n_layer=2, n_positions=64)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(GPT2LMHeadModel(config))
    for name, made in zip(("base", *WORDS), models):
        (made if name != "high" else made.transformer).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    given = recipe(tmp_path, router=None, data={}, store="whole")
    execute(parse(given), tmp_path / "run", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    model.materialise([0.0, 1.0])
    got, want = model.host.state_dict(), models[2].state_dict()
    for name in model.working.names.values():
        torch.testing.assert_close(got[name], want[name], atol=1e-3, rtol=1e-2)


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


def tables(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_a_folder_in_several_files_holds_the_same(parts, tmp_path):
    execute(parse(recipe(parts, store="whole")), tmp_path / "one", quiet=True)
    execute(parse(recipe(parts, store="whole", shard_bytes=20_000)), tmp_path / "many", quiet=True)
    names = {path.name.partition("-")[0] for path in (tmp_path / "many" / "model").glob("*-of-*.safetensors")}
    assert names == {"model", "experts"}
    one, many = (tables(tmp_path / name / "model") for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "many")]
    models[1].save_pretrained(tmp_path / "saved")
    models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    ids = torch.tensor([[70, 71, 72], [90, 91, 92]])
    logits = [model(ids, weights=[[1.0, 0], [0, 1.0]]).logits for model in models]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_another_tool_gets_the_class_by_its_name(parts, tmp_path, monkeypatch, capsys):
    import transformers

    from modicum.models.__main__ import main as hand_over

    execute(parse(recipe(parts)), tmp_path / "run", quiet=True)
    # A server takes a model's class from transformers by the name in its configuration.
    (tmp_path / "show_class.py").write_text(
        "import sys, transformers\n"
        "name = transformers.AutoConfig.from_pretrained(sys.argv[1]).architectures[0]\n"
        "print(type(getattr(transformers, name).from_pretrained(sys.argv[1])).__name__)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modicum.models", "show_class", str(tmp_path / "run" / "model")])
    with monkeypatch.context() as patch:
        for name in ("RoutedForCausalLM", "ZeroTokenForCausalLM"):
            patch.setattr(transformers, name, None, raising=False)  # what is added is taken away again
        hand_over()
    assert capsys.readouterr().out == "RoutedForCausalLM\n"


def test_the_harness_scores_a_routed_folder(parts, tmp_path):
    pytest.importorskip("lm_eval")
    execute(parse(recipe(parts)), tmp_path / "run", quiet=True)
    rows = [{"prompt": word, "choices": [" 5", " 77"], "answer": 0} for word in ("abcdef", "uvwxyz", "fedcba")]
    own = tmp_path / "tasks"  # all files beside a task are read, and runs lie apart from what they read
    own.mkdir()
    (own / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own / "t.yaml").write_text(
        "task: own\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {own / 't.jsonl'}}}}}\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    task = {"kind": "lm_eval", "task": "own", "data": str(own), "chat": False}
    given = {"job": "evaluate", "model": str(tmp_path / "run" / "model"), "tasks": {"own": task}}
    [cell] = execute(parse(given), tmp_path / "scores", quiet=True).record["metrics"]["cells"]
    assert cell["n"] == 3


@pytest.mark.parametrize("kind", ["exact_match", "choice"])
def test_an_evaluation_routes_every_prompt(parts, tmp_path, monkeypatch, kind):
    execute(parse(recipe(parts)), tmp_path / "run", quiet=True)
    rows = [json.loads(line) for name in WORDS for line in (parts / f"{name}.jsonl").read_text().splitlines()[:4]]
    if kind == "choice":
        rows = [{"prompt": row["prompt"], "choices": ["aaaaaaaa", "zzzzzzzz", "5"], "answer": 0} for row in rows]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    used, fixed = [], RoutedForCausalLM.fixed
    monkeypatch.setattr(RoutedForCausalLM, "fixed", lambda self, w: (used.append(list(w)), fixed(self, w))[1])
    task = {"kind": kind, "data": {"path": str(tmp_path / "both.jsonl")}}
    task |= {"max_new_tokens": 3} if kind == "exact_match" else {}
    given = {"job": "evaluate", "models": {"routed": str(tmp_path / "run" / "model")}, "tasks": {"t": task}}
    run = execute(parse(given), tmp_path / "scores", quiet=True)
    assert sorted(used) == [[0.0, 1.0], [1.0, 0.0]] and len(run.record["metrics"]["cells"]) == 1


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
        (lambda r: r.update(router={"tap": 2}), "router.tap is block 2, behind the first routed block 0"),
        (lambda r: r.update(router={"tap": 3, "second_prefill": True}), "router.tap is block 3, and the model has 3"),
        (lambda r: r.update(router={"centred": True}), "centred needs a store without bias"),
        (lambda r: r.update(router={"centred": True}, store="random_rescaled", dense="base"), "needs dense: average"),
        (lambda r: r.update(router={"kind": "entropy", "gate": 0.9}), "router.gate is a distance of features"),
        (lambda r: r.update(router={"kind": "entropy"}, data={"high": r["data"]["high"]}), "data has prompts of high"),
        (lambda r: r["data"].update(low={"path": r["data"]["low"], "size": 2}), "data.low has 2 prompts"),
        (lambda r: r["data"].update(low=r["data"]["low"].replace("low", "text")), "holds text rows"),
        (lambda r: r.update(base="/nowhere"), "nowhere"),
        (lambda r: r["experts"].update(low=r["base"] + "+"), r"\+' names no adapter, expected model\+adapter"),
        (lambda r: r.update(router=None, variants=["top1"]), "variants.*router is null"),
        (lambda r: r.update(router=None, selection="soft"), "selection.*router is null"),
        (lambda r: r.update(distil={}, store="magnitude"), "distil fits the sizes that store: sign keeps"),
        (lambda r: r.update(distil={}, router=None, data={}), "data has prompts of nothing.*distil: null"),
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


def test_shipped_recipes_are_valid():
    for name in ("mediator", "mediator-lora", "mediator-controls"):
        stages = {stage["name"]: stage for stage in parse(read(name)).stages}
        used = {reference.removeprefix("stage:").partition("/")[0] for reference in stages["scores"]["models"].values()}
        assert used - stages.keys() <= {"builtin:smollm2-135m-instruct"}
        for stage in stages.values():
            if stage["job"] == "route":
                assert set(parse(stage_alone(stage)).experts) == {"reverser", "adder", "orderer", "sorter"}
    assert parse(read("mediator-budget")).budget_share == 0.75


def test_what_a_route_would_refuse_is_found_before_its_experts_are_trained(parts):
    def check(**more):
        train = {"job": "train", "model": str(parts / "base"), "trainer": {"max_steps": 1}}
        stages = [train | {"name": name, "data": str(parts / f"{name}.jsonl")} for name in WORDS]
        given = recipe(parts, experts={name: f"stage:{name}" for name in WORDS}, name="routed", **more)
        return plan(parse({"job": "pipeline", "stages": [*stages, given]}))

    assert any("routed: route after" in line for line in check())
    for more, message in (
        ({"rule": "mean_std", "budget_bytes": 5}, "routed: budget.* is 5"),
        ({"rule": "mean_std", "budget_share": 0.4}, "routed: budget_share is 0.4.*Give at least 0.5"),
        ({"router": {"tap": 3, "second_prefill": True}}, "routed: router.tap is block 3"),
        ({"data": {name: str(parts / "text.jsonl") for name in WORDS}}, "routed: .*holds text rows"),
    ):
        with pytest.raises(ModicumError, match=message):
            check(**more)


def stage_alone(stage):
    return {key: value for key, value in stage.items() if key != "name"}


def test_a_training_cannot_convert_its_model_to_a_routed_one(parts):
    given = {"job": "train", "model": {"path": str(parts / "base"), "convert": "routed"}, "data": "x.jsonl"}
    with pytest.raises(ModicumError, match="made of several trained ones"):
        parse(given)
