"""The job `average` with data: searches, comparisons, curves, adapters, and what is left of a killed search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.jobs.data.batches import load_batches
from modicum.jobs.loading.models import load_model
from modicum.recipe import parse
from modicum.record import read_record
from modicum.weights import Checkpoint
from modicum.weights.journal import Journal
from support import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five checkpoints of a short run, of which the second is spoilt, as models and as adapters of one base."""
    root = tmp_path_factory.mktemp("run")
    base = tiny_llama(seed=0)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    rows = [{"text": "abababab" * (1 + i % 3)} for i in range(12)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = byte_tokenizer()("abababababababab", return_tensors="pt")["input_ids"]
    for kind in ("model", "adapter"):
        torch.manual_seed(0)
        model: Any = tiny_llama(seed=0)
        if kind == "adapter":
            model.name_or_path = str(root / "base")
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
            model.peft_config["default"].base_model_name_or_path = str(root / "base")
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(1, 6):
            for _ in range(4):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            trained = [p for p in model.parameters() if p.requires_grad]
            before = [p.detach().clone() for p in trained]
            if step == 2:
                for p in trained:
                    p.data += 0.3 * torch.randn(p.shape)
            model.save_pretrained(root / kind / f"checkpoint-{step}")
            byte_tokenizer().save_pretrained(root / kind / f"checkpoint-{step}")
            for p, old in zip(trained, before):
                p.data.copy_(old)
    return root


def recipe(root: Path, kind: str = "model", **changes: Any) -> dict[str, Any]:
    section = {"path": str(root / "text.jsonl"), "max_length": 32}
    return {"job": "average", "checkpoints": [str(root / kind)], "method": {"name": "sewa", "k": 2, "iters": 8},
            "data": section, "batch_size": 4} | changes  # fmt: skip


def test_everything_is_measured_beside_the_choice(root: Path, tmp_path: Path) -> None:
    rules = ["last", "greedy", {"name": "lawa", "last": 3}]
    data = recipe(root, compare=rules, curve={"last": 2})
    told = plan(parse(data))
    assert any("sewa learns the coefficients from 12 rows" in line for line in told)
    assert any("8 forward and backward passes" in line for line in told)
    assert any("holds a mean and its gradient" in line for line in told)
    execute(parse(data), tmp_path / "run", quiet=True)
    metrics = read_record(tmp_path / "run")["metrics"]
    measured = metrics["averaging"]
    assert len(measured["single"]) == 5 and max(measured["single"]) == measured["single"][1]
    assert metrics["coefficients"][str(root / "model/checkpoint-2")] == 0
    assert [row["name"] for row in measured["rules"]] == ["the choice", "last", "greedy", "lawa (last 3)"]
    assert measured["rules"][0]["difference"] == [0, 0, 0]
    last = measured["rules"][1]
    assert last["loss"][0] == pytest.approx(measured["single"][-1], abs=1e-6)
    assert last["difference"][0] == pytest.approx(last["loss"][0] - measured["rules"][0]["loss"][0], abs=1e-6)
    assert len(measured["curve"]["loss"]) == 4
    assert measured["passes"]["gradients"] == 8 and measured["measured_on"] == "data"
    assert not (tmp_path / "run/search.jsonl").exists()
    # A checkpoint's loss is that of the same model as transformers loads it.
    model, recipe_ = load_model(root / "model/checkpoint-5", dtype="float32"), parse(data)
    batches = load_batches(recipe_.data, byte_tokenizer(), batch_size=4, seed=0)
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in batches]
    assert last["loss"][0] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_killed_search_goes_on_where_it_was(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe(root, compare=["best"])
    execute(parse(data), tmp_path / "whole", quiet=True)
    expected = (tmp_path / "whole/model/model.safetensors").read_bytes()
    asked = 0
    real = Journal.answer

    class KilledError(BaseException):
        pass

    def answer(self: Journal, key: str, ask: Any) -> list[float]:
        nonlocal asked

        def counted() -> list[float]:
            nonlocal asked
            asked += 1
            if asked == limit:
                raise KilledError
            return ask()

        return real(self, key, counted)

    monkeypatch.setattr(Journal, "answer", answer)
    limit = 6
    with pytest.raises(KilledError):
        execute(parse(data), tmp_path / "killed", quiet=True)
    journal = tmp_path / "killed/search.jsonl"
    assert len(journal.read_text().splitlines()) == 6  # its name and five answers
    with journal.open("a") as file:
        file.write('["torn')
    limit = 12
    with pytest.raises(KilledError):
        execute(parse(data), tmp_path / "killed", quiet=True)
    limit = -1
    execute(parse(data), tmp_path / "killed", quiet=True)
    assert (tmp_path / "killed/model/model.safetensors").read_bytes() == expected
    a, b = (read_record(tmp_path / run)["metrics"] for run in ("whole", "killed"))
    assert a == b
    assert asked == len({*range(asked)})


def test_answers_of_another_search_are_thrown_away(tmp_path: Path) -> None:
    first = Journal(tmp_path / "search.jsonl", "one")
    assert first.answer("a", lambda: [1.0]) == [1.0] and first.answer("b", lambda: [float("inf")])
    again = Journal(tmp_path / "search.jsonl", "one")
    assert again.answer("a", lambda: [9.0]) == [1.0] and again.answer("b", lambda: [9.0]) == [float("inf")]
    other = Journal(tmp_path / "search.jsonl", "two")
    assert other.answer("a", lambda: [9.0]) == [9.0]
    changed = Journal(tmp_path / "search.jsonl", "two")
    assert changed.answer("x", lambda: [2.0]) == [2.0]


@pytest.mark.parametrize("rank", [None, 3])
def test_adapters_become_one_adapter(root: Path, tmp_path: Path, rank: int | None) -> None:
    data = recipe(root, "adapter", output="lora", **({"rank": rank} if rank else {}))
    execute(parse(data), tmp_path / "lora", quiet=True)
    execute(parse(recipe(root, "adapter")), tmp_path / "model", quiet=True)
    chosen = read_record(tmp_path / "lora")["metrics"]["coefficients"]
    assert chosen == read_record(tmp_path / "model")["metrics"]["coefficients"]
    assert chosen[str(root / "adapter/checkpoint-2")] == 0
    whole = load_file(tmp_path / "model/model/model.safetensors")
    adapter = Checkpoint(tmp_path / "lora/adapter", base=root / "base")
    assert all(f.A.shape[0] == (rank or 4) for f in adapter.adapter.factors.values())  # type: ignore[union-attr]
    if rank is not None:
        return
    for name, tensor in whole.items():
        torch.testing.assert_close(adapter[name].float(), tensor.float(), rtol=1e-5, atol=1e-5)
    model = PeftModel.from_pretrained(load_model(root / "base", dtype="float32"), tmp_path / "lora/adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    averaged = load_model(tmp_path / "model/model", dtype="float32")
    torch.testing.assert_close(model(input_ids=ids).logits, averaged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_mean_of_products_is_not_the_product_of_means(tmp_path: Path, root: Path) -> None:
    from modicum.weights import average

    base = load_file(root / "base/model.safetensors")
    name = next(n for n in base if "q_proj" in n)
    average([root / f"adapter/checkpoint-{i}" for i in (1, 5)], tmp_path / "out", method="uniform", progress=False)
    a, b = (Checkpoint(root / f"adapter/checkpoint-{i}")[name] for i in (1, 5))
    found = load_file(tmp_path / "out/model.safetensors")[name]
    torch.testing.assert_close(found, (a + b) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "lora"}, "full model, and output: lora averages adapters"),
        ({"rank": 3}, "rank is that of an adapter"),
        ({"output": "lora", "exclude": "q"}, "exclude leaves tensors"),
        ({"method": {"name": "sewa", "k": 9}}, "k is 9, but there are 5 checkpoints.*save_total_limit"),
        ({"method": "uniform", "compare": [{"name": "lawa", "last": 7}]}, "last is 7, but there are 5"),
        ({"method": {"name": "wsm", "decay": [0.1, 0.2, 0.0, 0.0]}}, "never rise"),
        ({"curve": {"last": 6}}, "curve.last is 6"),
        (
            {"method": "uniform", "data": None, "batch_size": None, "compare": ["last"]},
            "compare changes nothing where data is not given",
        ),
        ({"data": None, "batch_size": None}, "learns its coefficients"),
        ({"method": {"name": "sewa", "tau": 0}}, "tau"),
    ],
)
def test_check_finds_what_run_would_refuse(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModicumError, match=message) as error:
        plan(parse({k: v for k, v in recipe(root, **changes).items() if v is not None}))
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    for i in (1, 2):
        tiny_llama(seed=i).save_pretrained(tmp_path / str(i))
        byte_tokenizer().save_pretrained(tmp_path / str(i))
    file = tmp_path / "2/tokenizer.json"
    file.write_text(file.read_text().replace('"a": 100', '"a": 101').replace('"b": 101', '"b": 100'))
    text = json.loads(file.read_text())
    vocabulary = text["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(text))
    with pytest.raises(ModicumError, match="one tokenizer"):
        plan(parse({"job": "average", "checkpoints": [str(tmp_path / "1"), str(tmp_path / "2")]}))


def start(data: dict[str, Any], folder: Path, processes: int = 1) -> subprocess.Popen[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "modicum", "run", str(file), "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finished(process: subprocess.Popen[str]) -> None:
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told[-2000:]


def test_two_processes_search_and_write_as_one(root: Path, tmp_path: Path) -> None:
    data = recipe(root, compare=["best", "quadratic"])
    two = start(data, tmp_path / "two/run", 2)
    finished(two)
    finished(start(data, tmp_path / "one/run"))
    a, b = (tmp_path / n / "run" for n in ("one", "two"))
    assert (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()
    assert read_record(a)["metrics"] == read_record(b)["metrics"]


@pytest.mark.slow
def test_a_process_killed_ten_times_ends_with_the_same_bytes(root: Path, tmp_path: Path) -> None:
    data = recipe(root, method={"name": "sewa", "k": 2, "iters": 400}, compare=["greedy"])
    finished(start(data, tmp_path / "whole/run"))
    folder, kills = tmp_path / "killed/run", 0
    for number in range(40):
        process = start(data, folder)
        journal = folder / "search.jsonl"
        until, size = time.monotonic() + 60, journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and time.monotonic() < until:
            grown = journal.exists() and journal.stat().st_size > size + 300 * (1 + number % 3)
            if grown or (folder / ".model.partial").exists():
                break
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()  # which closes its pipes too
        kills += 1
        if kills >= 10:
            finished(start(data, folder))
            break
    assert kills >= 5
    a, b = (tmp_path / n / "run" for n in ("whole", "killed"))
    assert (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()
    assert read_record(a)["metrics"] == read_record(b)["metrics"]
