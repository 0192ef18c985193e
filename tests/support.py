"""Small real parts for tests: a random two-layer Llama and a byte-level tokenizer, both made in process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` held to its annotations in every call, the shapes of its tensors included."""
    from beartype import BeartypeConf, beartype
    from jaxtyping import jaxtyped

    # A whole number may stand for a float, as it may for every user.
    checker: Callable[..., Any] = jaxtyped(function, typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))
    return checker


def tiny_family(root: Path) -> Path:
    """Write random models ``base``, ``one`` and ``two`` of one shape, each with its tokenizer, and return ``root``."""
    for seed, name in enumerate(("base", "one", "two")):
        tiny_llama(seed=seed).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    """Return a random Llama of about 60 k parameters whose vocabulary fits :func:`byte_tokenizer`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | overrides
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings))


def byte_tokenizer(*, chat: bool = True) -> Any:
    """Return a tokenizer with one token for each byte, the special tokens first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def measured(method: str, experts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return made-up statistics of each expert by the names of its tensors; none for a method that needs none."""
    import torch

    from modicum.registry import merge_method
    from modicum.weights.statistics import shape_of

    facts = merge_method[method].facts
    if not facts.statistics:
        return []
    found: list[dict[str, Any]] = []
    for seed, tensors in enumerate(experts):
        rng = torch.Generator().manual_seed(seed)
        found.append({})
        for name, tensor in tensors.items():
            shape = shape_of(facts.measure, tuple(tensor.shape))
            if shape is not None:
                numbers = torch.rand(shape, generator=rng) + 0.1
                found[-1][name] = numbers @ numbers.T if facts.measure == "gram" else numbers
    return found


@cache
def safety_rows(acts_on: str) -> dict[str, Any]:
    """Return what a train recipe needs beside an objective of safety; its rows lie in a file outside the tests."""
    import json
    import tempfile
    from pathlib import Path

    reasons = {"completion": "<think>\nFine.\n</think>\n\nHere."}
    contrasts = [{"completion": "No.", "rejected": said, "kind": "illegal"} for said in ("Yes.", "Sure.", "Here.")]
    rows = [reasons] * 7 if acts_on == "reasoning" else [*contrasts, *contrasts, {**contrasts[0], "kind": "helpful"}]
    path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", **row}) + "\n" for n, row in enumerate(rows)))
    return {"data": {"path": str(path), "max_length": 128}} | (
        {} if acts_on == "reasoning" else {"adapter": {"rank": 2}}
    )


def with_own_entries(monkeypatch: Any, table: Any) -> None:
    """Let a test register in a table what no other test sees.

    All entries are loaded first: a module that is imported meanwhile would be lost to the table with the test's own.
    """
    monkeypatch.setattr(table, "_entries", {name: table[name] for name in table})


# Knobs with which three equal experts merge into that expert (case H16).
EQUAL_EXPERTS = {
    "linear": {},
    "karcher": {},
    "model_stock": {},
    "task_arithmetic": {"scale": 1 / 3},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0, "scale": 1 / 3},
}
