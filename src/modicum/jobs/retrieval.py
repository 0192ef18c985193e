"""Retrieval as a task of the evaluate job: made suites in local text, or the public files where the user has them.

::

    tasks:
      needle:
        kind: retrieval
        suite: needle
        lengths: [256, 512, 1024]

Items are the same for every model. A token is taken to be four characters unless ``tokenizer`` names the model whose
tokens are counted.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from modicum.errors import CheckpointError
from modicum.jobs.data.rows import DataSection, Rows, load_rows
from modicum.recipe import Section
from modicum.types import PositiveInt

Depth = Annotated[float, Ge(0), Le(1)]


class RetrievalTask(Section):
    """Hide facts in a context and ask for them; the share of answers that are found, by depth and length."""

    kind: Literal["retrieval"] = "retrieval"
    suite: Literal["needle", "multi_key", "multi_needle", "documents", "variables", "lost_in_the_middle", "ruler"]
    data: DataSection = Field(
        default=DataSection(path="builtin:python-stdlib", split="test"), description="text to hide facts in"
    )
    file: str | None = Field(default=None, description="jsonl or jsonl.gz, for lost_in_the_middle and ruler")
    lengths: tuple[PositiveInt, ...] = (256, 512)
    depths: tuple[Depth, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    per_cell: PositiveInt = 4
    tokenizer: str | None = Field(default=None, description="model whose tokens lengths count; else 4 characters each")
    max_new_tokens: PositiveInt = 48
    batch_size: PositiveInt = 4
    answer: str | None = Field(default=None, description="regular expression whose group is the answer; last match")

    @model_validator(mode="after")
    def _file_where_it_belongs(self) -> RetrievalTask:
        if (self.suite in ("lost_in_the_middle", "ruler")) != (self.file is not None):
            raise ValueError("set file for the suites lost_in_the_middle and ruler, and for no other")
        return self


def retrieval_rows(task: RetrievalTask, *, seed: int) -> Rows:
    """Return the task's rows: prompts with completions, their depth and length, and what scores an answer."""
    from modicum.evaluate.measures.retrieval import Haystack, make_items, read_lost_in_the_middle, read_ruler, score

    if task.file is not None:
        read = read_lost_in_the_middle if task.suite == "lost_in_the_middle" else read_ruler
        items = list(read(_lines(Path(task.file).expanduser())))
    else:
        text = "\n\n".join(str(row.get("text", "")) for row in load_rows(task.data, seed=seed).rows)
        items = make_items(
            task.suite,
            Haystack(text, _counter(task.tokenizer)),
            lengths=task.lengths,
            depths=task.depths,
            per_cell=task.per_cell,
            seed=seed,
        )
    rows = [
        {"prompt": i.prompt, "completion": i.expected.strip(), "depth": round(i.depth, 4), "length": i.length}
        for i in items
    ]
    return Rows("completion", rows, lambda index, answer: score(answer, items[index]))


def retrieval_grid(rows: Rows, scores: Sequence[float]) -> dict[str, Any]:
    """Return mean scores by depth (rows) and length (columns), as the report draws them."""
    from modicum.evaluate.measures.retrieval import grids

    [grid] = grids([_Place(row["depth"], row["length"]) for row in rows.rows], scores)
    return {"depths": grid.depths, "lengths": grid.lengths, "values": grid.values, "counts": grid.counts}


class _Place(NamedTuple):
    depth: float
    length: int
    task: str = ""


def _counter(tokenizer: str | None) -> Any:
    if tokenizer is None:
        return lambda text: (len(text) + 3) // 4
    from modicum.jobs.loading.models import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False, verbose=False)["input_ids"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}, line {number}: not valid JSON ({error.msg}).") from None
