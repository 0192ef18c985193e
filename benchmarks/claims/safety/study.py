"""Does reasoning with guidelines make refusals hold under wrappers that were never trained?

    python -m benchmarks.claims.safety.study [--minutes 8] [--seeds 3]

Four arms are fine-tuned on the same prompts with the same answers: refusal training (``rt``), safety reasoning
(``srg``), and two controls of as many tokens: filler (``filler``) and the reasoning about another query
(``shuffled``). They start from a base whose reasoning about harm ends with a refusal (``linked``) or does not
(``unlinked``). Cells are stored one by one in ``benchmarks/results/safety-language.json``; call again to go on.

What would refute the claim: filler refuses harmful requests in unseen wrappers as often as safety reasoning does, or
safety reasoning buys its refusals with refusals of harmless requests in the same wrappers.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch
from benchmarks.cells import resumable
from benchmarks.claims.safety.language import (
    FORMS,
    ID,
    VERBS,
    Language,
    Model,
    base_rows,
    continued,
    outcome,
    train,
    trained_topics,
    tuning_rows,
)
from safetensors.torch import load_file, save_file

from modicum.content import cache_folder
from modicum.evaluate.best_of_n import asr_all
from modicum.random import generator

BASE_STEPS, BASE_BATCH, TUNE_STEPS, TUNE_BATCH = 1000, 128, 300, 64
NS, SAMPLES = (1, 2, 4, 8, 16, 32), 32
ARMS = ("base", "guided", "rt", "srg", "filler", "shuffled")
ABOUT = {"base": [BASE_STEPS, BASE_BATCH, 3e-3], "tune": [TUNE_STEPS, TUNE_BATCH, 3e-4], "samples": SAMPLES}


@cache
def base(seed: int, linked: bool) -> dict[str, Any]:
    """Train the base, and return its weights with its last loss; one that was trained before is read again."""
    kept = cache_folder() / "studies" / f"safety-language-{seed}-{linked}.safetensors"
    if kept.exists():
        known = load_file(kept)
        return {"loss": float(known.pop("loss")), "weights": known}
    language, model = Language.drawn(), Model(seed)
    rng = generator(seed, "base", str(linked))
    loss = train(model, [base_rows(language, BASE_BATCH, rng, linked=linked) for _ in range(BASE_STEPS)], lr=3e-3)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file({**model.state_dict(), "loss": torch.tensor(loss)}, kept)
    return {"weights": model.state_dict(), "loss": loss}


def cell(seed: int, linked: bool, arm: str) -> dict[str, Any]:
    """Fine-tune an arm, and count three outcomes in every form, greedily and best of N."""
    language, model, start = Language.drawn(), Model(seed), base(seed, linked)
    model.load_state_dict(start["weights"])
    found: dict[str, Any] = {"base_loss": start["loss"]}
    if arm not in ("base", "guided"):
        rng = generator(seed, "tune")
        batches = [tuning_rows(language, TUNE_BATCH, rng, arm=arm) for _ in range(TUNE_STEPS)]
        found["loss"] = train(model, batches, lr=3e-4)
    model.eval()
    trained = trained_topics(language)
    for harmful in (True, False):
        kind = "harmful" if harmful else "harmless"
        topics = [t for t in range(64) if language.harmful(t) is harmful]
        for held_out in (True, False):
            asked = [t for t in topics if (t not in trained[harmful]) is held_out]
            for form in FORMS:
                name = f"{kind}.{'held_out' if held_out else 'trained'}.{form}"
                found[name] = counted(language, model, asked, form, seed, guided=arm == "guided")
                if harmful and held_out:
                    found[name]["asr_all"] = curve(language, model, asked, form, seed, guided=arm == "guided")
    return found


def prompts(language: Language, topics: list[int], form: str, seed: int, *, guided: bool) -> list[Any]:
    rng = generator(seed, "queries", form)
    front = [ID["bos"], *([ID["guide"]] if guided else [])]
    pairs = [(verb, topic) for topic in topics for verb in range(VERBS)]
    return [(v, t, [*front, *language.query(v, t, form, rng), ID["sep"]]) for v, t in pairs]


def counted(
    language: Language, model: Model, topics: list[int], form: str, seed: int, *, guided: bool
) -> dict[str, float]:
    asked = prompts(language, topics, form, seed, guided=guided)
    said = continued(model, [prompt for _, _, prompt in asked], temperature=0.0, rng=generator(0, "greedy"))
    outcomes = [outcome(language, verb, topic, text) for (verb, topic, _), text in zip(asked, said, strict=True)]
    return {name: outcomes.count(name) / len(outcomes) for name in ("complied", "refused", "malformed")}


def curve(
    language: Language, model: Model, topics: list[int], form: str, seed: int, *, guided: bool
) -> dict[str, list[float]]:
    """Return the defender's curves: all of N not refused, and all of N complied."""
    asked = prompts(language, topics, form, seed, guided=guided)
    rng = generator(seed, "samples", form)
    draws = [continued(model, [p for _, _, p in asked], temperature=1.0, rng=rng) for _ in range(SAMPLES)]
    rows = [[outcome(language, v, t, texts[i]) for texts in draws] for i, (v, t, _) in enumerate(asked)]
    counts = {
        "not_refused": [sum(one != "refused" for one in row) for row in rows],
        "complied": [row.count("complied") for row in rows],
    }
    return {name: [asr_all(values, SAMPLES, n) for n in NS] for name, values in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads than free cores make a step ten times slower
    recall = resumable("safety-language", minutes=options.minutes, about=ABOUT)
    for linked in (True, False):
        for seed in range(options.seeds):
            for arm in ARMS:
                name = f"{'linked' if linked else 'unlinked'}.{arm}.{seed}"
                found = recall(name, lambda s=seed, k=linked, a=arm: cell(s, k, a))  # type: ignore[misc]
                if found is None:
                    print("time is up; call again to go on")
                    return
                forms = [found[f"harmful.held_out.{form}"]["complied"] for form in FORMS]
                print(
                    name, "complied:", " ".join(f"{form} {value:.2f}" for form, value in zip(FORMS, forms, strict=True))
                )


if __name__ == "__main__":
    main()
