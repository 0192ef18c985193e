"""What no honest file holds: strange values, pieces of bytes, and special inputs that cost time or memory."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], None]
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "\0", " ", "x", "x" * 100_000, "../../etc/passwd", "/dev/zero", "/etc", "~", "\ud800", "\x1b[31m", "a\nb",
    "stage:x", "builtin:x", "hub/none@x", "file:///etc/passwd", "http://127.0.0.1:1/", "${HOME}", "{{ 7*7 }}", "(a+)+$",
    [], [[]], [None], {}, {"": None}, {"a": {"b": []}}, [1, "a", None], [[[[[[[]]]]]]], list(range(1000)),
    {"name": "linear"}, {"name": "\0"}, {"name": 3}, {"path": "rows.jsonl"}, "linear", "ties", "float8_e4m3fn", "F4",
]  # fmt: skip
PIECES = [
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\x1b[2J", b"\"", b"{", b"[", b"}", b"]", b":", b",", b"\\u", b"-",
    b"1e999", b"NaN", b"&a *a", b"<<: *x", b"!!python/object/apply:os.system ['touch ../ran']", b"\xed\xa0\x80", b"\\",
    b"\xc0\xaf", b"9" * 400, b"[" * 3000, b"\xf0\x9f\x98\x80", b"\xe2\x80\xae",
]  # fmt: skip
REGEX = "(a|a|.)*(x+x+)+(.*)*y$"
LONG = "xmodelxlayersx" * 8


def paths_in(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return all places in JSON-like data."""
    found = [here]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += paths_in(item, (*here, key)) if len(found) < 3000 else []
    return found


def strange(value: Any, rng: random.Random) -> Any:
    """Return JSON-like data with one thing changed: a value, a key, a key more or a key less."""
    value = copy.deepcopy(value)
    place = rng.choice(paths_in(value)[1:] or [()])
    if not place:
        return rng.choice(STRANGE)
    target = value
    for key in place[:-1]:
        target = target[key]
    way = rng.random()
    if way < 0.75 or not isinstance(target, dict):
        target[place[-1]] = rng.choice(STRANGE)
    elif way < 0.85:
        del target[place[-1]]
    elif way < 0.95:
        target[rng.choice(["", "\0", "name", "job", "x" * 5000, "__class__", "\x1b[1m"])] = rng.choice(STRANGE)
    else:
        target[rng.choice(["", "é", "out"])] = target.pop(place[-1])
    return value


def bind(path: Path) -> None:
    """Make a socket at a path."""
    here = os.getcwd()  # noqa: PTH109 - the names of sockets are short
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def edit(**changes: Any) -> Damage:
    """Return a damage that sets values of a JSON file; ``a__b`` stands for ``b`` inside ``a``."""

    def damage(path: Path, _: random.Random) -> None:
        data = json.loads(path.read_text())
        for name, value in changes.items():
            target = data
            *parents, last = name.split("__")
            for parent in parents:
                target = target[int(parent)] if isinstance(target, list) else target.setdefault(parent, {})
            target[int(last) if isinstance(target, list) else last] = value
        path.write_text(json.dumps(data))

    return damage


def text(content: str) -> Damage:
    """Return a damage that writes a text."""

    def damage(path: Path, _: random.Random) -> None:
        path.write_text(content)

    return damage


def _split(path: Path, _: random.Random) -> None:
    data = json.loads(path.read_text())
    data["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a|b|ab)*(x+x+)+y"}, "behavior": "Isolated",
                             "invert": False}  # fmt: skip
    path.write_text(json.dumps(data))


def _vocabulary(number: int) -> Damage:
    def damage(path: Path, _: random.Random) -> None:
        data = json.loads(path.read_text())
        data["model"]["vocab"]["zz"] = number
        path.write_text(json.dumps(data))

    return damage


def _added(number: int) -> Damage:
    def damage(path: Path, _: random.Random) -> None:
        data = json.loads(path.read_text())
        data["added_tokens"].append(data["added_tokens"][0] | {"id": number, "content": "<zz>"})
        path.write_text(json.dumps(data))

    return damage


def _wide_parquet(path: Path, _: random.Random) -> None:
    """Write a small file of a table that takes 20 GB in memory."""
    import pyarrow
    import pyarrow.parquet

    count = 20_000_000
    index = pyarrow.array(memoryview(bytes(4 * count)).cast("i"), type=pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array(["x" * 1000]))
    table = pyarrow.table({"prompt": column, "completion": column})
    pyarrow.parquet.write_table(table, path, row_group_size=count)


def _header(make: Callable[[], bytes]) -> Damage:
    def damage(path: Path, _: random.Random) -> None:
        text = make()
        path.write_bytes(len(text).to_bytes(8, "little") + text)

    return damage


def _many_tensors() -> bytes:
    return json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(400_000)}
    ).encode()


def _twice(path: Path, _: random.Random) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    first = header[1:].split(b"},")[0] + b"},"
    header = b"{" + first + header[1:]
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "repeats": "{{ 'a' * 9999999999 }}", "doubles": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}", "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "runs": "{{ self.__init__.__globals__.os.system('touch ../ran') }}", "powers": "{{ 9 ** 9 ** 9 }}",
    "formats": "{{ '%999999999d' % 3 }}", "divides": "{{ 1 / 0 }}", "unknown": "{% nonsense %}", "unclosed": "{{ a",
    "deep": "{% if 1 %}" * 3000, "nests": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "NUL": "\0",
    "joins": "{{ (['a' * 99999] * 99999) | join }}", "includes": "{% include '/etc/passwd' %}",
}  # fmt: skip
YAMLS = {
    "laughs": "a: &x [" + ",".join(["1"] * 9) + "]\n" + "".join(
        f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("xbcdefghij", "bcdefghijk")),
    "merges": "a: &a {x: 1}\n" + "".join(f"k{i}: {{<<: *a}}\n" for i in range(20_000)), "itself": "a: &a [*a]",
    "python": "!!python/object/apply:os.system ['touch ../ran']", "tag": "!x 3", "binary": "a: !!binary ?",
    "keys": "{[1]: 2}", "deep": "[" * 100_000, "flow": "{a: " * 20_000, "long": "a: " + "x" * 5_000_000,
    "wide": "\n".join(f"k{i}: {i}" for i in range(200_000)), "integer": "a: " + "1" * 100_000,
    "sexagesimal": "a: " + ":".join(["59"] * 20_000), "two": "a: 1\n---\nb: 2", "twice": "job: merge\njob: train",
    "anchors": "".join(f"- &a{i} x\n" for i in range(50_000)), "float": "seed: " + "1" * 5000 + "e5",
    "tabs": "\tjob: merge", "directive": "%YAML 9.9\n---\njob: merge", "spaces": " " * 2_000_000 + "a: 1",
}  # fmt: skip


def special() -> Iterator[tuple[str, str, Damage, list[str]]]:
    """Yield name, file, damage, and the recipes that read the file."""
    for name, template in TEMPLATES.items():
        yield f"template {name}", "base/chat_template.jinja", text(template), ["train-adapter"]
        yield f"template {name}", "talker/chat_template.jinja", text(template), ["attack"]
    for name, content in YAMLS.items():
        yield f"yaml {name}", "merge.yaml", text(content), ["merge"]
        yield f"yaml {name}", "guidelines.yaml", text(content), ["synthesize"]
    yield "regex", "statistics.yaml", edit(exclude=REGEX), ["statistics"]
    yield "regex", "merge.yaml", edit(exclude=REGEX), ["merge"]
    yield "regex", "average.yaml", edit(method={"name": "lawa", "exclude": REGEX}), ["average"]
    yield "regex", "evaluate.yaml", edit(tasks__say__answer=REGEX), ["evaluate"]
    yield "regex", "train-adapter.yaml", edit(adapter__target_modules=REGEX), ["train-adapter"]
    yield "regex", "train-adapter.yaml", edit(adapter__config={"target_modules": REGEX}), ["train-adapter"]
    for key in ("include", "exclude", "dense"):
        yield "regex", "train-tezo.yaml", edit(**{f"optimizer__{key}": [REGEX]}), ["train-tezo"]
    yield "regex", "train-text.yaml", edit(gradient={"name": "adagc", "groups": {REGEX: "x"}}), ["train-text"]
    for key in ("alpha_pattern", "rank_pattern"):
        yield "regex", "adapter/adapter_config.json", edit(**{key: {REGEX: 2}}), ["merge-adapter", "evaluate"]
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        yield "regex", "adapter/adapter_config.json", edit(**{key: REGEX}), ["merge-adapter", "evaluate"]
    yield "regex", "base/tokenizer.json", _split, ["train", "train-text", "merge-tokens"]
    for number in (10**6, 10**9, 2**32 - 2, 2**40, -1):
        yield f"token id {number}", "base/tokenizer.json", _vocabulary(number), ["train", "merge-tokens"]
        yield f"added token {number}", "base/tokenizer.json", _added(number), ["train", "merge-tokens"]
    for number in (10**9, 10**12, 2**63, 0, -8):
        multiple = {"source": "union", "pad_to_multiple_of": number}
        yield f"multiple {number}", "merge-tokens.yaml", edit(tokenizer=multiple), ["merge-tokens"]
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "head_dim", "num_key_value_heads"):  # fmt: skip
        for number in (10**7, 10**12, 10**30, 0, -1):
            yield f"{key} {number}", "base/config.json", edit(**{key: number}), ["train", "merge", "evaluate-base"]
    for key, value in (("data__max_length", 10**18), ("trainer__per_device_train_batch_size", 10**12),
                       ("trainer__max_steps", 0), ("trainer__save_steps", 0), ("adapter", {"rank": 10**9}),
                       ("model", {"path": "base", "scratch": {"hidden_size": 10**9}}),
                       ("model", {"path": "base", "scratch": {"num_hidden_layers": 10**8}}),
                       ("model", {"path": "base", "scratch": {"vocab_size": 10**11}}),
                       ("model", {"path": "base", "convert": {"name": "zero_token", "n_cycles": 10**9}}),
                       ("model", {"path": "base", "attention": "x; touch ../ran"}),
                       ("data__template", "{prompt}" * 10**6),
                       ("trainer__logging_dir", "/dev/full"), ("trainer__output_dir", "/etc"),
                       ("trainer__report_to", "wandb"), ("trainer__deepspeed", "x.json"),
                       ("trainer__fsdp", "full_shard"),
                       ("trainer__optim", "x"), ("trainer__lr_scheduler_type", "x"),
                       ("trainer__use_cpu", "x"), ("trainer__dataloader_num_workers", 10**6),
                       ("trainer__learning_rate", "x"), ("data__size", 10**15)):  # fmt: skip
        yield f"{key} {str(value)[:40]}", "train.yaml", edit(**{key: value}), ["train"]
    for key, value in (("rounds", 10**12), ("seeds", 10**9), ("frames", 10**9), ("application__agents", 10**8),
                       ("application__targets", 10**9), ("steps", [1e-300]), ("steps", list(range(1, 100_000))),
                       ("hints", [10**12]), ("delay", 10**12), ("degree", 1e300)):  # fmt: skip
        yield f"{key} {str(value)[:40]}", "coordinate.yaml", edit(**{key: value}), []
    yield "blocks", "coordinate-objective.yaml", edit(application__blocks=[10**9]), ["coordinate-objective"]
    yield "blocks", "coordinate-objective.yaml", edit(application__blocks=[1] * 10**5), ["coordinate-objective"]
    for key, value in (("samples", 10**12), ("max_new_tokens", 10**12), ("goals__size", 10**12),
                       ("suites", {"a": {"attack": {"name": "template", "family": "x"}}})):  # fmt: skip
        yield f"{key} {str(value)[:40]}", "attack.yaml", edit(**{key: value}), []
    for key, value in (("max_rank", 10**12), ("max_rank", 0), ("model", "base"), ("base", "adapter")):
        yield f"extract {key} {value}", "extract.yaml", edit(**{key: value}), ["extract"]
    for key, value in (("shard_bytes", 1), ("shard_bytes", 10**30), ("experts", ["one"] * 500), ("experts", []),
                       ("experts", ["../../../../dev/zero"]), ("base", "/proc/self/root"), ("out", "/dev/null/x"),
                       ("out", "base"), ("out", "/"), ("dtype", "int8")):  # fmt: skip
        yield f"merge {key} {str(value)[:30]}", "merge.yaml", edit(**{key: value}), ["merge"]
    for key, value in (("k", 10**9), ("k", 0), ("iters", 10**12)):
        yield f"sewa {key}", "average-search.yaml", edit(**{f"method__{key}": value}), []
    yield "wide parquet", "rows.parquet", _wide_parquet, ["train-parquet"]
    for name, path, recipe in (("base", "base/model-00001-of-00002.safetensors", "merge"),
                               ("adapter", "adapter/adapter_model.safetensors", "merge-adapter"),
                               ("objective", "objective.safetensors", "coordinate-objective")):  # fmt: skip
        yield f"twice {name}", path, _twice, [recipe]
        yield f"many {name}", path, _header(_many_tensors), [recipe]
        yield f"spaces {name}", path, _header(lambda: b"{}" + b" " * (99 << 20)), [recipe]
        yield f"deep {name}", path, _header(lambda: b'{"a":' * 10**6), [recipe]
        yield f"endless {name}", path, lambda p, _: p.write_bytes(b"\xff" * 8 + b"{}") and None, [recipe]
    for target in ("../../private.txt", "/etc/passwd", "a\0b", "x" * 5000, "", ".", "..", "\x1b[2J"):
        listed = {"model.embed_tokens.weight": target}
        yield f"index {ascii(target)[:30]}", "one/model.safetensors.index.json", edit(weight_map=listed), ["merge"]


COMMANDS: list[tuple[str, ...]] = [
    ("run", "x" * 5000), ("run", "a/" * 3000), ("run", "/dev/zero"), ("run", "/"), ("run", ""), ("run", "."),
    ("run", "base"), ("run", "rows.parquet"), ("run", "objective.safetensors"), ("run", "\udcff"),
    ("run", "\x1b[2J"),
    ("run", "merge.yaml", "--out", "x" * 5000), ("run", "merge.yaml", "--out", "/dev/null"),
    ("run", "merge.yaml", "--out", "/proc/x"), ("run", "merge.yaml", "--out", "base"),
    ("run", "merge.yaml", "--out", ""),
    ("run", "merge.yaml", "--out", "rows.jsonl"), ("run", "merge.yaml", "--out", "/dev/full"),
    ("run", "merge.yaml", "--out", "."), ("run", "merge.yaml", "--out", ".."),
    ("run", "merge.yaml", "--out", "\x1b[2J/x"),
    ("run", "merge.yaml", "--out", "done-train"), ("run", "train.yaml", "--out", "done-merge"),
    ("run", "pipeline.yaml", "--out", "done-merge"), ("run", "coordinate.yaml", "--out", "done-attack"),
    ("check", "merge.yaml", "--set", f"experts=[{','.join(['one'] * 2000)}]"),
    *(("check", "merge.yaml", "--set", value) for value in (
        "", "=", "a", "a=[", "job.x=1", "experts.9=1", "experts.-1=1", ".=1", "a..b=1", "method.density=.nan",
        "seed=-1",
        "seed=" + "9" * 5000, "method.density=" + "[" * 20_000, "experts." + "9" * 5000 + "=1", "a." * 3000 + "b=1",
        "method={name: ties, density: 1e400}", "out=\x1b[2J", "x\x1b[2J=1", "job=\x1b[2J", "experts=&a [*a]",
        "method=!!python/name:os.system", "base=\udcff", "experts.0=../../../etc", "seed=2001-01-01", "job=null")),
    *(("check", "train.yaml", "--set", value) for value in (
        "trainer.max_steps=a", "trainer.nonsense=1", "data.path=/dev/zero", "data.path=/etc/shadow", "trainer=[]",
        "data.path=file:rows.jsonl", "data.path=builtin:../../x", "data.path=reasoning-gym:../x", "data.path=task:\x1b",
        "model.path=builtin:nonsense", "model.path=../../../../etc", "data.format=\x1b[2J", "trainer.hub_token=hf_x",
        "trainer.output_dir=/etc", "data.fields={a: b}", "adapter.rank=0", "adapter={rank: 2, target_modules: []}",
        "objective=nonsense", "objective={name: meap, ratio: 2}", "trainer.seed=3", "data.config={a: 1}")),
    ("verify", "/dev"), ("verify", "base"), ("verify", "\0".replace("\0", "x\n")), ("verify", "rows.jsonl"),
    ("verify", "x" * 5000), ("verify", "done-merge", "base"), ("verify",), ("report",), ("report", "base"),
    ("report", "rows.jsonl"), ("report", "done-merge", "--out", "/dev/null/x"),
    ("report", "done-merge", "--out", "/x" * 2000),
    ("report", "done-merge", "--out", "rows.jsonl"), ("report", "done-merge", "--out", "base/config.json"),
    ("report", "done-merge", "--out", "done-merge/record.json"), ("report", "done-merge", "--out", "merge.yaml"),
    ("report", "done-merge", "--out", "/proc/x.html"), ("report", "\x1b[2J"), ("list", "x"), ("list", "\x1b[2J"),
    ("show", ""), ("show", "\x1b[2J"), ("show", "x" * 5000), ("show", "../x"), ("nonsense",), ("--nonsense",),
    ("run",), ("run", "--quiet"), ("check",), ("run", "merge.yaml", "nonsense"), ("run", "merge.yaml", "--set"),
]  # fmt: skip
