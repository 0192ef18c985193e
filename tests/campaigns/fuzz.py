"""Fuzzing of every parser: bytes changed at random, strange values in every place; errors of ours, or none.

``python tests/campaigns/fuzz.py [--seconds 600] [--seed 0]`` calls the parsers in this process, many thousand times a
minute. Whatever they are given, they may only raise a :class:`~modicum.errors.ModicumError` of one line, and take no
more than five seconds. Counts go into ``benchmarks/results/fuzz.json``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from campaigns import bombs, frame, workshop  # noqa: E402 - after the settings of their libraries

RESULT = ROOT / "benchmarks/results/fuzz.json"
Target = Callable[[bytes], object]
# Shares of what takes milliseconds each.
SLOW = {"recipe": 0.1, "values of recipes": 0.2, "mergekit files": 0.2, "index of weights": 0.3,
        "configuration of a model": 0.3, "configuration of an adapter": 0.3}  # fmt: skip


def targets(folder: Path) -> dict[str, tuple[list[bytes], Target]]:
    """Return for each border some honest inputs, and what reads them."""
    import torch
    from safetensors.torch import save as save_tensors

    from modicum import stored
    from modicum.borders import read_json
    from modicum.credentials import redact, secrets_in
    from modicum.documents import is_mergekit, parse_documents
    from modicum.errors import printable
    from modicum.jobs.card import front_matter
    from modicum.jobs.data.rows import load_rows
    from modicum.jobs.data.section import DataSection
    from modicum.jobs.merge import make_plan
    from modicum.lock import read_owner
    from modicum.patterns import Pattern
    from modicum.recipe import override, parse
    from modicum.vocabulary import token_ids
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.files import read_header
    from modicum.weights.finished import read_journals
    from support import byte_tokenizer
    from weights.test_mergekit_borders import FILES, write_models

    def file(name: str, read: Callable[[Path], object]) -> Target:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)

        def call(content: bytes) -> object:
            path.write_bytes(content)
            return read(path)

        return call

    def recipe(content: bytes) -> object:
        found = parse_documents(content.decode("utf-8", "replace"), "r.yaml")
        return [parse(data) for data in found if isinstance(data, dict)]

    def values(content: bytes) -> object:
        data = json.loads(content)  # changed as a value, and so still JSON
        return parse(data) if isinstance(data, dict) else None

    def mergekit(content: bytes) -> object:
        found = parse_documents(content.decode("utf-8", "replace"), "m.yml")
        return [make_plan(parse(data)) for data in found if is_mergekit(data)]  # type: ignore[arg-type]

    def assigned(content: bytes) -> object:
        texts = content.decode("utf-8", "replace").split("\n")
        return parse(override(known["merge"], texts))

    def settings(path: Path) -> object:
        return token_ids(read_json(path, "m"), "m")

    def record(path: Path) -> object:
        return stored.damage(path.parent), stored.stored_recipe(path.parent), stored.verify(path.parent)

    def honest(name: str) -> list[bytes]:
        return [(folder / name).read_bytes()]

    def model(path: Path) -> object:
        return len(Checkpoint(path.parent))

    def rows(path: Path) -> object:
        return load_rows(DataSection(path=str(path)))

    def pattern(content: bytes) -> object:
        return Pattern(content.decode("utf-8", "replace"), "exclude").finds("model.layers.0.mlp")

    known = workshop.recipes()
    texts = [json.dumps(one).encode() for one in known.values()]
    tensors = {"model.a": torch.zeros(3, 2), "model.b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0)}
    run = {"job": "merge", "status": "done", "hash": "ab", "inputs": {"a": "b"}, "metrics": {"x": 1.0}, "notes": ["n"],
           "outputs": {"model": "model"}, "files": {"model/config.json": [2, "ab"]}, "numerics": 1, "seconds": 0.5,
           "stages": [{"name": "a", "job": "merge", "folder": "stages/a", "status": "done"}]}  # fmt: skip
    owner = {"host": "h", "machine": "m", "boot": "b", "namespace": "n", "pid": 7, "started": "3", "since": "now",
             "launch": ":"}  # fmt: skip
    tokenizer = byte_tokenizer().backend_tokenizer.to_str().encode()
    lines = [b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n', b'{"text": "abc"}\n',
             b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n']  # fmt: skip
    log = [b'{"event": "train", "step": 1, "loss": 2.0}\n{"event": "eval"}\n']
    journal = [b'\n["model.a", {"norm": 1.0}]\n["model.b", {}]\n']
    (folder / "zoo").mkdir()
    write_models(folder / "zoo")
    workshop.build(folder / "world")
    for copy in ("indexed", "configured"):
        shutil.copytree(folder / "world/base", folder / "world" / copy)
    index, config, adapter = ("world/indexed/model.safetensors.index.json", "world/configured/config.json",
                              "world/adapter/adapter_config.json")  # fmt: skip
    documents = [json.dumps(one).replace("$R", str(folder / "zoo")).encode() for one in FILES.values()]
    return {
        "recipe": (texts, recipe),
        "mergekit files": (documents, mergekit),
        "values of recipes": (texts, values),
        "assignments": ([b"method.density=0.4\nseed=3", b"experts.0=x\nmethod={name: ties}"], assigned),
        "safetensors header": ([save_tensors(tensors)], file("x.safetensors", lambda p: read_header(p, owner="m"))),
        "configuration": ([json.dumps(known["merge"]).encode()], file("config.json", lambda p: read_json(p, "m"))),
        "index of weights": (honest(index), file(index, model)),
        "configuration of a model": (honest(config), file(config, model)),
        "configuration of an adapter": (honest(adapter), file(adapter, model)),
        "tokenizer": ([tokenizer], file("tokenizer.json", settings)),
        "record": ([json.dumps(run).encode()], file("run/record.json", record)),
        "log": (log, file("logged/log.jsonl", lambda p: stored.read_log(p.parent))),
        "rows": (lines, file("rows.jsonl", rows)),
        "rows of json": ([b'[{"text": "a"}, {"text": "b"}]'], file("rows.json", rows)),
        "lock": ([json.dumps(owner).encode()], file("one.lock", lambda p: read_owner(p, tries=1))),
        "journal": (journal, file("part/journal.0.jsonl", lambda p: read_journals(p.parent))),
        "model card": ([b"---\nlicense: mit\n---\n# x\n"], file("card/README.md", lambda p: front_matter([p.parent]))),
        "patterns": ([b"model\\.layers\\.(\\d+)|lm_head", b"(a|b)+c*"], pattern),
        "secrets": ([b"HF_TOKEN=hf_abc https://u:p@h/x?token=1"], lambda c: (
            redact(c.decode("latin-1")), list(secrets_in({"a": c.decode("latin-1")})))),
        "terminal": ([b"a\x1b[2J"], lambda c: printable(c.decode("utf-8", "surrogateescape"))),
    }  # fmt: skip


def changed(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with some of them changed, taken out, doubled, or put between."""
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(result) + 1)
        kind = rng.randrange(6)
        if kind == 0 and result:
            result[at % len(result)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at:at] = rng.choice(bombs.PIECES)
        elif kind == 2:
            del result[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            result[at:at] = result[at : at + rng.choice((1, 4, 32))]
        elif kind == 4:
            result[at : at + 1] = bytes([rng.randrange(256)])
        else:
            del result[at:]
    return bytes(result)


def case(content: bytes, name: str, rng: random.Random) -> bytes:
    """Return the next input of one border: strange bytes, or JSON with a strange value."""
    json_like = name not in ("assignments", "safetensors header", "log", "rows", "journal", "model card", "patterns",
                             "secrets", "terminal")  # fmt: skip
    if name in ("values of recipes", "mergekit files") or (json_like and rng.random() < 0.4):
        return json.dumps(bombs.strange(json.loads(content), rng)).encode("utf-8", "surrogatepass")
    return changed(content, rng)


def one(read: Target, content: bytes) -> tuple[str, str | None, float]:
    """Give one input to a border; return how that ended, what was wrong, and how long it took."""
    from modicum.errors import ModicumError

    began = time.process_time()
    try:
        read(content)
        end, wrong = "read", None
    except ModicumError as error:
        end, wrong = "refused", None if str(error).strip() else "an error without words"
    except Exception as error:
        end, wrong = "wrong", f"{type(error).__name__}: {str(error)[:150]}"
    took = time.process_time() - began
    return end, wrong or (f"took {took:.1f} s" if took > 5 else None), took


def campaign(at: frame.Campaign) -> None:
    """Give parsers a batch of inputs at a time."""
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else at.work))
    os.chdir(place)
    try:
        known = {name: value for name, value in targets(place).items() if at.chosen.only in name}
        weights, names, seen = [SLOW.get(name, 1.0) for name in known], list(known), set()
        for number in at.numbers():
            rng = at.rng(number)
            for _ in range(200):
                name = rng.choices(names, weights)[0]
                corpus, read = known[name]
                content = case(rng.choice(corpus), name, rng)
                end, wrong, took = one(read, content)
                told = wrong and f"{name}, batch {number}: {wrong}"
                at.count.add(f"{name}: {end}", took, number, told)
                if wrong and (kind := f"{name} {wrong[:60]}") not in seen:
                    seen.add(kind)
                    print(told, content[:200], flush=True)
    finally:
        os.chdir(at.work)
        shutil.rmtree(place)
    print(f"{time.process_time():.0f} s of computing")


if __name__ == "__main__":
    raise SystemExit(frame.main(__doc__, RESULT, campaign, every=20_000))
