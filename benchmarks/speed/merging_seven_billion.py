"""Two folders of a 7 B model as people publish them, merged without a flag: seconds, memory, and the numbers checked.

    python -m benchmarks.speed.merging_seven_billion [--work DIR]

The folders have Mistral-7B's shape in bfloat16, in two and in three files, with tokenizers, a chat template in one, and
configurations by different versions of transformers. They are merged by the mergekit file that is most common on the
Hub for two such models (SLERP with gradients for attention and MLP), and by a recipe (TIES). Six tensors of each result
are held to float64; the folder is opened by transformers. Takes 44 GB of disk. Numbers are made up, and files larger
than the memory are read from the disk, whose speed counts: ``read_and_write`` are the seconds of these bytes alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from benchmarks.provenance import origin
from benchmarks.speed.merging import copy_bytes, measure
from benchmarks.speed.shapes import llama_shapes
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modicum.environment import environment
from modicum.record import write_atomic
from modicum.weights.files import Spec, lay_out

RESULT = Path(__file__).parents[1] / "results" / "merge-7b.json"
MISTRAL_7B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
ABOUT = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "sliding_window": 4096, "rope_theta": 10000.0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.02,
}  # fmt: skip
HELD = [
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.9.mlp.down_proj.weight",
    "model.layers.31.self_attn.k_proj.weight", "model.layers.17.post_attention_layernorm.weight", "lm_head.weight",
]  # fmt: skip
GRADIENTS = {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0]}
PERIOD = 8_388_593  # of the made-up numbers: prime, so that no two tensors are alike


def write_model(folder: Path, values: torch.Tensor, *, shards: int, about: dict[str, Any], chat: bool) -> None:
    """Write a folder as ``save_pretrained`` would, its tensors in order of their names."""
    folder.mkdir(parents=True)
    shapes = sorted(llama_shapes(MISTRAL_7B).items())
    total, index, position = sum(2 * int(np.prod(shape)) for _, shape in shapes), {}, 0
    block = memoryview(values.view(torch.uint8).numpy())
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part: dict[str, Spec] = {}
        while shapes and position < total * (number + 1) // shards:
            tensor, shape = shapes.pop(0)
            part[tensor] = Spec(shape, torch.bfloat16)
            position += part[tensor].nbytes
        index |= dict.fromkeys(part, name)
        header, slots = lay_out(folder / name, part)
        left = sum(slot.spec.nbytes for slot in slots.values())
        with (folder / name).open("wb") as file:
            file.write(header)
            while left > 0:
                file.write(block[:left])
                left -= len(block)
    listed = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed, indent=2))
    (folder / "config.json").write_text(json.dumps(ABOUT | MISTRAL_7B | about, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=32768
    )
    if chat:
        tokenizer.chat_template = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
    tokenizer.save_pretrained(folder)


def prepare(work: Path) -> list[Path]:
    """Write the two folders, unless they are there."""
    folders = [work / "base", work / "chat"]
    if not folders[1].exists():
        shutil.rmtree(work, ignore_errors=True)
        rng = torch.Generator().manual_seed(0)
        first = 0.02 * torch.randn(PERIOD, generator=rng)
        write_model(folders[0], first.bfloat16(), shards=2, about={"torch_dtype": "bfloat16"}, chat=False)
        second = (first + 0.002 * torch.randn(PERIOD, generator=rng)).bfloat16()
        about = {"dtype": "bfloat16", "use_cache": False, "transformers_version": "5.24.0", "attention_dropout": 0.0}
        write_model(folders[1], second, shards=3, about=about, chat=True)
    return folders


def files_of(folder: Path) -> dict[str, Path]:
    """Return in which file each tensor lies."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def tensor_of(folder: Path, name: str) -> NDArray[np.float64]:
    """Return one tensor in float64."""
    with safe_open(files_of(folder)[name], "pt") as file:
        found: NDArray[np.float64] = file.get_tensor(name).double().numpy()
        return found


def slerp(name: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Walk along the great circle from one tensor to another, as far as the layer's place in the gradient says."""
    t = 0.5
    for part, gradient in GRADIENTS.items():
        if part in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            t = float(np.interp(layer / (int(MISTRAL_7B["num_hidden_layers"]) - 1) * 4, range(5), gradient))
    cosine = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def ties(_: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add the larger half of one difference to the base; of equal magnitudes the first ones."""
    delta = b - a
    kept = np.argsort(-np.abs(delta), axis=None, kind="stable")[: delta.size // 2]
    found = a.copy()
    found.reshape(-1)[kept] += delta.reshape(-1)[kept]
    return found


def check(out: Path, folders: list[Path], expected: Callable[..., NDArray[np.float64]]) -> dict[str, float]:
    """Open the folder, hold six tensors to float64, and return their distances as shares of their largest entry."""
    config = AutoConfig.from_pretrained(out)
    with torch.device("meta"):
        names = set(AutoModelForCausalLM.from_config(config).state_dict())
    if names != set(files_of(out)):
        raise AssertionError("other tensors than the class has")
    if AutoTokenizer.from_pretrained(out).decode(AutoTokenizer.from_pretrained(out)("a word")["input_ids"]) != "a word":
        raise AssertionError("the tokenizer does not work")
    found = {}
    for name in HELD:
        a, b, merged = (tensor_of(folder, name) for folder in (*folders, out))
        found[name] = float(np.abs(merged - expected(name, a, b)).max() / np.abs(merged).max())
    if max(found.values()) > 2**-8:  # half a unit in the last place of bfloat16 is 2^-9 of an entry
        raise AssertionError(f"other numbers: {found}")
    return found


def main() -> None:
    """Write the folders, merge them in both ways, check, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "modicum-merge-7b")
    work = parser.parse_args().work
    folders = prepare(work / "models")
    layers = [0, MISTRAL_7B["num_hidden_layers"]]
    documents: dict[str, dict[str, Any]] = {
        "slerp": {
            "slices": [{"sources": [{"model": str(folder), "layer_range": layers} for folder in folders]}],
            "merge_method": "slerp", "base_model": str(folders[0]), "dtype": "bfloat16",
            "parameters": {"t": [*({"filter": part, "value": values} for part, values in GRADIENTS.items()),
                                 {"value": 0.5}]},
        },
        "ties": {"job": "merge", "base": str(folders[0]), "experts": [str(folders[1])],
                 "method": {"name": "ties", "density": 0.5}},
    }  # fmt: skip
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    results: dict[str, Any] = {"what": __doc__, "environment": environment(), "read_gb": gigabytes, **origin()}
    start = time.perf_counter()
    copy_bytes(files[:1] + files[2:], work / "copy")
    copy_bytes(files[1:2], work / "copy")  # as many are written as the result has
    results["read_and_write"] = time.perf_counter() - start
    (work / "copy").unlink()
    for name, document in documents.items():
        recipe, out = work / f"{name}.yaml", work / f"out-{name}"
        recipe.write_text(yaml.safe_dump(document, sort_keys=False))
        shutil.rmtree(out, ignore_errors=True)
        found = measure([sys.executable, "-m", "modicum", "run", str(recipe), "--out", str(out)], family=True)
        distances = check(out / "model", folders, slerp if name == "slerp" else ties)
        results[name] = found | {"distances": distances}
        shutil.rmtree(out)
        print(name, json.dumps(results[name]), flush=True)
        write_atomic(RESULT, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
