"""transformers' own tests of a model, on the routed one of five hosts: ``tests/models/support_mixins.py`` tells how."""

import unittest

import torch

from models.routed.support_routed import HOSTS, prompts
from models.support_mixins import common
from modicum.models import RoutedConfig, RoutedForCausalLM


class Tester:
    """What the mixin asks of a model's own tester."""

    batch_size, seq_length, is_training = 2, 7, True
    hidden_size, num_attention_heads, num_hidden_layers = 16, 4, 3

    def __init__(self, host):
        self.host = {"model_type": host, **HOSTS[host], "pad_token_id": 0}

    def prepare_config_and_inputs_for_common(self):
        ids = prompts(2, 7)
        return RoutedConfig(host=self.host), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(common(RoutedForCausalLM, Tester)):
    # Three layers, of which a tap and routes before and behind it need one each.
    test_num_layers_is_small = None
    # Refused in one line, by tests of our own: other vocabularies, no folder, a file that was changed.
    test_resize_tokens_embeddings = None
    test_resize_embeddings_untied = None
    test_resize_embeddings_untied_no_reinit_on_post_init = None
    test_resize_position_vector_embeddings = None
    test_from_pretrained_no_checkpoint = None
    test_model_weights_reload_no_missing_tied_weights = None


class TestLlama(Common, unittest.TestCase):
    """The common tests."""


class TestGPT2(Common, unittest.TestCase):
    """The common tests."""

    host = "gpt2"


class TestQwen2(Common, unittest.TestCase):
    """The common tests."""

    host = "qwen2"


class TestQwen3(Common, unittest.TestCase):
    """The common tests."""

    host = "qwen3"


class TestMistral(Common, unittest.TestCase):
    """The common tests."""

    host = "mistral"
