"""Every path of every recipe, and in its place every kind of thing that a path may lead to.

``python tests/campaigns/places.py [--seconds 600] [--seed 0] [--only WORDS]`` puts each kind of thing (a missing file,
a pipe, an adapter, another job's run, a broken download, …) in the place of each path of each recipe of the workshop.
``check`` and ``run`` may work; else both must say one line within seconds, and end with status 2: what ``run``
refuses, ``check`` finds. Counts go into ``benchmarks/results/places.json``.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "COLUMNS": "200"}  # fmt: skip

from campaigns import bombs, forked, frame, workshop  # noqa: E402 - after the settings of their libraries

RESULT = ROOT / "benchmarks/results/places.json"
Pair = tuple[str, tuple[Any, ...], str]
QUICK = (
    "merge",
    "merge-adapter",
    "train",
    "train-adapter",
    "evaluate",
    "export",
    "extract",
    "statistics",
    "transplant",
)
NEEDED = ("merge", "train", "train-adapter", "statistics", "route", "pipeline", "attack")  # runs that stand in places
LATER = ("there is nothing to extract.",)  # what only all numbers tell, which a check does not read
Make = Callable[[Path, Path], object]


def _copy(source: str, *, without: str = "nothing", **fields: Any) -> Make:
    """Return what copies a folder of the world, without some of its files and with other fields in its config.json."""

    def make(place: Path, world: Path) -> None:
        shutil.copytree(world / source, place, symlinks=True, ignore=shutil.ignore_patterns(*without.split()))
        for name in ("config.json", "adapter_config.json"):
            if fields and (place / name).exists():
                (place / name).write_text(json.dumps(json.loads((place / name).read_text()) | fields))

    return make


def _adapter(base: str) -> Make:
    def make(place: Path, world: Path) -> None:
        _copy("adapter", base_model_name_or_path=base.replace("PLACE", str(place)))(place, world)

    return make


def _ring(place: Path, world: Path) -> None:
    for here, other in ((place, place.with_name(f"{place.name}-2")), (place.with_name(f"{place.name}-2"), place)):
        _adapter(str(other))(here, world)


def _closed(source: str) -> Make:
    def make(place: Path, world: Path) -> None:
        shutil.copytree(world / source, place) if (world / source).is_dir() else shutil.copy(world / source, place)
        place.chmod(0)

    return make


def _unfinished(place: Path, world: Path) -> None:
    _copy("done-train", without="model")(place, world)
    record = json.loads((place / "record.json").read_text())
    (place / "record.json").write_text(json.dumps(record | {"status": "running"}))


def _encoder(place: Path, _: Path) -> None:
    """Write what sentence-transformers writes: an encoder in a folder with the list of its modules."""
    from transformers import BertConfig, BertModel

    from support import byte_tokenizer

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=264, **shape)).save_pretrained(place)
    byte_tokenizer(chat=False).save_pretrained(place)
    parts = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (place / "modules.json").write_text(json.dumps(parts))


def _two_models(place: Path, world: Path) -> None:
    _copy("base")(place, world)
    from safetensors.torch import load_file, save_file

    whole = {k: v for file in sorted((world / "one").glob("*.safetensors")) for k, v in load_file(file).items()}
    save_file(whole, place / "model.safetensors")


def _pickled(place: Path, world: Path) -> None:
    import torch

    _copy("base", without="*.safetensors *.index.json")(place, world)
    torch.save({"model.norm.weight": torch.ones(32)}, place / "pytorch_model.bin")


def _piped(place: Path, world: Path) -> None:
    _copy("base", without="config.json")(place, world)
    os.mkfifo(place / "config.json")


def _linked(place: Path, _: Path) -> None:
    other = place.with_name(f"{place.name}-2")
    place.symlink_to(other.name)
    other.symlink_to(place.name)


def _text(content: str) -> Make:
    return lambda place, _: place.write_text(content)


def _folder(place: Path, _: Path) -> None:
    place.mkdir()


def _gguf(place: Path, _: Path) -> None:
    place.write_bytes(b"GGUF\x03\0\0\0" + bytes(100))


def _gguf_folder(place: Path, world: Path) -> None:
    place.mkdir()
    _gguf(place / "model.gguf", world)


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS: dict[str, Make] = {
    "missing": lambda place, _: None, "empty folder": _folder, "empty file": _text(""), "text": _text("hello\n"),
    "yaml": _text("job: merge\n"), "rows": lambda p, w: shutil.copy(w / "rows.jsonl", p),
    "folder of rows": lambda p, w: (p.mkdir(), shutil.copy(w / "rows.jsonl", p)),
    "one file of weights": lambda p, w: shutil.copy(next((w / "one").glob("*.safetensors")), p),
    "model": _copy("one"), "adapter": lambda p, w: _adapter(str(w / "base"))(p, w),
    "adapter on nothing": _adapter("/nowhere/at/all"), "adapter on a Hub id": _adapter("nobody/nothing"),
    "adapter on itself": _adapter("PLACE"), "adapter on .": _adapter("."), "ring of adapters": _ring,
    "adapter on no base": _adapter(""), "adapter of another type": _copy("adapter", peft_type="IA3"),
    "adapter without weights": _copy("adapter", without="*.safetensors"),
    "routed": _copy("done-route/model"), "looped": _copy("looped"),
    "run of merge": _copy("done-merge"), "run of train": _copy("done-train"), "run of route": _copy("done-route"),
    "run of adapter": _copy("done-train-adapter"), "run of statistics": _copy("done-statistics"),
    "run of attack": _copy("done-attack"), "pipeline": _copy("done-pipeline"), "unfinished run": _unfinished,
    "statistics": _copy("done-statistics/statistics"), "checkpoints": _copy("run"),
    "tokenizer alone": _copy("base", without="*.safetensors config.json *.index.json"),
    "no tokenizer": _copy("base", without="tokenizer* chat_template*"),
    "no chat template": _copy("base", without="chat_template*"),
    "no config": _copy("base", without="config.json"),
    "no weights": _copy("base", without="*.safetensors *.index.json"),
    "no index": _copy("base", without="*.index.json"), "part of the weights": _copy("base", without="*-00002-of-*"),
    "two models": _two_models, "pickled": _pickled, "encoder": _encoder, "gguf": _gguf, "folder of gguf": _gguf_folder,
    "other type": _copy("base", model_type="gpt2"), "unknown type": _copy("base", model_type="nonsense"),
    "other class": _copy("base", architectures=["LlamaForSequenceClassification"]),
    "own code": _copy("base", model_type="nonsense", auto_map={"AutoModelForCausalLM": "x.Model", "AutoConfig": "x.C"}),
    "quantised": _copy("base", quantization_config=QUANTISED), "other vocabulary": _copy("base", vocab_size=300),
    "gptq": _copy("base", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "ring of links": _linked, "link to nowhere": lambda p, _: p.symlink_to("/nowhere/at/all"),
    "link to a model": lambda p, w: p.symlink_to(w / "one"), "pipe": lambda p, _: os.mkfifo(p),
    "socket": lambda p, _: bombs.bind(p),
    "device": lambda p, _: p.symlink_to("/dev/zero"), "model with a pipe": _piped,
    "closed folder": _closed("base"), "closed file": _closed("rows.jsonl"),
}  # fmt: skip


def build(world: Path, *, runs: bool = True) -> None:
    """Make the models, the data, the runs that stand in places, and every kind of thing, in the folder ``odd``.

    Args:
        world: Where.
        runs: With the runs, which take minutes; else the things that come out of them are left out.
    """
    workshop.build(world)
    workshop.write_recipes(world)
    ran = [["run", f"{name}.yaml", "--out", f"done-{name}", "--quiet"] for name in NEEDED]
    looked = [["check", f"{name}.yaml"] for name in QUICK]
    if failed := forked.warm(ran if runs else looked, world, world.parent / "modules"):
        raise RuntimeError(str(failed))
    (world / "odd").mkdir()
    for name, make in KINDS.items():
        with suppress(FileNotFoundError) if not runs else nullcontext():
            make(place_of(world, name), world)


def place_of(world: Path, kind: str) -> Path:
    """Return where the thing of a kind lies."""
    return world / "odd" / kind.replace(" ", "-")


def roles(world: Path) -> list[tuple[str, tuple[Any, ...]]]:
    """Return every place of every recipe whose value names something in the world."""
    return [(name, place) for name, recipe in workshop.recipes().items() for place in bombs.paths_in(recipe)
            if isinstance(value := at(recipe, place), str) and value and (world / value).exists()]  # fmt: skip


def at(value: Any, place: tuple[Any, ...]) -> Any:
    """Return what stands at a place."""
    for key in place:
        value = value[key]
    return value


def attempt(world: Path, name: str, place: tuple[Any, ...], kind: str) -> tuple[str, str | None]:
    """Check and run a recipe with a thing of this kind at one of its places; return how, and what was wrong."""
    recipe = copy.deepcopy(workshop.recipes()[name])  # they share their parts
    at(recipe, place[:-1])[place[-1]] = str(place_of(world, kind).relative_to(world))
    (world / "odd.yaml").write_text(json.dumps(recipe))
    ends = []
    # What learns from labelled answers takes its seconds, and so do commands that work.
    for command in (("check", "odd.yaml"), ("run", "odd.yaml", "--quiet", "--out", "out")):
        outcome = forked.attempt(command, world, seconds=120, cpu=60)
        shutil.rmtree(world / "out", ignore_errors=True)
        if wrong := outcome.trouble(seconds=60.0 if outcome.status == 0 else 15.0):
            return "wrong", f"{command[0]}: {wrong}"
        ends.append(outcome)
    if ends[0].status != ends[1].status and not (ends[0].status == 0 and ends[1].said.strip().endswith(LATER)):
        which = "check" if ends[0].status else "run"
        return "wrong", f"{which} alone refuses: {(ends[0].said if ends[0].status else ends[1].said).strip()[:400]}"
    return ("worked" if ends[1].status == 0 else f"refused: {ends[1].said.strip()}"), None


def sample(world: Path, count: int) -> list[Pair]:
    """Return so many pairs in which places and kinds take turns, of jobs and things that take no time to make."""
    places = [(name, place) for name, place in roles(world) if name in QUICK]
    kinds = [kind for kind in KINDS if os.path.lexists(place_of(world, kind)) or kind == "missing"]
    return [(*places[n % len(places)], kinds[n % len(kinds)]) for n in range(count)]


def pairs(world: Path, rng: random.Random) -> Iterator[Pair]:
    """Yield every pair of a place and a kind, in an order of chance."""
    every = [(name, place, kind) for name, place in roles(world) for kind in KINDS]
    rng.shuffle(every)
    yield from every


def campaign(at: frame.Campaign) -> None:
    """Try one kind of thing in one place at a time."""
    world, count = at.work / "world", at.chosen.sample
    if not world.exists():
        build(world, runs=not count)
    forked.warm([], world, at.work / "modules")
    at.chosen.trial |= bool(count)
    every = sample(world, count) if count else pairs(world, random.Random(at.chosen.seed))
    for number, pair in at.cases(every, title):
        how, wrong = attempt(world, *pair)
        at.tell(number, title(pair), how.partition(":")[0], wrong, said=how)


def title(pair: Pair) -> str:
    """Return a pair in words."""
    name, place, kind = pair
    return f"{name}: {'.'.join(map(str, place))}: {kind}"


if __name__ == "__main__":
    raise SystemExit(frame.main(__doc__, RESULT, campaign, sample=(0, "try so many quick pairs, and count nothing")))
