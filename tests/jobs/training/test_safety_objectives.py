"""Safety reasoning and its baselines in training: what is learned, what is refused, and the numbers behind it."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from modicum.errors import ModicumError, RecipeError
from modicum.jobs import execute, plan
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.jobs.safety.prompts import load_guidelines
from modicum.jobs.training.contrasts import HARMFUL, BreakerLoss, ContrastCollator, LatentLoss, encode_contrasts
from modicum.jobs.training.reasoning import ReasoningLoss, SRGDataCollator, SRGTrainer, add_teacher, encode_reasoning
from modicum.objectives.latent_adversarial import latent_adversarial
from modicum.objectives.safety_reasoning import Distilling
from modicum.recipe import parse
from oracles import safety as oracle
from support import byte_tokenizer, tiny_llama

KNOBS = vars(Distilling())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    tiny_llama(max_position_embeddings=4096).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    reasons = [
        {"prompt": f"ask {i}", "completion": f"<think>\nIt is fine {i}.\nVerdict: comply\n</think>\n\nHere {i}."}
        for i in range(6)
    ]
    contrasts = [
        {"prompt": f"ask {i}", "completion": f"No, {i}.", "rejected": f"Yes {i}" if i % 2 else None,
         "kind": "illegal" if i % 3 else "helpful"}
        for i in range(6)
    ]  # fmt: skip
    for name, rows in {"reasons": reasons, "contrasts": contrasts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(files, objective, rows, **more):
    trainer = {"max_steps": 2, "per_device_train_batch_size": 3, "save_strategy": "no", "use_cpu": True}
    data = {"path": str(files / f"{rows}.jsonl"), "max_length": 256} | more.pop("data", {})
    made = {"job": "train", "model": str(files / "model"), "data": data, "objective": objective, "trainer": trainer}
    return parse(made | more)


ADAPTER = {"adapter": {"rank": 2}}
WEIGHTED = {"name": "safety_reasoning", "reasoning_loss_weight": 0.5, "loss_norm": "sequence"}
RUNS = {
    "hard": ("safety_reasoning", "reasons", {}),
    "weighted": (WEIGHTED, "reasons", ADAPTER),
    "soft": ({"name": "safety_reasoning", "distill": "soft", "top_k": 8}, "reasons", {}),
    "kept": ({"name": "safety_reasoning", "guideline_keep_prob": 1.0}, "reasons", {"data": {"max_length": 4096}}),
    "breakers": ("circuit_breakers", "contrasts", ADAPTER),
    "latent": ({"name": "latent_adversarial", "inner_steps": 2}, "contrasts", ADAPTER),
    "derta": ("derta", "contrasts", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_every_way_trains_from_a_recipe(files, tmp_path, name):
    objective, rows, more = RUNS[name]
    asked = recipe(files, objective, rows, **more, eval_data={"path": str(files / f"{rows}.jsonl"), "max_length": 4096})
    assert plan(asked)
    run = execute(asked, tmp_path / "run", quiet=True)
    assert run.record["metrics"]["steps"] == 2
    assert (run.folder / ("adapter" if more.get("adapter") else "model")).is_dir()


@pytest.mark.parametrize(
    ("objective", "rows", "more", "said"),
    [
        ("safety_reasoning", "contrasts", {}, "none of 6 rows holds reasoning"),
        ("safety_reasoning", "reasons", {"data": {"max_length": 20}}, "longer than max_length"),
        ("safety_reasoning", "reasons", {"data": {"packing": True}}, "packing"),
        ("safety_reasoning", "reasons", {"data": {"completion_only": False}}, "completion_only"),
        ({"name": "safety_reasoning", "guideline_keep_prob": 2}, "reasons", {}, "guideline_keep_prob"),
        ("circuit_breakers", "contrasts", {}, "without its adapter"),
        ("latent_adversarial", "contrasts", {}, "without its adapter"),
        ("circuit_breakers", "contrasts", {"adapter": {"rank": 2, "init": "pissa"}}, "shifts it"),
        ("circuit_breakers", "reasons", ADAPTER, "holds completion rows"),
        ("derta", "reasons", {}, "holds completion rows"),
        ("latent_adversarial", "contrasts", ADAPTER | {"optimizer": {"name": "mezo", "lr": 1e-3}}, "by gradients"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_run(files, objective, rows, more, said):
    with pytest.raises(ModicumError, match=said):
        plan(recipe(files, objective, rows, **more))


def test_words_of_the_guidelines_in_a_row_are_refused_and_long_rows_are_counted(files, tmp_path):
    words = load_guidelines()[0].text
    notes: list[str] = []
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in (files / "reasons.jsonl").read_text().splitlines()]
    rows[3]["completion"] += "x" * 400
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(path=str(path), max_length=256)
    found = encode_reasoning(load_rows(section), byte_tokenizer(), section, KNOBS, seed=0, note=notes.append)
    assert len(found) == 5 and "1 of 6 rows" in notes[0]
    for key in ("prompt", "completion"):
        bad = [dict(rows[0], **{key: f"{rows[0][key]} {words}"})]
        path.write_text(json.dumps(bad[0]) + "\n")
        with pytest.raises(RecipeError, match="words of the guidelines"):
            encode_reasoning(load_rows(section), byte_tokenizer(), section, KNOBS, seed=0, note=notes.append)


def examples(files, **knobs):
    section = DataSection(path=str(files / "reasons.jsonl"), max_length=4096)
    return encode_reasoning(load_rows(section), byte_tokenizer(), section, KNOBS | knobs, seed=0, note=lambda _: None)


@pytest.mark.oracle("objectives", "safety_reasoning")
def test_the_loss_of_a_batch_is_the_cross_entropy_of_reasoning_and_answer(files):
    model, batch = tiny_llama(max_position_embeddings=4096).eval(), SRGDataCollator(byte_tokenizer())(examples(files))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert torch.allclose(ReasoningLoss()(model, batch)[0], plain, atol=1e-6)
    weighted = ReasoningLoss(reasoning_loss_weight=0.25)(model, batch)[0].item()
    expected = oracle.weighted_cross_entropy(
        logits[:, :-1].detach().numpy(), batch["labels"][:, 1:].numpy(), batch["reasoning_mask"][:, 1:].numpy(), 0.25
    )
    assert weighted == pytest.approx(expected, abs=1e-5) and weighted != pytest.approx(plain.item(), abs=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_without_guidelines(files):
    """With the same prompt and all tokens the soft loss is zero, and so is its gradient."""
    from modicum.jobs.safety.prompts import render_teacher_prompt

    model, found = tiny_llama(max_position_embeddings=4096).eval(), examples(files)
    add_teacher(found, model, byte_tokenizer(), (), top_k=10**6)
    for example in found:  # the teacher's prompt has a contract; ask the student with the same one
        asked = render_teacher_prompt(example["asked"], (), guideline_set="none")
        text = byte_tokenizer().apply_chat_template(list(asked), tokenize=False, add_generation_prompt=True)
        start = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
        learned = [
            (t, m)
            for t, m, label in zip(example["input_ids"], example["reasoning_mask"], example["labels"])
            if label >= 0
        ]
        ids = [t for t, _ in learned]
        example |= {
            "input_ids": start + ids, "labels": [-100] * len(start) + ids,
            "attention_mask": [1] * (len(start) + len(ids)),
            "reasoning_mask": [False] * len(start) + [m for _, m in learned],
        }  # fmt: skip
    batch = SRGDataCollator(byte_tokenizer())(found)
    loss = ReasoningLoss()(model, batch)[0]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-4
    assert ReasoningLoss()(model, {k: v for k, v in batch.items() if "teacher" not in k})[0] > 1


def test_a_trainer_of_ones_own_takes_rows_as_they_are_built(tmp_path):
    row = {"prompt": [{"role": "user", "content": "ask"}], "reasoning": "Fine.\nVerdict: comply", "answer": "Here."}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SRGTrainer(
        tiny_llama(), arguments, train_dataset=[row] * 4, eval_dataset=[row], processing_class=byte_tokenizer()
    )
    trainer.train()
    assert trainer.state.global_step == 2 and math.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(RecipeError, match="tokens of a teacher"):
        SRGTrainer(tiny_llama(), arguments, train_dataset=[row], distill="soft", processing_class=byte_tokenizer())
    with pytest.raises(RecipeError, match="max_length"):
        SRGDataCollator(byte_tokenizer(), max_length=5)([row])


def contrast_batch(files):
    section = DataSection(path=str(files / "contrasts.jsonl"), max_length=256)
    found = encode_contrasts(load_rows(section), byte_tokenizer(), section, note=lambda _: None)
    return ContrastCollator(0)(found)


def adapted():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.oracle("objectives", "circuit_breakers")
@pytest.mark.parametrize("step", [0, 3, 6])
def test_breakers_begin_with_the_whole_of_the_schedule(files, step):
    """An adapter that does nothing keeps all states and turns none away, so the loss is the schedule's."""
    loss = BreakerLoss({"alpha": 10.0, "horizon": None, "layers": None})
    loss.steps, loss.step = 6, step
    batch = contrast_batch(files)
    assert loss(adapted().eval(), batch)[0].item() == pytest.approx(oracle.breakers(step, 10.0, 12)[0], rel=1e-5)
    assert batch["pairs"] == int((batch["is"] == HARMFUL).sum()) > 0
    with pytest.raises(RecipeError, match="block 9"):
        BreakerLoss({"alpha": 10.0, "horizon": 5, "layers": (9,)})(adapted(), batch)


def test_the_search_finds_a_worse_shift_within_its_ball(files):
    knobs = {
        "eps": 0.5, "inner_lr": 0.1, "inner_steps": 8, "layers": None, "toward_weight": 0.5, "away_weight": 0.5,
        "keep_weight": 0.1,
    }  # fmt: skip
    model, batch = adapted(), contrast_batch(files)
    loss, count = LatentLoss(knobs, model), batch["pairs"]
    rows = {key: batch[key][: 2 * count] for key in ("input_ids", "attention_mask", "answers")}
    shifts = loss.search(model, rows, count)
    assert all(float(shift.norm(dim=-1).max()) <= 0.5 for shift in shifts) and any(
        bool(shift.any()) for shift in shifts
    )
    outside = rows["answers"][:count] | ~rows["attention_mask"][:count].bool()
    assert all(not bool(shift[outside].any()) for shift in shifts)
    none = [torch.zeros_like(shift) for shift in shifts]

    def adversary(where):
        refusal, harm = loss._sides(model, rows, where, count)
        return latent_adversarial(*harm, *refusal).item()

    assert adversary(shifts) < adversary(none)
    value = loss(model, batch)[0]
    value.backward()
    assert value.isfinite() and any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.oracle("objectives", "latent_adversarial")
def test_the_adversarial_loss_is_its_formula():
    rng = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 5, 7, generator=rng) * 3 for _ in range(2)]
    targets = [torch.randint(0, 7, (2, 5), generator=rng) for _ in range(2)]
    targets[0][0, :2] = targets[1][1, 3:] = -100
    found = latent_adversarial(logits[0], targets[0], logits[1], targets[1], torch.tensor(2.0))
    expected = oracle.latent_adversarial(
        logits[0].numpy(), targets[0].numpy(), logits[1].numpy(), targets[1].numpy(), 2.0
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RecipeError, match="no answer"):
        nothing = torch.full((2, 5), -100)
        latent_adversarial(logits[0], nothing, logits[1], nothing)
