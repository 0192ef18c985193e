"""Log-probabilities of pairs under the model from which a run starts, computed once and kept for every other run.

They depend on the weights, on the tokens of the pair and on the precision, and on nothing else of a run: an expert for
each dimension, mixtures of them and all seeds share them. The store is a folder of small files in the user's cache,
each written whole, so that several runs and machines may add to it at once; a lock on a share of the pairs keeps two of
them from computing the same ones.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from modicum import lock, processes
from modicum.borders import loads
from modicum.content import cache_folder
from modicum.durable import write_atomic
from modicum.jobs.data.pairs import Alternatives, Pair, PairCollator, with_reference
from modicum.jobs.training.objective import LabelHead
from modicum.jobs.training.partial_passes import begun

KEPT = 64  # pairs after which what was computed is kept
EVERY = 0.1  # seconds between two looks at what another run computes
Known: TypeAlias = dict[str, tuple[float, float]]


def fingerprint(model: Any, precision: str, *, without: Callable[[str], bool] = lambda _: False) -> str:
    """Return a name for a model's function: its configuration, all its weights, and how it computes.

    Args:
        model: The model itself, without an adapter.
        precision: What else decides its numbers, such as autocast.
        without: Names of tensors that do not matter.

    Cost:
        One pass over the weights.
    """
    from xxhash import xxh3_128

    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "use_cache")}
    digest = xxh3_128(json.dumps([precision, type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        if without(name):
            continue
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def key_of(pair: Pair | Alternatives) -> str:
    """Return the name of a pair: its tokens and where its parts begin."""
    from xxhash import xxh3_128_hexdigest

    return xxh3_128_hexdigest(json.dumps([pair.prompt, *pair.answers]).encode())


class ReferenceStore:
    """What is known of pairs under one model.

    Args:
        name: Of the model; see :func:`fingerprint`.
        folder: Where all models' folders lie; the user's cache where not given.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.folder = (folder or cache_folder() / "references") / name
        self._read: set[Path] = set()

    def read(self, note: Callable[[str], object]) -> Known:
        """Return all that is known since the last call; a file that cannot be read is left out, and said."""
        known: Known = {}
        for file in sorted({*self.folder.glob("*.json")} - self._read):
            self._read.add(file)
            try:
                known |= {key: (float(a), float(b)) for key, (a, b) in loads(file.read_text()).items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                note(f"{file} cannot be read ({type(error).__name__}): what it held is computed again.")
        return known

    def add(self, found: Known) -> None:
        """Keep what was found, in a file of its own."""
        from xxhash import xxh3_128_hexdigest

        text = json.dumps(found, sort_keys=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"{xxh3_128_hexdigest(text.encode())}.json", text)

    def turns(
        self, keys: Collection[str], known: Known, note: Callable[[str], object]
    ) -> Generator[list[str], None, None]:
        """Yield keys that are not known, while no other run computes the same ones; all are known in the end.

        Keys are locked by how they begin. What others found is added to ``known``; what the caller finds it has to
        :meth:`add`, and put there, before it asks for the next ones.
        """
        known |= self.read(note)
        waiting: dict[str, list[str]] = defaultdict(list)
        for key in sorted({*keys} - known.keys()):
            waiting[key[:2]].append(key)
        told = False
        while waiting:
            with ExitStack() as locks:
                taken: list[str] = []
                for start in waiting:
                    if sum(len(waiting[each]) for each in taken) < KEPT and self._locked(start, locks):
                        taken.append(start)
                if taken:
                    known |= self.read(note)
                    left = [key for start in taken for key in waiting.pop(start) if key not in known]
                    for at in range(0, len(left), KEPT):  # a run that is killed finds them when it goes on
                        yield left[at : at + KEPT]
                    continue
            if not told:
                note("Another run computes reference log-probabilities of the same pairs: this one waits for them.")
                told = True
            time.sleep(EVERY)

    def _locked(self, start: str, locks: ExitStack) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        return lock.enter(locks, self.folder / f".{start}.lock", self.folder)


def referenced(
    sets: Sequence[Sequence[Pair]],
    model: Any,
    collator: PairCollator,
    *,
    precision: str,
    autocast: torch.dtype | None = None,
    note: Callable[[str], object],
    folder: Path | None = None,
) -> list[list[Pair]]:
    """Return sets of pairs with the log-probabilities of their answers under ``model``.

    Each pair that the store does not know goes through the model by itself, so that its numbers depend on no other
    pair; processes share the pairs out.

    Args:
        sets: Training and evaluation pairs.
        model: The model from which training starts, on the device that is to compute.
        collator: Lays a pair out.
        precision: See :func:`fingerprint`.
        autocast: Type in which the Trainer is going to compute, where it is not the weights' own.
        note: Told how many were computed and how many were known.
        folder: See :class:`ReferenceStore`.
    """
    store = ReferenceStore(fingerprint(model, f"{precision} {autocast} shared={collator.shared}"), folder)
    by_key = {key_of(pair): pair for pairs in sets for pair in pairs}
    known: Known = {}
    computed = 0
    with closing(store.turns(by_key, known, note)) as turns:
        # The first process claims pairs and knows what other runs found; all compute.
        while (part := processes.broadcast_object(next(turns, None) if processes.main() else None)) is not None:
            values = _computed([by_key[key] for key in part], model, collator, autocast)
            computed += len(part)
            if processes.main():
                found = {key: (a, b) for key, (a, b) in zip(part, values.tolist())}
                store.add(found)
                known |= found
    known = processes.broadcast_object(known)
    note(
        f"Reference log-probabilities of {len(by_key)} pairs: {computed} computed, {len(by_key) - computed} known from "
        "other runs."
    )
    return [[with_reference(pair, known[key_of(pair)]) for pair in pairs] for pairs in sets]


def _computed(pairs: Sequence[Pair], model: Any, collator: PairCollator, autocast: torch.dtype | None) -> Tensor:
    values = torch.zeros(len(pairs), 2, dtype=torch.float64)
    training, head = model.training, LabelHead(model)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            for index in range(processes.rank(), len(pairs), processes.world()):
                values[index] = log_probabilities(model, collator([pairs[index]]))[0].double().cpu()
    finally:
        head.detach()
        model.train(training)
    if processes.world() > 1:
        shared = values.to(model.device, torch.float32 if model.device.type == "mps" else torch.float64)
        processes.average([shared])  # a mean over the processes, of which one has a number and all others have 0
        values = shared.double().cpu() * processes.world()
    return values


def log_probabilities(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the summed log-probabilities of the answers of a batch, (pairs, 2), chosen first; in float32.

    Args:
        model: With a :class:`~modicum.jobs.training.objective.LabelHead` on it.
        batch: Of :class:`~modicum.jobs.data.pairs.PairCollator`.

    Cost:
        A forward pass, with logits where an answer's tokens are predicted and nowhere else.
    """
    return answer_log_probabilities(model, batch).view(-1, 2)


def answer_log_probabilities(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the summed log-probabilities of all answers of a batch, one after the other; in float32."""
    return torch.stack([part.sum() for part in torch.split(token_log_probabilities(model, batch), batch["counts"])])


def token_log_probabilities(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the log-probability of every token of the answers of a batch, one after the other; in float32."""
    device = getattr(model, "device", batch["input_ids"].device)
    read = {key: batch[key].to(device) for key in ("input_ids", "position_ids", "attention_mask")}
    places, targets = batch["reads"].to(device), batch["targets"].to(device)
    with begun(model, batch):
        logits = model(**read, use_cache=False, label_positions=places).logits[0]
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
