"""transformers' own tests of a model, on the looped one of five hosts: ``tests/models/support_mixins.py`` tells how."""

import unittest

import torch

from models.support_mixins import common
from models.zero_token.support_zero import ALL_HOSTS, tokens
from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM


class Tester:
    """What the mixin asks of a model's own tester."""

    batch_size, seq_length, is_training = 2, 7, True
    hidden_size, num_attention_heads, num_hidden_layers = 16, 4, 8  # visits

    def __init__(self, host):
        self.host = ALL_HOSTS[host] | {"initializer_range": 0.02}

    def prepare_config_and_inputs_for_common(self):
        config = ZeroTokenConfig(host=self.host, n_cycles=3, zero_key_init_std=0.02)
        return config, {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


class Common(common(ZeroTokenForCausalLM, Tester)):
    # Four layers are the fewest with a head, a tail and two that are looped.
    test_num_layers_is_small = None
    # The host's configuration gives sizes. How attention is computed stands in the looped model's own.
    test_can_set_attention_dynamically = None
    test_config_attn_implementation_setter = None


class TestLlama(Common, unittest.TestCase):
    """The common tests."""


class TestGPT2(Common, unittest.TestCase):
    """The common tests."""

    host = "gpt2"


class TestQwen3(Common, unittest.TestCase):
    """The common tests."""

    host = "qwen3"


class TestOlmo2(Common, unittest.TestCase):
    """The common tests."""

    host = "olmo2"


class TestGPTNeoX(Common, unittest.TestCase):
    """The common tests."""

    host = "gpt_neox"
