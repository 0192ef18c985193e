"""The loss over pairs is TRL's, at the first step and after twenty: variants, an adapter, batches, long prompts."""

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
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
}


@pytest.mark.parametrize(
    ("seed", "theirs", "ours", "batch", "prompt", "lora"),
    [
        (0, {"loss_type": ["sigmoid"]}, {}, 4, 0, False),
        (1, {"loss_type": ["sigmoid"], "beta": 0.5}, {"beta": 0.5}, 4, 0, False),
        (2, {"loss_type": ["hinge"]}, {"variant": "hinge"}, 4, 0, False),
        # TRL's takes means over tokens.
        (0, {"loss_type": ["ipo"]}, {"variant": "ipo", "length_normalised": True}, 4, 0, False),
        # Its sigmoid does not smooth labels; "aot" does, and on a batch of one pair it is the sigmoid.
        (1, {"loss_type": ["aot"], "label_smoothing": 0.2}, {"label_smoothing": 0.2}, 1, 0, False),
        (0, {"loss_type": ["sigmoid"]}, {}, 2, 190, True),
    ],
)
def test_the_losses_are_those_of_trl(seed, theirs, ours, batch, prompt, lora, tmp_path, monkeypatch):
    import trl

    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    # Without a chat template both end an answer with the end-of-text token and nothing after it.
    tiny_llama(seed=seed).save_pretrained(tmp_path / "model")
    byte_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"say {i} " + "so " * (prompt // 3), "chosen": " abc" * (1 + i), "rejected": " xyz" * (3 - i % 2)}
        for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer = TRAINER | {"per_device_train_batch_size": batch, "learning_rate": 1e-2 if lora else 1e-3}
    recipe = {"job": "train", "model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl")}
    recipe |= {"objective": {"name": "dpo"} | ours, "trainer": trainer} | ({"adapter": {"rank": 4}} if lora else {})
    run = execute(parse(recipe), tmp_path / "run", quiet=True)
    peer_model = tiny_llama(seed=seed)
    if lora:  # a step of length 0 leaves the adapter with which both begin
        from peft import PeftModel

        idle = trainer | {"max_steps": 1, "learning_rate": 0.0}
        start = execute(parse(recipe | {"trainer": idle}), tmp_path / "start", quiet=True)
        peer_model = PeftModel.from_pretrained(peer_model, start.folder / "adapter", is_trainable=True)
    peer = trl.DPOTrainer(
        model=peer_model,
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            precompute_ref_log_probs=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            **trainer,
            **theirs,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(chat=False),
    )
    peer.train()
    expected = [line["loss"] for line in peer.state.log_history if "loss" in line]
    found = [line["loss"] for line in read_log(run.folder, "train")]
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-3) and min(found[-4:]) < 0.9 * found[0]
