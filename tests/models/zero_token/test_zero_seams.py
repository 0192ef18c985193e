"""The looped model inside other people's tools."""

import copy
import sys

import pytest
import torch
from transformers import DynamicCache

from models.zero_token.support_zero import base_model, looped, tokens
from modicum.models import ZeroTokenForCausalLM, convert_to_zero_token
from modicum.models.__main__ import main as hand_over
from pairs import in_two_processes


def loss_of(model):
    return model(input_ids=tokens(), labels=tokens(), use_cache=False).loss


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_lora_and_the_pool_train_together_through_peft(host, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = ["c_attn"] if host == "gpt2" else ["q_proj", "v_proj"]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["zero_token"], fan_in_fan_out=host == "gpt2")
    model = get_peft_model(looped(host), config).train()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("zero_key" in n for n in trained)
    assert all("lora_" in n or "zero_token" in n for n in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = loss_of(model).item()
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    model.eval()
    after = loss_of(model)
    assert after.item() != before
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(looped(host), tmp_path).eval()
    torch.testing.assert_close(loss_of(again), after)
    assert not torch.equal(again.base_model.model.zero_token()["zero_key"], looped(host).zero_token()["zero_key"])
    assert again.generate(input_ids=tokens(), max_new_tokens=3, pad_token_id=0).shape[1] <= 10


def test_the_pool_alone_trains_through_peft():
    model = looped(cycle_gate="rezero", zero_bias=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("zero_token."))
    loss_of(model.train()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "zero_token.zero_key",
        "zero_token.zero_bias",
        "zero_token.cycle_gate",
    }


def trainer_of(model, folder, **arguments):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    rows = tokens(16, 12).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "seed": 0}
    settings |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "logging_strategy": "no"} | arguments
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=data,
        data_collator=default_data_collator,
    )


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_the_unchanged_trainer_trains_saves_and_resumes(arguments, tmp_path):
    whole = looped("llama-tied-bias")
    trainer_of(whole, tmp_path / "whole", **arguments).train()
    again = looped("llama-tied-bias")
    trainer_of(again, tmp_path / "again", **arguments).train(
        resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2")
    )
    assert not torch.equal(whole.zero_token.zero_key, looped("llama-tied-bias").zero_token.zero_key)
    for (name, a), b in zip(whole.named_parameters(), again.parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_a_compiled_pass_is_the_plain_one():
    model = looped(host_overrides={"num_hidden_layers": 2}, n_head=0, n_cycles=2)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(got, model(tokens(), use_cache=False).logits)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"zero_token": False}])
def test_a_decoding_step_compiles_as_one_graph(knobs):
    model = looped(host_overrides={"num_hidden_layers": 3}, **knobs)
    step, cache, found = torch.compile(model, backend="eager", fullgraph=True), DynamicCache(config=model.config), []
    with torch.no_grad():
        model(tokens()[:, :4], cache=cache, use_cache=True)
        for i in range(4, 7):
            found.append(step(input_ids=tokens()[:, i : i + 1], cache=cache, use_cache=True).logits)
        want = model(tokens(), use_cache=False).logits[:, 4:]
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-4, rtol=0)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"zero_key_rope": "relative"}])
def test_compiled_and_plain_agree_in_loss_and_gradient(knobs):
    plain = looped(host_overrides={"num_hidden_layers": 2}, n_head=0, n_cycles=2, **knobs).train()
    compiled = copy.deepcopy(plain)
    # aot_eager traces forward and backward like the default backend, without its C++ compiler.
    loss = torch.compile(compiled, backend="aot_eager")(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    reference = loss_of(plain)
    reference.backward()
    torch.testing.assert_close(loss, reference)
    for a, b in zip(compiled.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_bfloat16_training_has_finite_gradients():
    model = convert_to_zero_token(base_model().bfloat16()).train()
    loss_of(model).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def _sharded(rank, folder):
    from torch.distributed._composable.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = looped().train()
    for i, layer in enumerate(model.layers):
        # A looped layer stays gathered from its first cycle to its last.
        fully_shard(layer, mesh=mesh, reshard_after_forward=i not in model.config.middle)
    fully_shard(model, mesh=mesh)
    rows = tokens(4)[2 * rank : 2 * rank + 2]
    loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")


def test_two_sharded_processes_have_the_gradients_of_one(tmp_path):
    in_two_processes(_sharded, tmp_path)
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = looped().train()
    model(input_ids=tokens(4), labels=tokens(4), use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_loading_keeps_the_class_under_the_auto_names(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    looped("qwen3").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "zero_token"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert isinstance(model, ZeroTokenForCausalLM)
    assert model.config._attn_implementation == "eager"
    assert model(tokens(), output_attentions=True).attentions[0] is not None


SHOW = """import sys
from transformers import AutoConfig

print(AutoConfig.from_pretrained(sys.argv[1]).model_type, __name__)
"""


def test_another_tool_gets_the_rest_of_the_line(tmp_path, monkeypatch, capsys):
    looped().save_pretrained(tmp_path / "model")
    (tmp_path / "show_kind.py").write_text(SHOW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modicum.models", "show_kind", str(tmp_path / "model")])
    hand_over()
    assert capsys.readouterr().out == "zero_token __main__\n"
    monkeypatch.setattr(sys, "argv", ["modicum.models"])
    with pytest.raises(SystemExit, match="Usage"):
        hand_over()
