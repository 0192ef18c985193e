"""transformers' own tests of a model, on the routed one of five hosts. Its wheel does not hold them, its source
distribution does; see ``tests/models/zero_token/test_zero_mixins.py`` for how they are run. The distribution leaves out
their tests of generation; ours are beside this file.
"""

import os
import unittest

import pytest
import torch

from models.routed.support_routed import HOSTS, prompts
from modicum.models import RoutedConfig, RoutedForCausalLM

if "TRANSFORMERS_SOURCE" not in os.environ:
    pytest.skip("TRANSFORMERS_SOURCE names no source distribution of transformers", allow_module_level=True)

from models.zero_token.test_zero_mixins import mixin


class Tester:
    """What the mixin asks of a model's own tester."""

    batch_size, seq_length, is_training = 2, 7, True
    hidden_size, num_attention_heads, num_hidden_layers = 16, 4, 3

    def __init__(self, host):
        self.host = {"model_type": host, **HOSTS[host], "pad_token_id": 0}

    def prepare_config_and_inputs_for_common(self):
        ids = prompts(2, 7)
        return RoutedConfig(host=self.host), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(mixin()):
    all_model_classes = (RoutedForCausalLM,)
    all_generative_model_classes = ()
    host = "llama"

    def setUp(self):
        self.model_tester = Tester(self.host)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        # The mixin gives labels to the models that it knows by name.
        return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})

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
