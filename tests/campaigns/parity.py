"""What ``run`` refuses, ``check`` refuses: plausible mistakes in the rows, the models and the values of every recipe.

``python tests/campaigns/parity.py [--seconds 600] [--seed 0] [--only WORDS]`` puts rows and models that people have by
mistake (a column missing in one row, answers too long, a tokenizer without a chat template, another shape, …) in the
place of those of each recipe of the workshop, and other values in the place of each of its values, one at a time, in an
order of chance. Both commands may work; else both must say one line, and end with status 2. Counts go into
``benchmarks/results/parity.json``, which a run with another seed adds to.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "COLUMNS": "200"}  # fmt: skip

from campaigns import bombs, forked, frame, workshop  # noqa: E402 - after the settings of their libraries

RESULT = ROOT / "benchmarks/results/parity.json"
Recipe = dict[str, Any]
Case = tuple[str, tuple[Any, ...], Any]  # name of a recipe, a place in it, and what comes there
Make = Callable[[Path, Path], object]
# What a pass through a model alone tells: answers that fail a judge or a filter, numbers that overflow.
LATER = ("rows are left after the filters", "so the model's own numbers overflow", "there is nothing to extract.",
         "beside a row that passed. Raise k", "failed on request", "answers none of",
         "holds NaN or infinite values", "became NaN or infinite", "could be read, on")  # fmt: skip


def _rows(count: int = 8, **fields: Any) -> list[Recipe]:
    return [{"prompt": f"say {i}", "completion": "abc", **fields} for i in range(count)]


def _but(row: Recipe) -> list[Recipe]:
    """Return rows of which the sixth is another."""
    return [row if i == 5 else each for i, each in enumerate(_rows())]


def _pairs(count: int = 8, **fields: Any) -> list[Recipe]:
    return [{"prompt": f"ask {i}", "chosen": "abc", "rejected": "xyz", **fields} for i in range(count)]


def _chats(*roles: str) -> list[Recipe]:
    return [{"messages": [{"role": role, "content": "a"} for role in roles]}] * 8


ROWS: dict[str, list[Recipe]] = {
    "none": [], "one": _rows(1), "two": _rows(2), "other columns": [{"question": "a", "reply": "b"}] * 8,
    "a row without completion": _but({"prompt": "a"}), "a row without prompt": _but({"completion": "a"}),
    "a number": _but({"prompt": "a", "completion": 3}), "a null": _but({"prompt": "a", "completion": None}),
    "an empty completion": _but({"prompt": "a", "completion": ""}), "empty completions": _rows(completion=""),
    "an empty prompt": _but({"prompt": "", "completion": "a"}), "empty prompts": _rows(prompt=""),
    "a long prompt": _but({"prompt": "abcd " * 40, "completion": "a"}), "long prompts": _rows(prompt="abcd " * 40),
    "long completions": _rows(completion="abcd " * 40), "very long prompts": _rows(prompt="abcd " * 1200),
    "the same row": [{"prompt": "a", "completion": "b"}] * 8, "texts": [{"text": f"abc{i}"} for i in range(8)],
    "an empty text": [{"text": "abc" * (i != 3)} for i in range(8)], "empty texts": [{"text": ""}] * 8,
    "texts of one letter": [{"text": "a"}] * 8, "long texts": [{"text": f"{i} abc" * 1200} for i in range(3)],
    "chats": _chats("user", "assistant"), "chats without answers": _chats("user"), "other roles": _chats("human"),
    "pairs": _pairs(), "two pairs": _pairs(2), "equal pairs": _pairs(rejected="abc"), "long pairs": _pairs(
        chosen="abc " * 100), "choices": [{"prompt": f"a{i}", "choices": ["x", "y"], "answer": 0} for i in range(8)],
}  # fmt: skip


def _tokenizer(*without: str, **fields: Any) -> Make:
    """Return what makes a model whose tokenizer has other settings, or lacks some."""

    def make(place: Path, world: Path) -> None:
        left_out = ["chat_template*"] if "chat" in without else []
        shutil.copytree(world / "one", place, ignore=shutil.ignore_patterns(*left_out))
        path = place / "tokenizer_config.json"
        known = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in known.items() if key not in without}))

    return make


def _shaped(**fields: Any) -> Make:
    def make(place: Path, _: Path) -> None:
        from support import byte_tokenizer, tiny_llama

        tiny_llama(seed=1, **fields).save_pretrained(place)
        byte_tokenizer().save_pretrained(place)

    return make


def _short(place: Path, _: Path) -> None:
    """Write a model with a table of 16 positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from support import byte_tokenizer

    GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=16)).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)


def _adapter_on(base: str) -> Make:
    def make(place: Path, world: Path) -> None:
        shutil.copytree(world / "adapter", place)
        path = place / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(world / base)}))

    return make


MODELS: dict[str, Make] = {
    "no-eos": _tokenizer("eos_token"), "no-pad": _tokenizer("pad_token"), "no-chat": _tokenizer("chat"),
    "no-special": _tokenizer("eos_token", "pad_token", "bos_token", "chat"), "odd-eos": _tokenizer(eos_token="</s>"),
    "wide": _shaped(hidden_size=64), "deep": _shaped(num_hidden_layers=3), "untied": _shaped(tie_word_embeddings=False),
    "large-vocabulary": _shaped(vocab_size=300), "small-vocabulary": _shaped(vocab_size=200), "gpt2": _short,
    "other-heads": _shaped(num_key_value_heads=4), "on-wide": _adapter_on("odd/wide"),
    "on-deep": _adapter_on("odd/deep"),
}  # fmt: skip
VALUES: list[Any] = [None, True, 0, -1, 1, 3, 1.5, 1000, "x", "", [], {}, ["x"], {"name": "x"}, "stage:x", "cudaa"]


def build(world: Path) -> None:
    """Make the models and the rows."""
    workshop.build(world)
    workshop.write_recipes(world)
    (world / "odd").mkdir()
    for name, make in MODELS.items():
        make(world / "odd" / name, world)
    for name, rows in ROWS.items():
        (world / "odd" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cases(world: Path) -> Iterator[Case]:
    """Yield every mistake once."""
    from modicum.recipe import parse

    for name, recipe in workshop.recipes().items():
        for place in bombs.paths_in(recipe)[1:]:
            value = _at(recipe, place)
            if isinstance(value, str) and value.endswith(".jsonl"):
                yield from ((name, place, f"odd/{kind}.jsonl") for kind in ROWS)
            elif isinstance(value, str) and value and any((world / value).glob("*config.json")):
                yield from ((name, place, f"odd/{kind}") for kind in MODELS)
        whole = parse(copy.deepcopy(recipe)).model_dump(mode="json")  # keys that it leaves out among them
        for place in bombs.paths_in(whole)[1:]:
            if place[-1] != "job":
                yield from ((name, place, value) for value in VALUES)


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def changed(case: Case) -> Recipe | None:
    """Return the recipe of a case; nothing where it would be as it was, or has no such place."""
    name, place, value = case
    recipe = copy.deepcopy(workshop.recipes()[name])  # they share their parts
    target: Any = recipe
    for key in place[:-1]:
        try:
            target = target[key] if isinstance(target, list) else target.setdefault(key, {})
        except (IndexError, AttributeError):
            return None
    if isinstance(target, str) or (isinstance(target, list) and place[-1] >= len(target)):
        return None
    before = target[place[-1]] if isinstance(target, list) else target.get(place[-1], ...)
    target[place[-1]] = value
    return None if before == value and type(before) is type(value) else recipe


def attempt(world: Path, recipe: Recipe) -> tuple[str, str | None]:
    """Check and run a recipe; return how that ended, and what was wrong."""
    from modicum.errors import ModicumError
    from modicum.recipe import parse

    try:
        parse(copy.deepcopy(recipe))
    except ModicumError as error:  # which both do first
        return f"refused as it is read: {error}", None
    (world / "odd.yaml").write_text(json.dumps(recipe))
    ends = []
    for command in (("check", "odd.yaml"), ("run", "odd.yaml", "--quiet", "--out", "out")):
        outcome = forked.attempt(command, world, seconds=300, cpu=100)
        left = outcome.status != 0 and any((world / "out/model").glob("*"))
        shutil.rmtree(world / "out", ignore_errors=True)
        # Several keys at once may be wrong, each with a line of its own, when a recipe is read.
        if wrong := "a result of a refused run" if left else outcome.trouble(seconds=60.0):
            return "wrong", f"{command[0]}: {wrong}"
        ends.append(outcome)
    checked, ran = ends
    if checked.status != ran.status and not (checked.status == 0 and any(part in ran.said for part in LATER)):
        which, said = ("check", checked.said) if checked.status else ("run", ran.said)
        return "wrong", f"{which} alone refuses: {said.strip()[:400]}"
    return ("worked" if ran.status == 0 else f"refused: {ran.said.strip()}"), None


def campaign(at: frame.Campaign) -> None:
    """Try one mistake at a time."""
    world = at.work / "world"
    if not (world / "odd").exists():
        build(world)
    os.chdir(world)
    names = [name for name in workshop.recipes() if name not in ("grid", "pipeline")]
    if failed := forked.warm([("run", f"{name}.yaml", "--out", f"done-{name}", "--quiet") for name in names], world,
                             at.work / "modules"):  # fmt: skip
        raise RuntimeError(str(failed))
    every = [*cases(world)]
    random.Random(at.chosen.seed).shuffle(every)
    for number, case in at.cases(every, title):
        if (recipe := changed(case)) is not None:
            how, wrong = attempt(world, recipe)
            at.tell(number, title(case), how.partition(":")[0], wrong, said=how)


def title(case: Case) -> str:
    """Return a case in words."""
    return f"{case[0]}: {'.'.join(map(str, case[1]))} = {json.dumps(case[2])}"


if __name__ == "__main__":
    raise SystemExit(frame.main(__doc__, RESULT, campaign))
