"""Before a run is done, the folder that it saved is loaded as a user would and compared with the trained model."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from modicum.adapters.layers import lora_layers
from modicum.errors import CheckpointError, ModicumError, RecipeError, UnsupportedError
from modicum.jobs import execute
from modicum.jobs.training.adapter import after_backward, initialize, make_optimizer, peft_config
from modicum.jobs.training.verification import check_saved, logits_of, tolerance
from modicum.random import generator
from modicum.recipe import parse
from modicum.record import read_record
from modicum.registry import adapter_init
from support import tiny_llama

QUICK = {name: {"preheat_rank": 32, "preheat_steps": 1} for name in ("hrp", "lora_squeeze")}
NAMES = sorted(set(adapter_init) - {"loftq"})
ROWS = [[5, 9, 77, 30, 12], [8, 200, 41]]
FIELDS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "both as one": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "rsLoRA": {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "saved as one": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "narrow": {"target_modules": ["q_proj", "k_proj"], "rank": 24},
    "some layers": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "layers_to_transform": [0]},
}
CASES = [(kind, tied) for kind in FIELDS for tied in (True, False) if tied or kind in ("head", "embedding")]


def batches(count=2):
    rng = generator(0, "batches")
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 264, (count, 2, 12), generator=rng)]


def base_model(*, tied=True):
    # Without a padding token: DoRA divides by the norm of its row, which is zero.
    return tiny_llama(tie_word_embeddings=tied, num_hidden_layers=1, pad_token_id=None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a model whose head is the embedding, and of one whose head is not."""
    folders = {tied: tmp_path_factory.mktemp("base") for tied in (True, False)}
    for tied, folder in folders.items():
        base_model(tied=tied).save_pretrained(folder)
    return folders


def trained_and_saved(name, folder, base, *, tied, **fields):
    """Train an adapter for a step and save it; return the trained model's logits."""
    settings = {"rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields
    model = get_peft_model(base_model(tied=tied), peft_config(name, {}, **settings)).eval()
    model.peft_config["default"].base_model_name_or_path = str(base)
    started = initialize(model, name, QUICK.get(name, {}), batches=batches, lr=1e-3, total_steps=4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, name, {}, lr=1e-2) or torch.optim.AdamW(parameters, lr=1e-2)
    model(**batches()[0]).loss.backward()
    optimizer.step()
    after_backward(model, name, 0)
    trained = logits_of(model, ROWS)
    started.prepare(model)
    model.save_pretrained(folder)
    started.finish(folder)
    return trained


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT advises on embeddings as targets
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_every_initialisation_saves_what_was_trained_whatever_its_targets(kind, tied, bases, tmp_path):
    refused = set()
    for name in NAMES:
        try:
            trained = trained_and_saved(name, tmp_path / name, bases[tied], tied=tied, **FIELDS[kind])
        except ValueError as error:  # PEFT's own: AdaLoRA has no layer for embeddings
            assert name == "adalora" and "Embedding" in str(error)
            refused.add(name)
            continue
        assert check_saved(tmp_path / name, trained, ROWS) <= 1e-4, name
    assert refused <= {"adalora"}


def test_the_scaling_of_rslora_is_kept_in_the_form_of_a_singular_value_decomposition():
    plain, other = (peft_config("adalora", {}, rank=4, lora_alpha=alpha) for alpha in (16, 8))
    assert peft_config("adalora", {}, rank=4, lora_alpha=8, use_rslora=True).lora_alpha == plain.lora_alpha
    assert other.lora_alpha == plain.lora_alpha / 2


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "abc"}) + "\n" for n in range(8)))
    return path


def recipe(model, rows, **changes):
    trainer = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    data = {"job": "train", "model": str(model), "data": {"path": str(rows), "max_length": 64}, "trainer": trainer}
    return data | changes


@pytest.mark.parametrize("output", ["adapter", "model"])
def test_a_folder_that_is_not_the_trained_model_is_no_result_and_the_checkpoints_stay(
    tiny_model, rows, tmp_path, monkeypatch, output
):
    from modicum.jobs.training.parts.verification import Verification

    verify = Verification.verify

    def spoilt(self, folder, parts):
        [file] = folder.glob("*.safetensors")
        tensors = load_file(file)
        name = next(key for key in sorted(tensors) if key.endswith(("q_proj.weight", "q_proj.lora_B.weight")))
        save_file(tensors | {name: tensors[name] + 0.05}, file, metadata={"format": "pt"})
        verify(self, folder, parts)

    monkeypatch.setattr(Verification, "verify", spoilt)
    changes = {"adapter": {"rank": 2}} if output == "adapter" else {}
    with pytest.raises(CheckpointError, match="not what was trained: its logits lie") as caught:
        execute(parse(recipe(tiny_model, rows, **changes)), tmp_path / "r", quiet=True)
    assert "\n" not in str(caught.value) and "hold the trained weights" in str(caught.value)
    assert not (tmp_path / "r" / output).exists() and (tmp_path / "r" / "checkpoints" / "checkpoint-2").is_dir()
    assert read_record(tmp_path / "r")["status"] == "failed"


def test_a_folder_that_does_not_load_is_no_result(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="What was saved does not load"):
        check_saved(tmp_path, [], ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_a_base_in_16_bits_is_no_difference(dtype, tmp_path):
    model = base_model().to(dtype)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, peft_config("pissa", {}, rank=4, lora_alpha=8, target_modules="all-linear"))
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    started = initialize(wrapped, "pissa", {}, batches=batches, lr=1e-3)
    trained = logits_of(wrapped, ROWS)
    wrapped.save_pretrained(tmp_path / "adapter")
    started.finish(tmp_path / "adapter")
    assert 0 < check_saved(tmp_path / "adapter", trained, ROWS) < tolerance(dtype)


@pytest.mark.parametrize("field", [("init_lora_weights", "pissa"), ("init_lora_weights", False), ("use_rslora", False)])
@pytest.mark.parametrize("init", NAMES)
def test_an_initialisation_and_a_configuration_that_says_otherwise_are_refused(tiny_model, rows, init, field):
    key, value = field
    if key == "use_rslora" and init != "rslora":
        return
    with pytest.raises(RecipeError, match=f"adapter.init is {init}, which needs {key}"):
        parse(recipe(tiny_model, rows, adapter={"init": init, "config": {key: value}}))


@pytest.mark.parametrize("init", NAMES)
def test_a_kind_of_adapter_that_a_method_cannot_start_is_refused_when_the_recipe_is_read(tiny_model, rows, init):
    for key in ("use_dora", "lora_bias"):
        adapter = {"init": init, "config": {key: True}}
        if adapter_init[init].facts.stock:
            parse(recipe(tiny_model, rows, adapter=adapter))
        else:
            with pytest.raises((UnsupportedError, ModicumError), match=f"adapter.config.{key} is more. Drop one."):
                parse(recipe(tiny_model, rows, adapter=adapter))


@pytest.mark.parametrize("name", [name for name in NAMES if adapter_init[name].facts.most_rank])
def test_a_rank_above_that_of_a_narrow_module_is_clipped_with_a_note(name):
    fields = {"rank": 24, "lora_alpha": 48, "target_modules": ["q_proj", "k_proj"]}
    model = get_peft_model(base_model(), peft_config(name, {}, **fields))
    started = initialize(model, name, QUICK.get(name, {}), batches=batches, lr=1e-3)
    layers = lora_layers(model)
    most = adapter_init[name].facts.most_rank
    bounds = {key: most(layer.out_features, layer.in_features) for key, layer in layers.items()}
    assert {key: layer.r["default"] for key, layer in layers.items()} == {key: min(24, n) for key, n in bounds.items()}
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    assert any("clipped to what they can have" in note for note in started.notes) == (min(bounds.values()) < 24)


@pytest.mark.filterwarnings("ignore:Adapter .default")  # PEFT takes ranks that AdaLoRA dropped for lost shards
@pytest.mark.parametrize("init", ["adalora", "pissa", "lora_xs", "default"])
def test_the_best_checkpoint_is_what_is_saved(tiny_model, rows, tmp_path, init):
    trainer = {"max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 0.5, "load_best_model_at_end": True}
    trainer |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    data = {"path": str(rows), "max_length": 64, "size": 4}
    changes = {"adapter": {"rank": 2, "init": init}, "eval_data": data, "trainer": trainer}
    assert execute(parse(recipe(tiny_model, rows, **changes)), tmp_path / "r", quiet=True).done


@pytest.mark.parametrize("target", [{}, {"target_modules": "all-linear"}])
def test_layers_may_be_chosen_without_naming_modules(tiny_model, rows, tmp_path, target):
    config = {"layers_to_transform": [1], **target}
    run = execute(parse(recipe(tiny_model, rows, adapter={"rank": 2, "config": config})), tmp_path / "r", quiet=True)
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 14 and all(".layers.1." in key for key in saved)
