"""Names of tensors, held to what transformers' own classes say of themselves."""

from __future__ import annotations

from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from modicum import layout

# Architectures whose default configuration transformers builds in a few hundredths of a second without memory.
ARCHITECTURES = (
    "albert", "bart", "bert", "biogpt", "bloom", "codegen", "cohere2", "deepseek_v3", "distilbert", "electra",
    "falcon", "falcon_h1", "gemma", "gemma3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "idefics3", "internvl", "jamba", "lfm2", "llama", "llava", "m2m_100", "mamba", "mamba2", "mixtral",
    "modernbert", "mpt", "opt", "phi", "qwen2_5_vl", "qwen3_moe", "qwen3_vl", "roberta", "rwkv", "t5", "umt5",
    "whisper", "xglm", "xlnet", "zamba2", "ctrl", "flaubert", "nemotron_h", "openai-gpt", "t5gemma", "xlm",
)  # fmt: skip


@cache
def empty(architecture: str) -> Any:
    """Return a model of the architecture's default shape, on no device."""
    import torch
    import transformers

    # transformers.AutoModelForCausalLM makes only the decoder of an encoder-decoder, so that one is tried last.
    config = transformers.AutoConfig.for_model(architecture)
    for auto in ("ImageTextToText", "Seq2SeqLM", "CausalLM", "MaskedLM"):
        maker = getattr(transformers, f"AutoModelFor{auto}")
        if type(config) in maker._model_mapping:
            with torch.device("meta"):
                return maker.from_config(config)
    raise AssertionError(f"transformers has no language model {architecture}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_and_heads_are_those_of_the_model_s_class(architecture: str) -> None:
    import torch

    model = empty(architecture)
    heads = [m for m in (model.get_output_embeddings(),) if m is not None]
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, torch.nn.Embedding | torch.nn.Linear):
            continue
        found = layout.role(f"{name}.weight")
        if module is model.get_input_embeddings():
            assert found == "embedding", name
        elif any(module is head for head in heads):
            assert found == "head", name
        elif isinstance(module, torch.nn.Embedding):
            assert found in ("embedding", "positions"), name
        else:
            assert found in (None, "router"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tensor_is_vocabulary_exactly_when_it_has_a_row_for_each_token(architecture: str) -> None:
    model = empty(architecture)
    size = model.get_input_embeddings().weight.shape[0]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert layout.is_vocabulary(name) == (parameter.shape[0] == size), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layers_of_every_stack_are_counted(architecture: str) -> None:
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = empty(architecture)
    expected = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and all(isinstance(m, GradientCheckpointingLayer) for m in module)
    }
    # Of nested lists, as T5's blocks of sublayers, the outer one is the stack.
    outermost = {name: n for name, n in expected.items() if not any(name.startswith(f"{other}.") for other in expected)}
    found = layout.stacks(dict(model.named_parameters(remove_duplicate=False)))
    assert outermost.items() <= found.items()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_come_first_and_heads_last(architecture: str) -> None:
    for name, _ in empty(architecture).named_parameters(remove_duplicate=False):
        if layout.role(name) in ("embedding", "positions", "head"):
            assert layout.comes_first(name) == (layout.role(name) != "head"), name


# Names in files that transformers renames while loading, and those of other libraries.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed_out.weight", "head"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("language_model.model.embed_tokens.weight", "embedding"),
        ("language_model.lm_head.weight", "head"),
        ("model.layers.61.embed_tokens.weight", "embedding"),
        ("model.layers.61.shared_head.head.weight", "head"),
        ("output.weight", "head"),
        ("token_embd.weight", "embedding"),
        ("model.tok_embeddings.weight", "embedding"),
        ("base_model.model.model.embed_tokens.weight", "embedding"),
        ("module._orig_mod.lm_head.weight", "head"),
        ("_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", None),
        ("model.layers.0.mlp.shared_expert_gate.weight", None),
        ("model.layers.0.attention.output.dense.weight", None),
        ("encoder.layer.0.output.weight", None),
        ("vision_tower.head.weight", None),
        ("model.embed_tokens_norm.weight", None),
        ("model.embedding_norm.weight", None),
        ("not_lm_head.weight", None),
        ("led.shared.weight", "embedding"),
        ("model.language_model.shared.weight", "embedding"),
        ("language_model.backbone.embeddings.weight", "embedding"),
        ("decoder.cls.predictions.bias", "head"),
        ("model.decoder.output_projection.weight", "head"),
        ("lm_head.weight_scale", None),
        ("model.embed_tokens.bias", None),
    ],
)
def test_names_count_by_whole_parts(name: str, expected: str | None) -> None:
    assert layout.role(name) == expected


@pytest.mark.parametrize(
    ("name", "stack", "number"),
    [
        ("h.3.attn.c_attn.weight", "h", 3),
        ("blk.11.ffn_up.weight", "blk", 11),
        ("decoder.block.2.layer.1.EncDecAttention.q.weight", "decoder.block", 2),
        ("model.layers.7.mlp.experts.3.down_proj.weight", "model.layers", 7),
        ("visual.merger.mlp.0.weight", None, 0),
        ("model.layers_norm.0.weight", None, 0),
        ("layers.3", None, 0),
    ],
)
def test_layers_are_found_by_whole_parts(name: str, stack: str | None, number: int) -> None:
    layer = layout.layer_of(name)
    assert (layer.stack, layer.number, layer.name) == (stack, number, name) if layer else stack is None


# Modules that build, or rename the tensors of, one architecture; all others ask layout.py.
OWN_NAMES = {"layout.py", "models/zero_token", "jobs/loading/builtins"}
KNOWN_HERE = (
    "embed_tokens", "embed_in", "embed_out", "wte", "wpe", "word_embeddings", "base_model.model.", "_orig_mod",
)  # fmt: skip


def test_no_other_module_knows_names_of_tensors() -> None:
    import ast

    import modicum

    root = Path(modicum.__file__).parent
    for path in sorted(root.rglob("*.py")):
        place = str(path.relative_to(root))
        if any(place.startswith(own) for own in OWN_NAMES):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                text = node.value.replace("tie_word_embeddings", "")  # a setting, not a tensor
                assert not any(name in text for name in KNOWN_HERE), f"{place}:{node.lineno} has {text!r}"


WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")


@pytest.mark.parametrize("some", [each for count in (1, 2, 3) for each in permutations(WRAPPERS, count)])
def test_a_name_without_its_wrappers_is_the_plain_one(some):
    assert layout.unwrapped("".join(some) + "model.layers.0.mlp.weight") == "model.layers.0.mlp.weight"
    inside = "".join(wrapper for wrapper in some if wrapper != "module.")  # DDP wraps whole models alone
    assert layout.unwrapped(f"model.layers.0.{inside}mlp.weight") == "model.layers.0.mlp.weight"


def test_a_module_called_module_inside_a_model_keeps_its_name():
    assert layout.unwrapped("model.module.weight") == "model.module.weight"
