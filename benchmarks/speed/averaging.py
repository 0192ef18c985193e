"""Speed and memory of averaging checkpoints, with SmolLM2-135M's shape and made-up numbers.

    python -m benchmarks.speed.averaging PART [--work DIR] [--mergekit ENV/bin/mergekit-yaml]

PART is ``prepare`` (20 checkpoints in bfloat16, 5.4 GB, which stay), ``iteration``, ``quadratic``, ``memory``, ``mean``
or ``moving``. Each adds itself to ``benchmarks/results/averaging-speed.json``: seconds by the clock and of the
processor, what runs beside what in turn in one process, and ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.memory import Polled, status
from benchmarks.provenance import origin
from benchmarks.speed.hrp import least, over, timed
from benchmarks.tables import RESULTS, load
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modicum.environment import environment
from modicum.jobs.averaging.loss import hollow
from modicum.jobs.loading.models import load_model
from modicum.jobs.loading.references import resolve_model
from modicum.record import write_atomic
from modicum.weights import Checkpoint, average
from modicum.weights.averagers.support import mean_of
from modicum.weights.kernels.surrogate import Surrogate
from modicum.weights.moving import MovingAverage
from modicum.weights.search import Landscape

NAME, N, K = "averaging-speed.json", 20, 5
MODEL = "builtin:smollm2-135m-instruct"


def prepare(work: Path) -> list[Path]:
    """Write checkpoints that differ from SmolLM2 by a thousandth, as those of one run do."""
    source = resolve_model(MODEL)
    folders = [work / f"checkpoint-{i + 1}" for i in range(N)]
    for i, folder in enumerate(folders):
        if (folder / "model.safetensors").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "config.json", folder)
        rng, tensors = torch.Generator().manual_seed(i), load_file(source / "model.safetensors")
        for tensor in tensors.values():
            tensor += 1e-3 * torch.randn(tensor.shape, generator=rng).to(tensor.dtype)
        save_file(tensors, folder / "part", {"format": "pt"})
        (folder / "part").rename(folder / "model.safetensors")
    return folders


def batch(tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(49152, (max(1, tokens // 512), min(tokens, 512)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def landscape(folders: list[Path], tokens: int) -> tuple[Landscape, nn.Module]:
    model: nn.Module = load_model(MODEL, dtype="float32")
    place = load_model(MODEL, dtype="float32")
    hollow(place)

    def loss(weights: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(place, weights, kwargs=given).loss
        return found

    return Landscape(loss, [Checkpoint(folder) for folder in folders], [batch(tokens)]), model


def step(model: nn.Module, given: dict[str, Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model(**given).loss.backward()


def iteration(work: Path, **_: Any) -> dict[str, Any]:
    """One step of sewa with K of n checkpoints beside forward and backward of the same batch."""
    folders, found = prepare(work), {}
    for tokens in (512, 2048):
        search, model = landscape(folders, tokens)
        weights = mean_of(range(3, 3 + K), N)
        search._mean(mean_of(range(N), N))  # every page once
        ours, plain = [], []
        for _ in range(3 if tokens == 512 else 2):
            plain.append(timed(partial(step, model, search.batches[0])))
            ours.append(timed(partial(search.gradient, weights)))
        mean = timed(partial(search._mean, weights))
        a, b = least(ours), least(plain)
        found[f"{tokens} tokens"] = {"sewa": a, "forward and backward": b, "mean of 5": mean, "ratio": over(a, b)}
    return {"n": N, "k": K, "goal": {"512 tokens": 1.4, "2048 tokens": 1.15}, **found}


def quadratic(work: Path, **_: Any) -> dict[str, Any]:
    """The quadratic search's own work, and what its gradients take, in training steps."""
    search, model = landscape(prepare(work), 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def train() -> None:
        step(model, search.batches[0])
        optimizer.step()

    train()
    steps, gradients = [], []
    for _ in range(3):
        steps.append(timed(train))
        gradients.append(timed(lambda: search.gradient(mean_of(range(N), N))))
    value = timed(lambda: search.value(mean_of(range(4), N)))
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(N, 40, generator=rng, dtype=torch.float64).numpy()
    fit = Surrogate(1.0, points[:, 0], points @ points.T)

    def choose() -> None:
        for size in range(1, N + 1):
            fit.subset(size)
        fit.windows()
        fit.weights()

    chosen, one, each = timed(choose), least(steps), least(gradients)
    whole = {clock: (N + 1) * each[clock] + 3 * value[clock] + chosen[clock] for clock in ("wall", "cpu")}
    return {
        "tokens": 512, "n": N, "goal_steps": 26, "training step": one, "gradient": each, "value": value,
        "choosing": chosen, "whole": whole, "training steps": over(whole, one),
        "literal sewa, 150 gradients, in training steps": {c: 150 * each[c] / one[c] for c in ("wall", "cpu")},
    }  # fmt: skip


def memory(work: Path, **_: Any) -> dict[str, Any]:
    """Peak anonymous memory of a search, and of the same gradient through a stack of all checkpoints."""
    folders = prepare(work)
    weights, found = mean_of(range(N), N), {}
    size = sum(Checkpoint(folders[0]).spec(name).numel for name in Checkpoint(folders[0])) * 4
    code = (
        "import sys, json; from pathlib import Path; from benchmarks.speed import averaging as a; import torch;"
        "torch.set_num_threads(1); print(json.dumps(a.{work}([Path(p) for p in sys.argv[1:]])))"
    )
    for name in ("peak_of_search", "peak_of_activations", "peak_of_stack"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(work=name), *map(str, folders)],
            capture_output=True,
            text=True,
            check=True,
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    # The stack of 20 models of this size would take 11 GB: two layers of it stand for thirty.
    allowed = 2 * size + found["peak_of_activations"] + 0.3e9
    return {"n": len(weights), "tokens": 512, "mean and gradient": 2 * size, "allowed": allowed, **found,
            "share of allowed": found["peak_of_search"] / allowed,
            "stack over search": found["peak_of_stack"]["ratio"]}  # fmt: skip


def peak_of_search(folders: list[Path]) -> int:
    with Polled() as peak:
        search, _ = landscape_alone(folders)
        search.gradient(mean_of(range(N), N))
    return int(peak.bytes)


def landscape_alone(folders: list[Path], layers: int | None = None) -> tuple[Landscape, nn.Module]:
    place: Any = load_model(MODEL, dtype="float32")
    if layers is not None:
        place.model.layers = place.model.layers[:layers]
    names = {name for name, _ in place.named_parameters()}
    hollow(place)
    known: list[Any] = [Checkpoint(folder) for folder in folders]
    if layers is not None:
        known = [{name: model[name] for name in model if name in names} for model in known]

    def loss(weights: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(place, weights, kwargs=given).loss
        return found

    return Landscape(loss, known, [batch(512)]), place


def peak_of_activations(folders: list[Path]) -> int:  # noqa: ARG001
    """Memory of forward and backward beside weights and gradients."""
    model: nn.Module = load_model(MODEL, dtype="float32")
    weights = sum(p.nbytes for p in model.parameters())
    with Polled() as peak:
        step(model, batch(512))
    return int(peak.bytes - 2 * weights)


def peak_of_stack(folders: list[Path]) -> dict[str, float]:
    """A gradient through an explicit stack in float32, and ours, above what stood before; the model has two layers."""
    search, place = landscape_alone(folders, layers=2)
    found = {}
    before = status("RssAnon")
    weights = mean_of(range(N), N)
    with Polled() as peak:
        search.gradient(weights)
    found["ours"] = float(peak.bytes - before)
    with Polled() as peak:
        w = torch.tensor(weights, requires_grad=True)
        stacks = {name: torch.stack([m[name].float() for m in search.checkpoints]) for name in search._motions}
        mean = {name: torch.tensordot(w, stack, 1) for name, stack in stacks.items()}
        torch.func.functional_call(place, mean, kwargs=search.batches[0]).loss.backward()
    found["stack"] = float(peak.bytes - before)
    return found | {"ratio": found["stack"] / found["ours"]}


def mean(work: Path, *, mergekit: Path | None, **_: Any) -> dict[str, Any]:
    """The mean of 20 checkpoints: ours, torch.load and sum, mergekit's, and reading and writing the bytes."""
    folders, found = prepare(work), dict[str, Any]()
    out = Path(tempfile.mkdtemp(dir=work))
    pickles = [out / f"{i}.bin" for i in range(N)]
    for folder, pickle in zip(folders, pickles):
        torch.save(load_file(folder / "model.safetensors"), pickle)

    def ours() -> None:
        average(folders, out / "ours", progress=False)

    def sums() -> None:
        total: dict[str, Tensor] = {}
        for pickle in pickles:
            for name, tensor in torch.load(pickle, weights_only=True).items():
                total[name] = total.get(name, 0) + tensor.float()
        torch.save({name: (tensor / N).bfloat16() for name, tensor in total.items()}, out / "sums.bin")

    def copied() -> None:
        for folder in folders:
            (folder / "model.safetensors").read_bytes()
        (out / "copy").write_bytes((folders[0] / "model.safetensors").read_bytes())

    rounds: dict[str, Callable[[], None]] = {"modicum": ours, "torch.load and sum": sums, "read and write": copied}
    if mergekit is not None:
        models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
        (out / "file.yaml").write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": models}))

        def theirs() -> None:
            command = [str(mergekit), str(out / "file.yaml"), str(out / "mergekit"), "--quiet"]
            subprocess.run(command, check=True, capture_output=True)

        rounds["mergekit, with its start"] = theirs
    for name, work_of in rounds.items():
        seconds, peaks = [], []
        for _ in range(2):
            shutil.rmtree(out / "ours", ignore_errors=True)
            shutil.rmtree(out / "mergekit", ignore_errors=True)
            before = status("RssAnon")
            with Polled() as peak:
                seconds.append(timed(work_of))
            peaks.append(peak.bytes - before)
        found[name] = least(seconds) | {"peak": min(peaks)}
    shutil.rmtree(out)
    ratios = {name: one["wall"] / found["modicum"]["wall"] for name, one in found.items()}
    return found | {"ratios": ratios, "share of memory": found["modicum"]["peak"] / found["torch.load and sum"]["peak"]}


def moving(work: Path, **_: Any) -> dict[str, Any]:  # noqa: ARG001
    """An update of the moving average beside torch's own, and beside a training step of 2,048 tokens."""
    model = load_model(MODEL, dtype="float32")
    ours = MovingAverage(model, decay=0.999)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    mine, other = [], []
    for _ in range(12):
        mine.append(timed(ours.update))
        other.append(timed(lambda: theirs.update_parameters(model)))
    del theirs
    whole = timed(lambda: step(model, batch(2048)))
    a, b = least(mine[1:]), least(other[1:])
    return {
        "modicum": a,
        "torch": b,
        "ratio": over(a, b),
        "step of 2048 tokens": whole,
        "share of step": over(a, whole),
    }


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "iteration": iteration, "quadratic": quadratic, "memory": memory, "mean": mean, "moving": moving
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["prepare", *PARTS])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "averaging-speed")
    parser.add_argument("--mergekit", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "prepare":
        prepare(given.work)
        return
    began = time.time()
    measured: dict[str, Any] = PARTS[given.part](given.work, mergekit=given.mergekit)
    content = load(NAME) or {"parts": {}}
    stamp = {"threads": 1, "seconds": round(time.time() - began, 1), "environment": environment(), **origin()}
    content["parts"][given.part] = measured | stamp
    write_atomic(RESULTS / NAME, json.dumps(content, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
