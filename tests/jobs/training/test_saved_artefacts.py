"""What a run saves is what it trained, over initialisations, objectives, gradient rules and optimisers together."""

import itertools
import json
import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from modicum import registry
from modicum.errors import ModicumError
from modicum.jobs import execute
from modicum.jobs.training.parts.verification import Verification
from modicum.jobs.training.verification import ROWS, TOKENS
from modicum.recipe import parse
from modicum.record import read_record
from support import byte_tokenizer, tiny_llama

KNOBS = {
    "hrp": {"preheat_rank": 4, "preheat_steps": 1},
    "lora_squeeze": {"preheat_rank": 4, "preheat_steps": 1},
    "adalora": {"warmup": 0.0, "settled": 0.3},
    "meap_sft": {"min_answer_tokens": 0},
    "aggc": {"steps": 3},
    "fixed_norm": {"limit": 0.1},
    "value": {"limit": 0.1},
}
ROWS_OF_THEIR_OWN = ("answers", "reasoning", "contrasts")
INSIDE = ("inputs_embeds", "hidden_states")
TARGETS = {
    "linear": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["v_proj", "embed_tokens"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 5}},
}


def choice(name):
    return {"name": name, **KNOBS.get(name, {})} if name else None


def tables():
    """Return what a recipe may choose: ``None`` is the plain way."""
    rules = {name: entry.facts.weight_sized_state for name, entry in registry.gradient_rule.items()}
    return {
        "init": [None, *sorted({*registry.adapter_init} - {"loftq"})],  # which needs a CUDA device
        "objective": [None, *(n for n, e in registry.objective.items() if e.facts.acts_on not in ROWS_OF_THEIR_OWN)],
        "gradient": [None, *rules],
        "optimizer": [None, None, None, *registry.zeroth_order],
        "tied": [True, False],
        "targets": list(TARGETS),
    }


def cases(count):
    """Return so many choices in which each entry of each table comes, and pairs of entries come at random."""
    rng, columns = random.Random(0), {}
    for key, entries in tables().items():
        column = list(itertools.islice(itertools.cycle(entries), count))
        rng.shuffle(column)
        columns[key] = column
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


CASES = cases(66)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = {}
    for tied in (True, False):
        folders[tied] = tmp_path_factory.mktemp("base") / "model"
        tiny_llama(num_hidden_layers=1, tie_word_embeddings=tied, pad_token_id=None).save_pretrained(folders[tied])
        byte_tokenizer().save_pretrained(folders[tied])
    return folders


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "abc" * n}) + "\n" for n in range(1, 8)))
    return path


def recipe(case, models, rows):
    data = {"job": "train", "model": {"path": str(models[case["tied"]]), "dtype": "float32"}}
    data["data"] = {"path": str(rows), "max_length": 48}
    data["trainer"] = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no"}
    if not case["optimizer"]:  # a zeroth-order optimizer has a rate of its own
        data["trainer"]["learning_rate"] = 2e-2
    if case["init"]:
        data["adapter"] = {"rank": 2, "init": choice(case["init"]), "config": TARGETS[case["targets"]]}
    if case["objective"]:
        data["objective"] = choice(case["objective"])
    if case["optimizer"]:
        data["optimizer"] = {"name": case["optimizer"], "lr": 1e-3}
    elif case["gradient"]:
        heavy = registry.gradient_rule[case["gradient"]].facts.weight_sized_state
        data["gradient"] = choice(case["gradient"]) | ({heavy: 0} if heavy else {})
    return data


def reloaded(folder, base):
    """Open what a run saved with nothing of ours."""
    if folder.name == "adapter":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def check(case, models, rows, folder, monkeypatch):
    """Train, and compare what is saved with the model as it stood when training had ended; return the outcome."""
    kept = {}
    verify = Verification.verify

    def watched(self, folder, parts):
        kept.update(rows=self.rows, logits=self.trained, without={t for part in parts for t in part.own_tokens})
        return verify(self, folder, parts)

    monkeypatch.setattr(Verification, "verify", watched)
    try:
        run = execute(parse(recipe(case, models, rows)), folder, quiet=True)
    except ModicumError as error:
        record = folder / "record.json"
        assert "\n" not in str(error) or "recipe:" in str(error)
        assert not record.exists() or read_record(folder)["status"] == "failed"
        assert "not what was trained" not in str(error) and "does not load" not in str(error), error
        return "refused"
    saved = run.folder / ("adapter" if case["init"] else "model")
    model = reloaded(saved, models[case["tied"]])
    for ids, logits in zip(kept["rows"], kept["logits"]):
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0]
        words = [token for token in range(found.shape[-1]) if token not in kept["without"]]
        ours, theirs = (t[..., words] - t[..., words].mean(-1, keepdim=True) for t in (logits[0], found))
        assert (ours - theirs).norm() <= 2e-3 * ours.norm()
    assert len(kept["rows"]) == ROWS and all(len(ids) <= TOKENS for ids in kept["rows"])
    return "saved"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(0, len(CASES), 6))
def test_what_is_saved_is_what_was_trained(models, rows, tmp_path, monkeypatch, number):
    check(CASES[number], models, rows, tmp_path / "r", monkeypatch)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_is_saved_and_holds_the_row_of_a_mask_token_is_refused(models, rows, tmp_path):
    case = {"init": "default", "objective": "meap", "gradient": None, "optimizer": None, "tied": True}
    for targets in ("saved", "embedding"):
        with pytest.raises(
            ModicumError, match=r"adapter.config: .*(lm_head is to be trained|modules of type)"
        ) as caught:
            execute(parse(recipe(case | {"targets": targets}, models, rows)), tmp_path / targets, quiet=True)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_saved_is_what_was_trained_over_all_tables(models, rows, tmp_path):
    outcomes = []
    for number, case in enumerate(CASES):
        with pytest.MonkeyPatch.context() as patch:
            outcomes.append(check(case, models, rows, tmp_path / str(number), patch))
    # Zeroth-order optimizers refuse objectives and adapters that would do nothing beside them.
    assert outcomes.count("saved") >= len(CASES) / 2
    for key, entries in tables().items():  # no entry is refused in all of its cases
        for entry in {*entries} - {None}:
            tried = [outcome for case, outcome in zip(CASES, outcomes) if case[key] == entry]
            assert tried, (key, entry)
