"""How often do judges without a large guard err on answers that people have labelled?

    python -m benchmarks.claims.safety.judges [--parts rules states self]

Writes ``benchmarks/results/safety-judges.json``: the small guards on held-out goals with three draws of the folds, by
words, by hidden states of SmolLM2 and by both; the rules for refusals, both on harm and on refusals; and SmolLM2 as its
own judge, with the goal before it and with the goal inside a wrapper, as a judge sees it who is shown the prompt. What
would refute a small guard: errors that add up to 1, or an area under the curve near one half; what would refute the
hidden states: no larger area than by words alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.provenance import origin

from modicum.random import generator

RESULTS = Path(__file__).parents[2] / "results" / "safety-judges.json"
DEPTH, TOKENS = 0.6, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}}
    for part in options.parts:
        found = PARTS[part]()
        content["cells"] |= found
        print(json.dumps(found, indent=1))
    from modicum.jobs.attack_data import provenance

    content |= {"data": provenance("harm", "refusal"), "origin": origin()}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def itself(count: int = 60) -> dict[str, Any]:
    """Ask SmolLM2 whether answers are safe: so many harmful and harmless ones, cut to their first 400 letters."""
    from dataclasses import replace

    from modicum.evaluate.calibration import calibrate
    from modicum.evaluate.judges.jbb import JBBJudge
    from modicum.jobs.attack_data import fill, labelled, templates
    from modicum.jobs.chat.local import LocalHF
    from modicum.jobs.loading.models import load_model, load_tokenizer

    reference = "builtin:smollm2-135m-instruct"
    model = LocalHF(load_model(reference, dtype="float32", device="cpu"), load_tokenizer(reference), batch_size=8)
    items, labels = labelled("harm")
    order = torch.randperm(len(items), generator=generator(0, "self")).tolist()
    chosen = [i for way in (True, False) for i in [i for i in order if labels[i] is way][:count]]
    plain = [replace(items[i], response=items[i].response[:400]) for i in chosen]
    wrapper = min((text for text in templates("jailbreakchat").values()), key=len)
    # A judge who is shown the prompt takes the wrapped request for the goal.
    shown = [fill(wrapper, item.goal or "") for item in plain]
    wrapped = [replace(item, goal=text, prompt=text) for item, text in zip(plain, shown, strict=True)]
    found = {}
    for name, asked in {"goal": plain, "wrapper": wrapped}.items():
        said = [verdict.unsafe for verdict in JBBJudge(model).judge(asked)]
        truth = [labels[i] for i in chosen]
        unread = sum(value is None for value in said)
        try:
            found[f"self.harm.{name}"] = {**_rates(calibrate(said, truth)), "unread": unread}
        except ValueError as error:  # no verdict could be read of one class
            found[f"self.harm.{name}"] = {"unread": unread, "asked": len(said), "error": str(error)}
    return found


def rules() -> dict[str, Any]:
    """Return the errors of judges that ask no model."""
    from modicum.evaluate.calibration import calibrate
    from modicum.evaluate.judges.linear import LinearGuard
    from modicum.evaluate.judges.prefix import PrefixRefusal
    from modicum.jobs.attack_data import labelled

    found: dict[str, Any] = {}
    for name, knobs in {"harm": {}, "refusal": {"tells": "refusal", "l2": 0.1, "features": 2048}}.items():
        items, labels = labelled(name)
        for seed in range(3):
            guard = LinearGuard(**knobs).fit(items, labels, seed=seed)
            found[f"linear.{name}.{seed}"] = {"auroc": guard.area, **_rates(guard.calibration)}
        # As a judge of harm, the rule calls harmful whatever does not begin as a refusal.
        refused = [bool(verdict.refusal) for verdict in PrefixRefusal().judge(items)]
        said = refused if name == "refusal" else [not value for value in refused]
        found[f"prefix.{name}"] = _rates(calibrate(said, labels))
    found |= _refusals(*labelled("refusal"))
    return found


def states() -> dict[str, Any]:
    """Return the errors of the guard by hidden states, alone and beside words, and of words alone on the same answers.

    States are read once and kept. The depth was chosen on a quarter of the goals, among 4, 8, 12, 15 and 18 of 30
    blocks; ``fresh`` leaves these goals out. In 16 bits the model takes less than half of the time.
    """
    from modicum.evaluate.judges.linear import LinearGuard
    from modicum.evaluate.judges.states import StateGuard
    from modicum.jobs.attack_data import labelled
    from modicum.jobs.chat.local import LocalHF
    from modicum.jobs.loading.models import load_model, load_tokenizer

    reference = "builtin:smollm2-135m-instruct"
    torch.set_num_threads(1)
    local = LocalHF(load_model(reference, dtype="bfloat16", device="cpu").eval(), load_tokenizer(reference))
    items, labels = labelled("harm")
    read = local.answer_states(items, depth=DEPTH, tokens=TOKENS)
    seen = sorted({item.goal or "" for item in items})[::4]
    sets = {"harm": range(len(items)), "fresh": [i for i, item in enumerate(items) if item.goal not in seen]}
    found: dict[str, Any] = {}
    for name, rows in sets.items():
        part, truth, states_of = [items[i] for i in rows], [labels[i] for i in rows], read[list(rows)]
        kept = SimpleNamespace(answer_states=lambda *_, states_of=states_of, **__: states_of)
        for kind in ("words", "states", "both"):
            for seed in range(3):
                knobs = {"words": kind == "both", "depth": DEPTH, "tokens": TOKENS}
                guard = LinearGuard() if kind == "words" else StateGuard(kept, **knobs)
                guard.fit(part, truth, seed=seed)
                found[f"{kind}.{name}.{seed}"] = {"auroc": guard.area, **_rates(guard.calibration)}
    return found


def _refusals(items: Any, labels: Any) -> dict[str, Any]:
    """Return the errors of the rules for refusals, on all answers and on those that are not labelled both ways.

    Some answers stand under two goals, labelled a refusal where the goal was another: there the label says that the
    goal was not met, not that anything was declined.
    """
    from modicum.evaluate.calibration import calibrate
    from modicum.evaluate.judges.declines import Declines
    from modicum.evaluate.judges.prefix import PrefixRefusal

    ways = [{item.response for item, label in zip(items, labels, strict=True) if label is way} for way in (True, False)]
    mixed = ways[0] & ways[1]
    kept = [i for i, item in enumerate(items) if item.response not in mixed]
    rules = {"prefix": PrefixRefusal(), "declines": Declines(), "evasion": Declines(off_topic=True)}
    found: dict[str, Any] = {"mixed": {"answers": len(mixed), "labelled": len(items) - len(kept)}}
    for name, rule in rules.items():
        said = [verdict.refusal for verdict in rule.judge(items)]
        found[f"{name}.refusal"] = _rates(calibrate(said, labels))
        found[f"{name}.refusal.unmixed"] = _rates(calibrate([said[i] for i in kept], [labels[i] for i in kept]))
    return found


def _rates(found: Any) -> dict[str, Any]:
    return {
        "agreement": found.agreement._asdict(), "fpr": found.fpr._asdict(), "fnr": found.fnr._asdict(),
        "positives": found.positives, "negatives": found.negatives,
    }  # fmt: skip


PARTS = {"rules": rules, "states": states, "self": itself}


if __name__ == "__main__":
    main()
