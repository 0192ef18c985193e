"""The loss over pairs is TRL's, at the first step and after twenty, on three seeds."""

import json

import pytest
from datasets import Dataset

from modicum.jobs import execute
from modicum.recipe import parse
from modicum.record import read_log
from support import byte_tokenizer, tiny_llama

TRAINER = {
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
}


@pytest.mark.parametrize(
    ("seed", "theirs", "ours"),
    [
        (0, {"loss_type": ["sigmoid"]}, {}),
        (1, {"loss_type": ["sigmoid"], "beta": 0.5}, {"beta": 0.5}),  # it does not smooth the labels of this loss
        (2, {"loss_type": ["hinge"]}, {"variant": "hinge"}),
    ],
)
def test_the_losses_are_those_of_trl(seed, theirs, ours, tmp_path, monkeypatch):
    import trl

    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    # Without a chat template both end an answer with the end-of-text token and nothing after it. One batch is all.
    tiny_llama(seed=seed).save_pretrained(tmp_path / "model")
    byte_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "chosen": " abc" * (1 + i), "rejected": " xyz" * (3 - i % 2)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {"job": "train", "model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl")}
    run = execute(
        parse(recipe | {"objective": {"name": "dpo"} | ours, "trainer": TRAINER}), tmp_path / "run", quiet=True
    )
    peer = trl.DPOTrainer(
        model=tiny_llama(seed=seed),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            precompute_ref_log_probs=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            **TRAINER,
            **theirs,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(chat=False),
    )
    peer.train()
    expected = [line["loss"] for line in peer.state.log_history if "loss" in line]
    found = [line["loss"] for line in read_log(run.folder, "train")]
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found == pytest.approx(expected, abs=1e-3) and found[-1] < 0.5 * found[0]
