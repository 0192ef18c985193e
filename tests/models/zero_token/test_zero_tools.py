"""Looped models inside the tools that people train and measure with, each as its users call it.

Tests of a tool that is not installed are skipped: ``pip install trl peft lm-eval``.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.zero_token.support_zero import looped, tokens
from modicum.jobs.loading.models import load_tokenizer

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": "none"} for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:byte-llama")


def model_of(**knobs):
    return looped(host_overrides={"vocab_size": 264, "max_position_embeddings": 128}, **knobs)


def arguments(kind, folder, **more):
    common = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": True}
    common |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return kind(output_dir=str(folder), **common | more)


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("knobs", [{"exit_threshold": 0.1, "train_cycles": "random"}])
def test_trl_fine_tunes(knobs, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = model_of(**knobs)
    before = snapshot(model)
    rows = Dataset.from_list([{"text": f"{i} is less than {i + 1}."} for i in range(8)])
    settings = arguments(trl.SFTConfig, tmp_path, max_length=32, packing=True, gradient_checkpointing=True)
    trainer = trl.SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert "zero_token.zero_key" in moved(model, before)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trl_learns_from_preferences(adapter, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["zero_token"]) if adapter else None
    model_of().save_pretrained(tmp_path / "model")  # the reference is loaded from where the model came from
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = arguments(trl.DPOConfig, tmp_path, max_length=32, beta=0.1)
    trainer = trl.DPOTrainer(
        model, args=settings, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer, peft_config=config
    )
    before = snapshot(trainer.model)
    trainer.train()
    changed = moved(trainer.model, before)
    assert any("zero_key" in name for name in changed)
    assert all("lora" in name or "zero_token" in name for name in changed) is adapter


@pytest.mark.slow
def test_trl_learns_from_rewards(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = model_of(exit_threshold=0.1)
    before = snapshot(model)
    settings = arguments(
        trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=6, gradient_checkpointing=True
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(8)]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert "zero_token.zero_key" in moved(model, before)


def test_a_pipeline_generates(tokenizer):
    from transformers import pipeline

    model = model_of(exit_threshold=0.1)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    out = run(["1+1=", "a longer prompt"], max_new_tokens=4, do_sample=False, batch_size=2, pad_token_id=0)
    assert [x[0]["generated_text"].startswith(p) for x, p in zip(out, ["1+1=", "a longer prompt"])] == [True, True]
    short = run("1+1=", max_new_tokens=4, do_sample=False, assistant_early_exit=1, pad_token_id=0)
    assert short[0]["generated_text"] == run("1+1=", max_new_tokens=4, do_sample=False)[0]["generated_text"]


def test_lm_eval_measures(tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = model_of(exit_threshold=0.1)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    asked = [Instance("loglikelihood", {}, ("1+1=", " 2"), i) for i in range(3)]
    (nats, _), *_ = harness.loglikelihood(asked, disable_tqdm=True)
    ids = tokenizer("1+1= 2", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)
    want = sum(float(logits[0, i - 1, ids[0, i]]) for i in range(len(ids[0]) - 2, len(ids[0])))
    assert nats == pytest.approx(want, abs=1e-3)


def test_tools_that_look_for_the_class_fall_back_to_the_auto_class(tmp_path):
    trl = pytest.importorskip("trl.trainer.utils")
    model = model_of()
    model.save_pretrained(tmp_path)
    found = trl.create_model_from_path(str(tmp_path))
    assert type(found) is type(model) and "auto_map" not in (tmp_path / "config.json").read_text()


def test_peft_merges_into_the_looped_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["zero_token"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "zero_key" in name:
                parameter.add_(0.3)
        want = model(input_ids=tokens()).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens()).logits, want, atol=1e-4, rtol=0)
    assert type(merged) is type(model_of())
