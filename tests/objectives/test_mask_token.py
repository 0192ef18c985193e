from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GenerationConfig, T5Config, T5ForConditionalGeneration

from modicum.errors import CheckpointError, UnsupportedError
from modicum.objectives import drop_mask_token, ensure_mask_token, suppress_mask_token
from modicum.objectives.mask_token import check_causal
from support import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_starts_at_the_mean_and_leaves_the_rest_alone(tied):
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    mask = ensure_mask_token(model, tokenizer)
    rows = model.get_input_embeddings().weight
    assert mask == before.shape[0] == tokenizer.mask_token_id and rows.shape[0] == mask + 1 == model.config.vocab_size
    assert torch.equal(rows[:mask], before)
    torch.testing.assert_close(rows[mask], before.mean(0))
    torch.testing.assert_close(model.get_output_embeddings().weight[mask], head.mean(0))


def test_a_spare_row_is_used_before_the_model_grows():
    model = tiny_llama()  # 264 rows for 259 tokens
    assert ensure_mask_token(model, byte_tokenizer()) == 259
    assert model.get_input_embeddings().weight.shape[0] == 264


def test_a_reserved_token_is_preferred_unless_told_otherwise():
    for prefer, expected in (("reserved", "<|reserved_special_token_0|>"), ("add", "[MASK]")):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
        mask = ensure_mask_token(tiny_llama(), tokenizer, prefer=prefer)
        assert tokenizer.mask_token == expected and tokenizer.convert_tokens_to_ids(expected) == mask


def test_a_mask_token_that_is_there_is_taken():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    first = ensure_mask_token(model, tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    assert ensure_mask_token(model, tokenizer) == first
    assert torch.equal(before, model.get_input_embeddings().weight)


def test_a_normal_start_is_deterministic_and_not_the_mean():
    rows = []
    for _ in range(2):
        model = tiny_llama()
        mask = ensure_mask_token(model, byte_tokenizer(), init="normal")
        rows.append(model.get_input_embeddings().weight[mask].detach())
    assert torch.equal(*rows)
    assert not torch.allclose(rows[0], tiny_llama().get_input_embeddings().weight[:259].mean(0), atol=1e-3)


def test_dropping_restores_the_models_size_and_outputs():
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer)).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        mask = ensure_mask_token(model, tokenizer)
        drop_mask_token(model, mask_token_id=mask, rows=259)
        after = model(input_ids=ids).logits
    assert model.config.vocab_size == 259 and torch.equal(before, after)
    drop_mask_token(model, mask_token_id=100, rows=259)  # a reserved token has nothing to drop
    assert model.get_input_embeddings().weight.shape[0] == 259


def test_a_row_in_the_middle_is_not_cut():
    model = tiny_llama()
    with pytest.raises(CheckpointError, match="not the last"):
        drop_mask_token(model, mask_token_id=261, rows=260)


def test_the_mask_is_never_generated():
    model = tiny_llama().eval()
    model.get_output_embeddings().weight.data[261] *= 1000
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=[3])
    suppress_mask_token(config, mask_token_id=261)
    suppress_mask_token(config, mask_token_id=261)
    assert sorted(config.suppress_tokens) == [3, 261]
    out = model.generate(
        torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2, dtype=torch.long), generation_config=config
    )
    assert 261 not in out[0].tolist()


def test_models_that_are_not_causal_are_refused():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    bert = BertForMaskedLM(
        BertConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    for model in (t5, bert):
        with pytest.raises(UnsupportedError, match="not a causal decoder"):
            ensure_mask_token(model, byte_tokenizer())
    check_causal(tiny_llama())


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(CheckpointError, match="259 tokens, the model 200"):
        ensure_mask_token(tiny_llama(vocab_size=200), byte_tokenizer())


def test_a_config_without_suppressed_tokens_gets_a_list():
    config = SimpleNamespace(suppress_tokens=None)
    suppress_mask_token(config, mask_token_id=4)
    assert config.suppress_tokens == [4]
