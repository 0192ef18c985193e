from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import CheckpointError, ModicumError, RecipeError
from modicum.record import fingerprint
from modicum.registry import merge_method
from modicum.weights import Checkpoint, merge, merge_state_dicts
from modicum.weights.kernels.compare import compare, refuse_non_finite
from modicum.weights.merge import run_step, survey
from modicum.weights.plan import Source, plan_merge
from support import measured
from weights.conftest import Family, MakeFamily, random_tensors, statistics_of, write_model

REQUIRED = {name: {"density": 0.5} for name in ("ties", "dare", "della", "breadcrumbs")} | {
    name: {"t": 0.3} for name in ("slerp", "nearswap")
}


@pytest.fixture(params=list(merge_method))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def number_of_experts(method: str, wanted: int = 3) -> int:
    facts = merge_method[method].facts
    return 1 if facts.two else min(wanted, facts.most or wanted)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_streamed_and_in_memory_give_the_same_bytes(
    make_family: MakeFamily, tmp_path: Path, method: str, dtype: str | None
) -> None:
    base, experts = make_family(number_of_experts(method))
    knobs = REQUIRED.get(method, {})
    # Small files and several threads: neither the order of tensors nor their place may matter.
    merge(base, experts, tmp_path / "out", method=method, dtype=dtype, shard_bytes=300, workers=3, **knobs,
          **statistics_of(method, experts))  # fmt: skip
    streamed = {name: t for f in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(f).items()}
    memory = merge_state_dicts(
        load_file(base / "model.safetensors"),
        [load_file(e / "model.safetensors") for e in experts],
        method=method,
        dtype=dtype,
        statistics=measured(method, [load_file(e / "model.safetensors") for e in experts]),
        **knobs,
    )
    assert streamed.keys() == memory.keys()
    assert all(torch.equal(streamed[name], memory[name]) for name in memory)
    assert {t.dtype for t in streamed.values()} == {torch.float32 if dtype else torch.bfloat16}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == (dtype or "bfloat16")
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()


def test_a_float32_result_keeps_what_bfloat16_would_round_away() -> None:
    base = {"w": torch.ones(4, dtype=torch.bfloat16)}
    expert = {"w": torch.ones(4) + 1e-4}
    kept = merge_state_dicts(base, [expert], method="task_arithmetic", scale=0.5, dtype="float32")["w"]
    torch.testing.assert_close(kept, torch.full((4,), 1.00005), rtol=0, atol=2e-7)
    assert torch.equal(merge_state_dicts(base, [expert], method="task_arithmetic")["w"], base["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_base_merged_with_itself_is_itself(method: str, dtype: torch.dtype) -> None:
    base = random_tensors(0, dtype)
    experts = [base] * number_of_experts(method)
    merged = merge_state_dicts(
        base, experts, method=method, statistics=measured(method, experts), **REQUIRED.get(method, {})
    )
    if method == "karcher" and dtype == torch.float32:  # a norm times a direction: equal to rounding only
        torch.testing.assert_close(merged, base)
    else:
        assert all(torch.equal(merged[name], base[name]) for name in base)


def test_inputs_are_not_changed() -> None:
    base, experts = random_tensors(0), [random_tensors(1), random_tensors(2)]
    merge_state_dicts(base, experts, method="ties", density=0.3)
    for seed, model in enumerate([base, *experts]):
        assert all(torch.equal(model[name], tensor) for name, tensor in random_tensors(seed).items())


def test_methods_without_a_base_take_none(family: Family, tmp_path: Path) -> None:
    _, experts = family
    merge(None, experts, tmp_path / "out", method="linear")
    a, b = (load_file(e / "model.safetensors") for e in experts)
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(tensor, ((a[name].float() + b[name].float()) / 2).bfloat16())
    with pytest.raises(RecipeError, match="ties merges differences from a base model"):
        merge(None, experts, tmp_path / "out2", method="ties", density=0.5)


def test_an_adapter_is_merged_like_the_full_model_it_stands_for(tmp_path: Path) -> None:
    from support import tiny_llama
    from weights.test_adapter import train_adapter

    base = tmp_path / "base"
    tiny_llama(seed=0).save_pretrained(base)
    expected = train_adapter(base, tmp_path / "adapter")
    measured = merge(base, [tmp_path / "adapter"], tmp_path / "out", method="task_arithmetic", dtype="float32")
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-5, atol=1e-6)
    assert measured["model.layers.0.self_attn.q_proj.weight"]["norms"][0] > 0
    assert measured["model.layers.0.self_attn.k_proj.weight"]["norms"] == [0.0]
    assert (tmp_path / "out/config.json").exists()


def test_buffers_that_are_not_numbers_to_average_are_equal_or_refused() -> None:
    base = {"w": torch.ones(2), "positions": torch.arange(3)}
    merged = merge_state_dicts(base, [base], method="task_arithmetic")
    assert torch.equal(merged["positions"], torch.arange(3))
    other = {"w": torch.ones(2), "positions": torch.arange(3) + 1}
    with pytest.raises(CheckpointError, match=r"experts\[0\]: tensor 'positions' is torch.int64 and differs"):
        merge_state_dicts(base, [other], method="task_arithmetic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"expert0 has no tensor 'model.norm.weight' \(.*base has it, \[6\]\)"),
        (lambda t: t.update(extra=torch.ones(1)), r"base has no tensor 'extra' \(.*expert0 has it"),
        (lambda t: t.update({"lm_head.weight": torch.ones(11, 6)}), "One of them ties its embeddings"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"expert0: .*norm.weight. has shape \[7\]"),
        (lambda t: t.update({"model.embed_tokens.weight": torch.ones(12, 6)}), "Set tokenizer: union"),
        (lambda t: t.update({"model.norm.weight": torch.ones(6, dtype=torch.int64)}), "is torch.int64"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"expert0: tensor 'model.norm.weight' has 6 values"),
        (lambda t: t["model.norm.weight"][2:3].fill_(float("inf")), r"expert0: tensor 'model.norm.weight' has 1 value"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_by_name(
    family: Family, tmp_path: Path, change: object, message: str
) -> None:
    base, experts = family
    tensors = load_file(experts[0] / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    write_model(experts[0], tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        merge(base, experts, tmp_path / "out", method="ties", density=0.5)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_nan_in_the_base_names_the_base(family: Family, tmp_path: Path) -> None:
    base, experts = family
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    write_model(base, tensors)
    with pytest.raises(CheckpointError, match=r"base: tensor 'model.norm.weight' has 1 value"):
        merge(base, experts, tmp_path / "out", method="task_arithmetic")


def test_models_of_two_architectures_are_refused(family: Family, tmp_path: Path) -> None:
    base, experts = family
    (experts[1] / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(CheckpointError, match="expert1 is a qwen2 model, .*base a llama model"):
        merge(base, experts, tmp_path / "out", method="task_arithmetic")


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        ("tise", {}, "Did you mean 'ties'"),
        ("ties", {}, "'density' is missing"),
        ("ties", {"density": 0}, "density"),
        ("ties", {"density": 1.2}, "density"),
        *((method, {}, "'density' is missing") for method in ("dare", "della", "breadcrumbs")),
        *((method, {"density": 0}, "density") for method in ("dare", "della", "breadcrumbs")),
        ("della", {"density": 0.9, "epsilon": 0.2}, r"leaves \(0, 1\)"),
        ("tsv", {"rank": 0}, "rank"),
        ("tsv", {"whiten_rtol": 1.5}, "whiten_rtol"),
        ("resm", {"bounds": (0.0, 2.0)}, "should hold 1 between two positive numbers"),
        ("iso_cts", {"common": -0.1}, "common"),
        ("wudi", {"ridge": 0}, "ridge"),
        ("ties", {"density": 0.5, "scal": 1}, "Did you mean 'scale'"),
        ("ties", {"density": [0.5]}, "1 values for 2 experts"),
        ("linear", {"weights": [1, -1]}, "sum to 0"),
        ("linear", {"weights": [1]}, "1 values for 2 experts"),
        ("task_arithmetic", {"dtype": "float33"}, "Did you mean 'float32'"),
    ],
)
def test_wrong_knobs_are_refused(
    family: Family, tmp_path: Path, method: str, knobs: dict[str, object], message: str
) -> None:
    base, experts = family
    with pytest.raises(ModicumError, match=message):
        merge(base, experts, tmp_path / "out", method=method, **knobs)
    assert not (tmp_path / "out").exists()


def test_tied_and_sharded_results_load_in_transformers(tmp_path: Path) -> None:
    import transformers

    from support import tiny_llama

    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        tiny_llama(seed=seed).save_pretrained(folder)
    merge(folders[0], folders[1:], tmp_path / "out", method="ties", density=0.5, shard_bytes=20_000)
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 6)
    checkpoint = Checkpoint(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        if name in checkpoint:
            torch.testing.assert_close(tensor, checkpoint[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_whatever_is_not_finite_is_found_and_nothing_else(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    refuse_non_finite("w", [torch.tensor([limits.max, limits.min, 0.0, -0.0, limits.tiny], dtype=dtype)], ["a"])
    refuse_non_finite("w", [torch.empty(0, dtype=dtype)], ["a"])
    for value in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        bad = torch.tensor([[1.0, value], [-2.0, 3.0]], dtype=dtype)
        for tensor in (bad, bad.T):
            with pytest.raises(ModicumError, match="b: tensor 'w' has 1 values"):
                refuse_non_finite("w", [torch.ones(2, dtype=dtype), tensor], ["a", "b"])


def test_what_is_measured_is_true() -> None:
    base = {"w": torch.zeros(2, 64)}
    a = torch.zeros(2, 64).index_fill(1, torch.arange(0, 64), 3.0)
    found = compare(base["w"], [a, -2 * a])
    assert found["norms"] == pytest.approx([3 * 128**0.5, 6 * 128**0.5])
    assert found["cosines"] == pytest.approx([-1.0])
    assert found["conflict"] == 1.0
    assert compare(base["w"], [a, a])["conflict"] == 0.0
    rng = torch.Generator().manual_seed(0)
    large = [torch.randn(1000, 700, generator=rng) for _ in range(2)]
    sampled = compare(torch.zeros(1000, 700), [large[0], large[0] + large[1]])
    assert sampled["norms"] == pytest.approx([700_000**0.5, 1_400_000**0.5], rel=0.01)
    assert sampled["cosines"] == pytest.approx([0.5**0.5], abs=0.01)
    assert sampled["conflict"] == pytest.approx(0.25, abs=0.01)
    assert compare(base["w"], [0 * a, 0 * a]) == {"norms": [0.0, 0.0], "cosines": [0.0], "conflict": 0.0}


def test_excluded_tensors_stay_as_in_the_base(family: Family, tmp_path: Path) -> None:
    base, experts = family
    measured = merge(base, experts, tmp_path / "out", method="tsv", exclude=r"norm|embed", diagnostics=True)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "norm" in name or "embed" in name}
    assert "survival" not in measured["model.norm.weight"]
    memory = merge_state_dicts(before, [load_file(e / "model.safetensors") for e in experts], method="tsv",
                               exclude=r"norm|embed")  # fmt: skip
    assert all(torch.equal(memory[name], after[name]) for name in after)


@pytest.mark.parametrize("holder", ["base", "expert", "both"])
def test_what_is_excluded_need_not_be_in_every_model(family: Family, tmp_path: Path, holder: str) -> None:
    """Heads that foresee several tokens get lost in fine-tuning; the rest merges as if they had never been."""
    folders = [family[0], *family[1]]
    plain = [load_file(folder / "model.safetensors") for folder in folders]
    holders = {"base": [0], "expert": [1], "both": [0, 1]}[holder]
    models = [m | ({"mtp.fc.weight": torch.full((2 + i, 4), float(i))} if i in holders else {})
              for i, m in enumerate(plain)]  # fmt: skip
    with pytest.raises(CheckpointError, match="tensor 'mtp.fc.weight'"):
        merge_state_dicts(models[0], models[1:], method="ties", density=0.5)
    for folder, model in zip(folders, models):
        write_model(folder, model)
    merge(folders[0], folders[1:], tmp_path / "out", method="ties", density=0.5, exclude="^mtp")
    found = load_file(tmp_path / "out/model.safetensors")
    expected = merge_state_dicts(plain[0], plain[1:], method="ties", density=0.5)
    assert found.keys() == models[0].keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert "mtp.fc.weight" not in found or not found["mtp.fc.weight"].any()  # the base's are zeros
    notes = " ".join(plan_merge(models[0], models[1:], method="ties", knobs={"density": 0.5}, exclude="^mtp").notes)
    assert ("are left out" in notes) == (holder == "expert")


@pytest.mark.parametrize(
    ("exclude", "message"),
    [("(", "is no regular expression"), ("rotary", "matches no tensor"), (".", "leaves no weight")],
)
def test_an_exclusion_that_cannot_be_meant_is_refused(
    family: Family, tmp_path: Path, exclude: str, message: str
) -> None:
    base, experts = family
    with pytest.raises(RecipeError, match=message):
        merge(base, experts, tmp_path / "out", method="tsv", exclude=exclude)
    with pytest.raises(RecipeError, match="none is given"):
        merge(None, experts, tmp_path / "out", method="linear", exclude="norm")


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("norm|embed_tokens", []),
        (
            "embed_tokens|input_layrnorm",
            ["exclude: 'input_layrnorm' matches no tensor. Did you mean 'input_layernorm'?"],
        ),
        ("norm|visual", ["exclude: 'visual' matches no tensor"]),
        (r"layers\.(0|7)\.", []),
    ],
)
def test_alternatives_of_an_exclusion_that_match_nothing_are_said(
    exclude: str, expected: list[str], family: Family
) -> None:
    models = [load_file(folder / "model.safetensors") for folder in (family[0], *family[1])]
    assert plan_merge(models[0], models[1:], method="linear", knobs={}, exclude=exclude).notes == expected


@pytest.mark.parametrize(
    ("method", "knobs", "expected"),
    [
        ("task_arithmetic", {"scale": 0}, "the result is the base"),
        ("ties", {"density": 0.5, "weights": [0, 0]}, "the result is the base"),
        ("linear", {"weights": [0, 0], "normalize": False}, "of 4 of 5 tensors are 0, and so are these tensors"),
        ("linear", {"weights": [0, 1]}, None),
    ],
)
def test_weights_of_zero_are_said(method: str, knobs: dict[str, object], expected: str | None, family: Family) -> None:
    models = [load_file(folder / "model.safetensors") for folder in (family[0], *family[1])]
    notes = plan_merge(models[0], models[1:], method=method, knobs=knobs, exclude="embed_tokens").notes
    assert (expected in " ".join(notes)) if expected else not notes


def test_another_base_than_the_experts_is_refused(family: Family, tmp_path: Path) -> None:
    base, experts = family
    known = fingerprint(base)
    merge(base, experts, tmp_path / "out", method="tsv", base_fingerprint=known)
    with pytest.raises(CheckpointError, match=f"expert0 has the fingerprint .*, expected {known}"):
        merge(experts[0], experts, tmp_path / "out2", method="tsv", base_fingerprint=known)
    with pytest.raises(RecipeError, match="none is given"):
        merge(None, experts, tmp_path / "out2", method="linear", base_fingerprint=known)
    assert not (tmp_path / "out2").exists()


def test_a_float32_mean_of_bfloat16_models_keeps_all_digits_without_a_base() -> None:
    a, b = torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([1.0078125, 3.015625], dtype=torch.bfloat16)
    merged = merge_state_dicts(None, [{"w": a}, {"w": b}], method="linear", dtype="float32")["w"]
    assert torch.equal(merged, (a.float() + b.float()) / 2)
    assert not torch.equal(merged, merged.bfloat16().float())


def test_of_a_stack_of_matrices_the_least_certain_speaks() -> None:
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(3, 6, 6, generator=rng)
    second = torch.randn(3, 6, 6, generator=rng)
    second[1] = first[1] + 1e-3 * second[1]  # whose directions nearly coincide

    def weakest(where: slice) -> float:
        models = [{"experts.weight": t[where].squeeze(0)} for t in (torch.zeros(3, 6, 6), first, second)]
        plan = plan_merge(models[0], models[1:], method="tsv", knobs={})
        return run_step(plan.steps[0])[1]["weakest"]

    each = [weakest(slice(i, i + 1)) for i in range(3)]
    assert weakest(slice(None)) == pytest.approx(min(each), rel=1e-4)
    assert min(each) < 0.1 < max(each)


SURVEYED: dict[str, dict[str, object]] = {
    "ties": {"density": 0.5, "trim_scope": "model"},
    "resm": {"ranks": "sparsity"},
}


def test_all_methods_that_survey_are_known() -> None:
    assert SURVEYED.keys() == {name for name, entry in merge_method.items() if entry.facts.survey}


@pytest.mark.parametrize("method", SURVEYED)
def test_a_survey_looks_at_what_the_method_itself_makes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [random_tensors(seed) | {"positions": torch.arange(3)} for seed in range(3)]
    plan = plan_merge(models[0], models[1:], method=method, knobs=SURVEYED[method])
    read: set[str] = set()
    real = Source.read

    def watched(source: Source) -> torch.Tensor:
        read.add(source.name)
        return real(source)

    monkeypatch.setattr(Source, "read", watched)
    found = survey(plan)
    assert read == {step.name for step in plan.steps if step.spec.dtype.is_floating_point and not step.averaged}
    assert found.keys() <= read
    assert ("model.embed_tokens.weight" in read) == (method == "ties")


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_the_bound_on_memory_is_that_of_the_largest_tensors_side_by_side(workers: int) -> None:
    model = {str(i): torch.zeros(10**i, 8) for i in range(5)}
    plan = plan_merge(model, [model, model], method="tsv", knobs={})
    largest = sorted((step.memory for step in plan.steps), reverse=True)
    assert largest[0] >= 3 * model["4"].numel() * 8  # deltas of two experts and their factors, in float64
    assert plan.memory_bound(workers) == sum(largest[:workers])
