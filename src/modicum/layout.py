"""Names of tensors and of files: the one module that knows what the parts of a model are called.

A tensor's name is a path of parts between dots, and every part counts whole: ``embed_out`` is an output layer although
it begins like an embedding. For transformers' own classes the truth is ``get_input_embeddings()`` and
``get_output_embeddings()``; the tests hold this module to both, for every architecture that they can build.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Literal, NamedTuple

Role = Literal["embedding", "positions", "head", "router"]
Unit = Literal["block", "sublayer", "matrix"]

ADAPTER_PREFIX = "base_model.model."  # PEFT writes it before every name of an adapter's file
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"  # weights in several files, and in one
# What a trainer keeps beside a model: nothing of the model depends on it.
STATE_FILES = re.compile(
    r"^(optimizer|scheduler|rng_state|scaler|training_args|trainer_state)[\w.-]*$|^manifest\.json$|^parts-\d+\.state$"
)
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Names of modules, by their last parts. A name of the first table is unmistakable wherever it stands.
_ROLES: dict[str, Role] = {
    **dict.fromkeys(
        (
            "embed_tokens", "embed_tokens_per_layer", "wte", "word_embeddings", "word_embedding", "embed_in",
            "tok_embeddings", "token_embd", "token_embedding", "tokens_embed",
        ),
        "embedding",
    ),
    **dict.fromkeys(
        (
            "wpe", "embed_positions", "position_embeddings", "position_embedding", "position_embd", "pos_embed",
            "token_type_embeddings", "relative_attention_bias", "rel_embeddings", "positions_embed",
        ),
        "positions",
    ),
    **dict.fromkeys(
        (
            "lm_head", "embed_out", "shared_head.head", "lm_head.decoder", "predictions.decoder", "generator_lm_head",
            "vocab_projector", "lm_loss", "pred_layer.proj", "lm_head.out_proj", "cls.predictions", "head.decoder",
            "decoder.output_projection",
        ),
        "head",
    ),
    "router": "router",
    "gate": "router",
}  # fmt: skip
# Short names that mean something else inside a layer or a vision tower, so they count as the whole path only.
_WHOLE: dict[str, Role] = {
    **dict.fromkeys(("shared", "model.shared", "led.shared", "model.language_model.shared"), "embedding"),
    **dict.fromkeys(("embeddings", "embedding", "embed", "transformer.w", "cpmant.input_embedding"), "embedding"),
    **dict.fromkeys(("backbone.embeddings", "backbone.embedding", "rwkv.embeddings"), "embedding"),
    **dict.fromkeys(("transformer.embeddings", "model.embeddings", "model.language_model.embeddings"), "embedding"),
    **dict.fromkeys(("language_model.model.embeddings", "language_model.backbone.embeddings"), "embedding"),
    **dict.fromkeys(("output", "language_model.output", "head", "decoder"), "head"),
    **dict.fromkeys(("proj_out", "output_projection", "predictions"), "head"),
}
_LAYERS = frozenset({"layers", "layer", "h", "blocks", "block", "blk", "resblocks", "albert_layer_groups"})
# Parts of names that stand before the layers besides the tables themselves.
_FIRST = frozenset(
    {
        "embeddings", "word_embeddings_layernorm", "layernorm_embedding", "embed_layer_norm", "embeddings_project",
        "embedding_hidden_mapping_in", "patch_embed", "patch_embedding", "pre_layrnorm",
    }
)  # fmt: skip
# Parts of a model of text and more, by parts of the names of its tensors; the first that is found counts.
_MODULES = {
    "multi_modal_projector": frozenset(
        {
            "multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list", "aligner",
            "embed_vision", "embed_audio", "modality_projection",
        }
    ),
    "vision_tower": frozenset({"vision_tower", "vision_model", "vision_encoder", "visual", "vision"}),
    "audio_tower": frozenset({"audio_tower", "audio_model", "audio_encoder"}),
}  # fmt: skip
_TEXT_MODULES = ("text_decoder", "language_model", "text_model", "text", "default")
_RECOMPUTED = frozenset({"inv_freq", "position_ids", "masked_bias"})
_STATISTICS = frozenset({"running_mean", "running_var"})  # buffers of torch's normalisation layers
# Stacks of matrices: of experts, or of heads, whose parameter is a weight without being called so alone.
_STACKS = re.compile(r"experts\.|(?:^|\.)(?:input|output)_linear\.weight$|(?:proj|gate)_weight$")
_ENTRIES = frozenset({"A_log"})  # each of whose entries is a number of its own, though they stand in a matrix
_MASKS = ("attn.bias", "attention.bias")  # causal masks of GPT-2 and GPT-NeoX, of shape (1, 1, n, n)

# Any one of the first group holds a vocabulary; those of the second add to it.
VOCABULARY_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "source.spm",
)  # fmt: skip
VOCABULARY_PARTS = ("merges.txt", "added_tokens.json", "target.spm")
TOKENIZER_FILES = (
    *VOCABULARY_FILES, *VOCABULARY_PARTS, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
# What architectures call the number of their layers in config.json.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# What they call the number of tokens there, besides vocab_size: in encoder-decoders, and of tables for each layer.
VOCABULARY_SIZES = ("decoder_vocab_size", "vocab_size_per_layer_input")
# Lists in config.json with an entry for each layer.
LAYER_LISTS = frozenset({"layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "no_rope_layers"})
# Lists in config.json of the numbers of some layers, and numbers of the first layers that are of another kind.
LAYER_NUMBERS = frozenset(
    {
        "mlp_only_layers",
        "attn_layer_indices",
        "full_attn_idxs",
        "cross_attention_layers",
        "hybrid_layer_ids",
        "moe_layers",
    }
)
FIRST_LAYERS = frozenset({"first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"})

_PREFIXES = frozenset({"model", "language_model", "transformer", "vision_model", "text_model"})


class Layer(NamedTuple):
    """Where a tensor stands in a stack of layers: ``{stack}.{number}.{rest}``."""

    stack: str
    number: int
    rest: str

    @property
    def name(self) -> str:
        """The tensor's name."""
        return f"{self.stack}.{self.number}.{self.rest}"


def modules(names: Iterable[str]) -> dict[str, str]:
    """Return the module of each tensor: the text's, that of pictures or sound, or encoder and decoder.

    Example:
        >>> found = modules(["model.language_model.norm.weight", "model.visual.merger.mlp.0.weight"])
        >>> list(found.values())
        ['text_decoder', 'multi_modal_projector']
    """
    listed = list(names)
    find = module_in(listed)
    return {name: find(name) for name in listed}


def module_in(names: Iterable[str]) -> Callable[[str], str]:
    """Return what finds the module of a tensor in a model of these tensors, whether it is one of them or not."""
    both = {"encoder", "decoder"} <= {part for stack in stacks(names) for part in stack.split(".")[:2]}
    return lambda name: _module_of(name, both)


def _module_of(name: str, both: bool) -> str:
    parts = name.split(".")
    if both:
        side = next((part for part in parts[:2] if part in ("encoder", "decoder")), None)
        return side or ("decoder" if role(name) == "head" else "shared")
    return next((module for module, known in _MODULES.items() if not known.isdisjoint(parts)), _TEXT_MODULES[0])


def module_called(name: str) -> str:
    """Return the module that a file calls ``name``.

    Example:
        >>> module_called("visual"), module_called("language_model"), module_called("encoder")
        ('vision_tower', 'text_decoder', 'encoder')
    """
    if name in _TEXT_MODULES:
        return _TEXT_MODULES[0]
    return next((module for module, known in _MODULES.items() if name in known), name)


def unwrapped(name: str) -> str:
    """Return a name without what ``torch.compile``, FSDP and DDP put into it.

    Example:
        >>> unwrapped("module._orig_mod.model.norm.weight")
        'model.norm.weight'
    """
    return _WRAPPER.sub("", name).removeprefix("module.")


def layer_of(name: str) -> Layer | None:
    """Return the layer that a tensor belongs to: the outermost one, where layers are nested.

    Example:
        >>> layer_of("model.vision_tower.encoder.layers.3.mlp.fc1.weight")
        Layer(stack='model.vision_tower.encoder.layers', number=3, rest='mlp.fc1.weight')
        >>> layer_of("model.norm.weight") is None
        True
    """
    parts = name.split(".")
    for place in range(1, len(parts) - 1):
        if is_number(parts[place]) and parts[place - 1] in _LAYERS:
            return Layer(".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :]))
    return None


def is_number(part: str) -> bool:
    """Whether a part of a name is a number as layers and experts have one.

    Example:
        >>> is_number("12"), is_number("\u00b2"), is_number("9" * 5000)
        (True, False, False)
    """
    return part.isascii() and part.isdigit() and len(part) < 10


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Return the stacks of layers and how many layers each has.

    Example:
        >>> stacks(["encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "lm_head.weight"])
        {'encoder.block': 2, 'decoder.block': 1}
    """
    found: dict[str, int] = {}
    for name in names:
        if layer := layer_of(name):
            found[layer.stack] = max(found.get(layer.stack, 0), layer.number + 1)
    return found


def unit_of(name: str, kind: Unit = "block") -> str | None:
    """Return the part of a model that a tensor belongs to, ``None`` outside the stacks of layers.

    Args:
        name: The tensor.
        kind: ``block`` is a whole layer, ``sublayer`` one of its direct parts, such as its attention, ``matrix`` a
            single module.

    Example:
        >>> [unit_of("model.layers.3.mlp.up_proj.weight", kind) for kind in ("block", "sublayer", "matrix")]
        ['model.layers.3', 'model.layers.3.mlp', 'model.layers.3.mlp.up_proj']
    """
    layer = layer_of(name)
    if layer is None:
        return None
    block = f"{layer.stack}.{layer.number}"
    if kind == "block":
        return block
    module = layer.rest.removesuffix(".weight").removesuffix(".bias")
    return f"{block}.{module.partition('.')[0] if kind == 'sublayer' else module}"


def natural(name: object) -> tuple[object, ...]:
    """Return a sorting key under which numbers in a name count as numbers.

    Example:
        >>> sorted(["h.10", "h.9"], key=natural)
        ['h.9', 'h.10']
    """
    numbers = re.split(r"([0-9]+)", str(name))
    # Without zeros in front, the longer number is the larger one, however long it is.
    stripped = [part.lstrip("0") if place % 2 else part for place, part in enumerate(numbers)]
    return tuple((0, len(part), part) if place % 2 else (1, 0, part) for place, part in enumerate(stripped))


def role(name: str) -> Role | None:
    """Return what a tensor is where its rows belong to tokens, positions or experts, ``None`` for all others.

    Example:
        >>> role("model.embed_tokens.weight"), role("embed_out.weight"), role("model.layers.0.mlp.gate_proj.weight")
        ('embedding', 'head', None)
    """
    module, _, kind = unwrapped(name).removeprefix(ADAPTER_PREFIX).rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    parts = module.split(".")
    found = _WHOLE.get(module) or _ROLES.get(".".join(parts[-2:])) or _ROLES.get(parts[-1])
    # Of the biases only a head's has a number for each token.
    return found if kind == "weight" or found == "head" else None


def token_axis(name: str) -> int | None:
    """Return the axis along which a tensor has an entry for each token, ``None`` for all others.

    That of embeddings, of output layers and their biases is the first one; BART's bias is a row of a matrix.

    Example:
        >>> [token_axis(name) for name in ("lm_head.bias", "final_logits_bias", "transformer.wpe.weight")]
        [0, 1, None]
    """
    if role(name) in ("embedding", "head"):
        return 0
    return 1 if unwrapped(name).rpartition(".")[2] == "final_logits_bias" else None


def with_tokens(name: str, shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Return the shape that a tensor has in a vocabulary of ``size`` tokens, its own where it has none.

    Example:
        >>> with_tokens("final_logits_bias", (1, 9), 7), with_tokens("model.norm.weight", (9,), 7)
        ((1, 7), (9,))
    """
    axis = token_axis(name)
    return tuple(size if place == axis else length for place, length in enumerate(shape))


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has an entry for each token: an embedding, or an output layer and its bias.

    Example:
        >>> [is_vocabulary(name) for name in ("lm_head.bias", "transformer.wte.weight", "transformer.wpe.weight")]
        [True, True, False]
    """
    return token_axis(name) is not None


def is_recomputed(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a buffer that transformers computes again, so that a file may hold it or not.

    Example:
        >>> is_recomputed("h.0.attn.bias", (1, 1, 8, 8)), is_recomputed("h.0.attn.c_attn.bias", (24,))
        (True, False)
    """
    parts = name.split(".")
    return parts[-1] in _RECOMPUTED or (len(shape) == 4 and ".".join(parts[-2:]) in _MASKS)


def is_running_statistic(name: str) -> bool:
    """Whether a tensor is a statistic that a normalisation layer keeps of its inputs: a mean of several is wrong.

    Example:
        >>> is_running_statistic("body.1.running_var"), is_running_statistic("body.1.weight")
        (True, False)
    """
    return name.rpartition(".")[2] in _STATISTICS


def is_linear_map(name: str, axes: int = 2) -> bool:
    """Whether a tensor is a matrix that maps inputs to outputs, or a stack of such matrices, one for each expert.

    Singular directions mean nothing where rows are looked up or scored, nor those of a convolution's slices.

    Example:
        >>> [is_linear_map(f"h.0.mlp.{name}") for name in ("up_proj.weight", "gate.weight", "experts.up_proj_bias")]
        [True, False, False]
        >>> is_linear_map("h.0.mlp.experts.up_proj", 3), is_linear_map("h.0.mixer.conv1d.weight", 3)
        (True, False)
    """
    if role(name) is not None or name.endswith("bias") or name.rpartition(".")[2] in _ENTRIES:
        return False  # biases of experts stand in a matrix too
    return axes == 2 or (axes == 3 and bool(_STACKS.search(name)))


def copies(names: Container[str]) -> list[tuple[str, str]]:
    """Return tables that encoder and decoder share with the model, each with the name under which it is kept.

    Example:
        >>> copies({"shared.weight", "encoder.embed_tokens.weight"})
        [('encoder.embed_tokens.weight', 'shared.weight')]
    """
    kept = ("shared.weight", "model.shared.weight")
    return [(copy, table) for table in kept if table in names for copy in copies_of(table) if copy in names]


def copies_of(table: str) -> list[str]:
    """Return the names under which encoder and decoder have the table of the model that is called ``table``."""
    at = table.removesuffix("shared.weight")
    return [f"{at}{side}.embed_tokens.weight" for side in ("encoder", "decoder")] if at in ("", "model.") else []


def inner(name: str) -> str:
    """Return a tensor's name without the prefixes that differ between files and classes.

    Example:
        >>> inner("model.language_model.layers.0.mlp.up_proj.weight"), inner("transformer.h.0.ln_1.weight")
        ('layers.0.mlp.up_proj.weight', 'h.0.ln_1.weight')
    """
    parts = name.replace(".block_sparse_moe.", ".mlp.").split(".")
    return ".".join(part for part in parts if part not in _PREFIXES)


def also_called(name: str) -> tuple[str, ...]:
    """Return the names by which people know a tensor: that of published files, and that of transformers' class.

    Example:
        >>> also_called("model.layers.0.block_sparse_moe.gate.weight")[1]
        'model.layers.0.mlp.gate.weight'
    """
    other = name.replace(".block_sparse_moe.", ".mlp.")
    return (name,) if other == name else (name, other)


def comes_first(name: str) -> bool:
    """Whether a tensor outside the layers stands before them: an embedding and what belongs to it.

    Example:
        >>> [comes_first(name) for name in ("model.embed_tokens.weight", "model.norm.weight", "embed_out.weight")]
        [True, False, False]
    """
    return role(name) in ("embedding", "positions") or not _FIRST.isdisjoint(name.split("."))
