"""Objectives under TRL's trainers."""

import pytest
from datasets import Dataset
from test_objectives import Watch

from modicum.jobs.training.objective import (
    complete_knobs,
    lora_options,
    use_objective,
)
from support import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("lora", [False, True])
def test_trl_trains_packed_rows_with_meap(tmp_path, lora):
    import trl

    # TRL reads a head's weight and bias itself, and PEFT's wrapper of a trainable row around a tied head has no bias.
    model, tokenizer = tiny_llama(tie_word_embeddings=not lora), byte_tokenizer()
    watch = Watch(model)
    knobs = complete_knobs("meap", {"ratio": 0.15}, tokenizer=tokenizer, model=model)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **lora_options(knobs)))
    rows = Dataset.from_dict({"text": [f"A sentence about the number {i} and its square {i * i}." for i in range(40)]})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            packing=True,
            max_length=96,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    use_objective(trainer, "meap", **knobs)
    trainer.train()
    shares = [float((ids == 259).double().mean()) for training, ids in watch.seen if training]
    assert len(shares) == 3 and all(0.05 < share < 0.2 for share in shares)


def test_trl_trains_prompts_and_answers_with_the_masked_copies(tmp_path):
    import trl

    model, tokenizer = tiny_llama(), byte_tokenizer()
    watch = Watch(model)
    rows = [{"prompt": f"Count to {i}: ", "completion": " ".join(map(str, range(i)))} for i in range(30, 40)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    use_objective(trainer, "meap_sft")
    trainer.train()
    assert [ids.shape[0] for _, ids in watch.seen] == [4, 4]
    assert all(((ids == 259).any(-1).tolist()) == [False, True] * 2 for _, ids in watch.seen)
