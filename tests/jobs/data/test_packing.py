"""Packed samples never see each other: on every architecture they are kept apart, or training is refused."""

import json

import pytest
import torch

from modicum.errors import UnsupportedError
from modicum.jobs import execute
from modicum.jobs.data.packing import BlockMask, isolating, trouble
from modicum.jobs.data.rows import collate
from modicum.recipe import parse
from modicum.record import read_record
from support import byte_tokenizer, tiny_llama

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
BY_POSITION = {
    "deepseek_v3": {
        **LATENT,
        "q_lora_rank": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "glm4": {"head_dim": 8, "pad_token_id": 0},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"sliding_window": 4, "head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "cohere": {},
    "granite": {},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {"pad_token_id": 0},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt2": GPT,
    "ctrl": GPT | {"dff": 64},
    "gpt_bigcode": GPT,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 8},
    "codegen": {**GPT, "rotary_dim": 4},
    "falcon": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
}
BY_MASK = {
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "biogpt": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
}
REFUSED = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "rwkv": {"attention_hidden_size": 32},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1],
    },
    "nemotron_h": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "adapter_rank": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "falcon_mamba": {"state_size": 8},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "openai-gpt": GPT,
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True},
    "xlstm": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "head_dim": 8},
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 8,
    },
}
IDS = list(range(5, 34))


def made(kind, extra):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if kind != "xlnet" or key != "max_position_embeddings"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | extra))
    return model.float().train()


def packed(first, second):
    places = [*range(len(first)), *range(len(second))]
    return {"input_ids": [*first, *second], "labels": [*first, *second], "position_ids": places}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits


@pytest.mark.parametrize(("kind", "extra"), [*BY_POSITION.items(), *BY_MASK.items()])
def test_packed_samples_have_the_logits_of_samples_alone(kind, extra):
    model, plain = made(kind, extra), collate(byte_tokenizer())
    collator = isolating(model, plain, ids=IDS, max_length=20)
    assert model.training and isinstance(collator, BlockMask) == (kind in BY_MASK)
    one, other = IDS[:11], IDS[20:29]
    # The shorter row is padded: padding is no neighbour either.
    together = logits(model, collator([packed(one, other), packed(other, one[:3])]))
    for row, start, sample in ((0, 0, one), (0, 11, other), (1, 0, other), (1, 9, one[:3])):
        alone = logits(model, {"input_ids": torch.tensor([sample]), "use_cache": False})[0]
        torch.testing.assert_close(together[row, start : start + len(sample)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "extra"), REFUSED.items())
def test_a_model_whose_samples_see_each_other_is_refused_with_the_way_out(kind, extra):
    with pytest.raises(UnsupportedError, match=f"with {kind} .* Set packing: false"):
        isolating(made(kind, extra), collate(byte_tokenizer()), ids=IDS, max_length=20)


def test_a_mask_does_not_replace_a_sliding_window():
    model = made("gpt_oss", BY_MASK["gpt_oss"] | {"sliding_window": 16})
    isolating(model, collate(byte_tokenizer()), ids=IDS, max_length=16)
    with pytest.raises(UnsupportedError, match="gpt_oss"):
        isolating(model, collate(byte_tokenizer()), ids=IDS, max_length=17)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_tells_a_leak_in_every_precision(attention, dtype):
    model = tiny_llama(attn_implementation=attention).to(dtype)
    plain = collate(byte_tokenizer())
    assert trouble(model, plain, ids=IDS) is trouble(model, BlockMask(plain, dtype), ids=IDS) is None
    # A batch without positions is one sample.
    leaking = lambda rows: {k: v for k, v in plain(rows).items() if k != "position_ids"}  # noqa: E731
    assert "see each other" in trouble(model, leaking, ids=IDS)


def test_rounding_is_no_leak_and_a_faint_leak_is_none_the_less():
    class Noisy(torch.nn.Module):
        """Logits that depend on the whole row by their rounding, or truly."""

        def __init__(self, leak):
            super().__init__()
            self.leak, self.embedding, self.device = leak, torch.nn.Embedding(100, 4), "cpu"
            self.dtype = torch.float32

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, **_):
            hidden = self.embedding(input_ids)
            noise = hidden.sum() * 1e-5
            return type("Output", (), {"logits": hidden + (noise if self.leak else noise.detach())})

    assert trouble(Noisy(leak=False), collate(byte_tokenizer()), ids=IDS) is None
    assert "see each other" in trouble(Noisy(leak=True), collate(byte_tokenizer()), ids=IDS)


def test_a_model_that_reads_packed_rows_in_another_sense_is_told_although_it_keeps_samples_apart():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.device, self.dtype = torch.nn.Embedding(100, 4), "cpu", torch.float32

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, position_ids=None, **_):
            share = 1.0 if position_ids is None else 0.9
            return type("Output", (), {"logits": share * self.embedding(input_ids)})

    assert "other logits than the same sample alone" in trouble(Other(), collate(byte_tokenizer()), ids=IDS)


def test_an_error_of_the_model_is_told_and_not_called_a_leak():
    model = tiny_llama()
    model.config.sliding_window = 4  # leaves the second way out
    model.forward = None
    with pytest.raises(UnsupportedError, match="does not take a packed row .TypeError: .*Set packing: false"):
        isolating(model, collate(byte_tokenizer()), ids=IDS, max_length=20)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": "ab"}) for i in range(12)))
    return {"path": str(path), "max_length": 40, "packing": True}


def run(tmp_path, kind, extra, data):
    model = made(kind, extra | {"vocab_size": 264})
    model.save_pretrained(tmp_path / kind)
    byte_tokenizer().save_pretrained(tmp_path / kind)
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True}
    recipe = parse({"job": "train", "model": str(tmp_path / kind), "data": data, "trainer": trainer})
    execute(recipe, tmp_path / f"run-{kind}", quiet=True)
    return read_record(tmp_path / f"run-{kind}")


@pytest.mark.parametrize(("kind", "masked"), [("qwen2", False), ("opt", True)])
def test_a_run_trains_under_the_mask_and_says_so(tmp_path, rows, kind, masked, monkeypatch):
    from modicum.jobs.training import trainer

    build, collators = trainer.build_trainer, []

    def watched(asked):
        collators.append(asked.data_collator)
        return build(asked)

    monkeypatch.setattr(trainer, "build_trainer", watched)
    record = run(tmp_path, kind, (BY_POSITION | BY_MASK)[kind], rows)
    assert any("keeps packed samples apart with a mask" in note for note in record["notes"]) == masked
    batch = collators[0]([packed(IDS[:5], IDS[5:9])])
    assert (batch.get("attention_mask") is not None) == masked


def test_a_run_on_a_model_that_leaks_ends_before_it_begins(tmp_path, rows):
    with pytest.raises(UnsupportedError, match="mamba .* Set packing: false"):
        run(tmp_path, "mamba", REFUSED["mamba"], rows)
    run(tmp_path, "mamba", REFUSED["mamba"], rows | {"packing": False})


def test_other_jobs_that_feed_packed_rows_to_a_model_try_it_too(rows):
    from modicum.jobs.data.batches import load_batches
    from modicum.jobs.data.section import DataSection

    section, tokenizer = DataSection(**rows), byte_tokenizer()
    fed = {"batch_size": 2, "seed": 0}
    masked = load_batches(section, tokenizer, model=made("opt", BY_MASK["opt"] | {"vocab_size": 264}), **fed)
    assert masked[0]["attention_mask"].dim() == 4
    with pytest.raises(UnsupportedError, match="mamba"):
        load_batches(section, tokenizer, model=made("mamba", REFUSED["mamba"] | {"vocab_size": 264}), **fed)
