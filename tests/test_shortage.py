"""Memory that runs out is one line with a way out, wherever it runs out."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import modicum
from modicum.errors import MemoryShortageError
from modicum.jobs import execute
from modicum.jobs.data import packing
from modicum.recipe import parse
from modicum.registry import job
from modicum.shortage import is_shortage, shortage_told
from modicum.weights.kernels.accelerator import workers_on

ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.06 GiB is "
    "free.\nSee documentation for Memory Management"
)


def of(make):
    try:
        make()
    except (MemoryError, RuntimeError) as error:
        return error
    raise AssertionError("there was room for it")


SHORTAGES = {
    "a device": torch.OutOfMemoryError(ON_A_GPU),
    "its libraries": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "torch": of(lambda: torch.empty(1 << 60, dtype=torch.uint8)),
    "numpy": of(lambda: np.empty(1 << 62, np.uint8)),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", SHORTAGES.values(), ids=SHORTAGES)
def test_it_is_told_in_one_line(error):
    with pytest.raises(MemoryShortageError) as told, shortage_told("Lower batch_size."):
        raise error
    assert "ran out" in str(told.value) and "Lower batch_size." in str(told.value) and "\n" not in str(told.value)


def test_it_says_where_and_how_much():
    said = r"^The memory of the CUDA device ran out when 2.00 GiB more were"
    with pytest.raises(MemoryShortageError, match=said), shortage_told(""):
        raise SHORTAGES["a device"]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_pass(error):
    assert not is_shortage(error)
    with pytest.raises(type(error)), shortage_told(""):
        raise error


@pytest.mark.parametrize("name", sorted(job))
def test_every_job_says_what_takes_less(name):
    assert job[name].facts.lighter.endswith(".")


def test_a_training_without_room_says_what_to_lower(tiny_model, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def forward(*_, **__):
        raise torch.OutOfMemoryError(ON_A_GPU)

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two three"}\n' * 8)
    recipe = {"job": "train", "model": str(tiny_model), "data": {"path": str(rows)}, "trainer": {"max_steps": 1}}
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(MemoryShortageError, match=r"Halve trainer\.per_device_train_batch_size"):
        execute(parse(recipe), tmp_path / "run", quiet=True)


MODELS_RUN = ("jobs/training", "jobs/loading", "jobs/data", "models")  # and may be blamed for what is a shortage
NO_MODEL = {"tokenizers.py", "references.py", "hub.py", "local.py", "chat_template.py"}
SOURCE = Path(modicum.__file__).parent


def handlers():
    """Yield each handler of errors of any kind, where models run, that does not let the error pass by itself."""
    for path in (path for part in MODELS_RUN for path in sorted((SOURCE / part).rglob("*.py"))):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.ExceptHandler) or path.name in NO_MODEL:
                continue
            caught = {part.id for part in ast.walk(node.type or ast.Name("Exception")) if isinstance(part, ast.Name)}
            last = node.body[-1]
            if "no room for it" in lines[node.lineno - 1]:  # the recipe asks for a model of this size
                continue
            if caught & {"Exception", "RuntimeError"} and not (isinstance(last, ast.Raise) and last.exc is None):
                yield pytest.param(node, id=f"{path.relative_to(SOURCE)}:{node.lineno}")


@pytest.mark.parametrize("handler", handlers())
def test_who_tries_what_a_model_can_do_does_not_blame_it(handler):
    assert any(isinstance(node, ast.Name) and node.id == "pass_on" for node in ast.walk(handler))


def test_a_model_that_finds_no_room_is_not_said_to_be_unable(monkeypatch):
    def without_room(*_, **__):
        raise torch.OutOfMemoryError(ON_A_GPU)

    monkeypatch.setattr(packing, "_batch", without_room)
    with pytest.raises(torch.OutOfMemoryError):
        packing.trouble(torch.nn.Linear(1, 1), None, ids=[1])


@pytest.mark.parametrize(("needs", "fit"), [([60, 30, 20], 2), ([90], 1), ([1] * 9, 4), ([20, 20, 20, 20, 20], 4)])
def test_as_many_work_on_a_device_as_fit(monkeypatch, needs, fit):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (125, 200))
    assert workers_on("cuda", needs, 4) == fit
    assert workers_on("cpu", needs, 4) == 4
