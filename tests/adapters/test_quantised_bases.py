"""HRP on quantised bases, whose numbers it never reads: 8 bits of our own, and bitsandbytes where it is installed."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from modicum.adapters import Preheat, get_hrp_state_dict, initialize_lora_hrp_weights
from modicum.adapters.layers import factors_of, lora_layers
from modicum.errors import UnsupportedError
from modicum.jobs.training.adapter import initialize
from modicum.random import generator
from support import tiny_llama


class Int8Linear(nn.Linear):
    """A linear whose weight is stored as 8-bit integers with a scale for each row."""

    @classmethod
    def of(cls, linear):
        made = cls(linear.in_features, linear.out_features, bias=False)
        made.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        made.weight = nn.Parameter((linear.weight.detach() / made.scale).round().to(torch.int8), requires_grad=False)
        return made

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def bitsandbytes_linear(bits):
    bnb = pytest.importorskip("bitsandbytes")

    def of(linear):
        if bits == 4:
            made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
        else:
            made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
        return made.to("cpu")

    return of


def quantised(kind):
    make = Int8Linear.of if kind == "int8" else bitsandbytes_linear(4 if kind == "nf4" else 8)
    model = tiny_llama().eval()
    for name, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, own = name.rpartition(".")
            setattr(model.model.get_submodule(parent), own, make(module))
    return model


def stored(model):
    """The bytes of everything that is not an adapter's."""
    return {
        key.replace(".base_layer", ""): value.clone()
        for key, value in model.state_dict().items()
        if "lora_" not in key and isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("kind", ["int8", "nf4", "llm.int8"])
def test_hrp_starts_from_a_quantised_base_and_leaves_its_bytes_alone(kind, tmp_path):
    ids = torch.randint(3, 264, (4, 2, 12), generator=generator(0, "batches"))
    model = get_peft_model(quantised(kind), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    expected, before = model(ids[0]).logits, stored(model)
    assert any(not value.is_floating_point() for value in before.values())
    config = Preheat(preheat_rank=12, preheat_steps=4)
    state = get_hrp_state_dict(model, [{"input_ids": x, "labels": x} for x in ids], lr=1e-2, config=config)
    assert initialize_lora_hrp_weights(model, state) == []
    after = stored(model)
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(model.eval()(ids[0]).logits, expected)
    for layer in lora_layers(model).values():
        A, B = (factor.detach() for factor in factors_of(layer, "default"))
        assert not B.any() and torch.allclose(A @ A.T, torch.eye(4) / 3, atol=1e-5)
        B.copy_(torch.ones_like(B))
    trained = model(ids[0]).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(kind), tmp_path).eval()
    torch.testing.assert_close(loaded(ids[0]).logits, trained)
    with pytest.raises(UnsupportedError, match="is quantised"):
        initialize(model, "pissa", {}, batches=list, lr=1e-3)
