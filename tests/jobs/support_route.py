"""A base, two experts of it, and prompts of their tasks, for tests of the job route."""

import json

import torch

from support import byte_tokenizer, tiny_llama

WORDS = {"low": "abcdef", "high": "uvwxyz"}


def expert(seed, scale=0.02):
    model = tiny_llama(seed=0, num_hidden_layers=3)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=rng))
    return model


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


def write_parts(folder):
    """Write a base, two experts, and prompts of three tasks."""
    for name, model in (("base", expert(0, 0.0)), ("low", expert(1)), ("high", expert(2))):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    rng = torch.Generator().manual_seed(0)
    (folder / "text.jsonl").write_text('{"text": "no prompt"}\n' * 6)
    for name, letters in {**WORDS, "other": "012345"}.items():
        rows = []
        for _ in range(24):
            picks = torch.randint(len(letters), (6,), generator=rng).tolist()
            rows.append(json.dumps({"prompt": "".join(letters[i] for i in picks), "completion": "x"}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder
