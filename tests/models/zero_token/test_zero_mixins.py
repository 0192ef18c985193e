"""transformers' own tests of a model, on the looped one of five hosts. Its wheel does not hold them, its source
distribution does:

    pip install parameterized
    pip download transformers==VERSION --no-deps --no-binary transformers && tar xzf transformers-VERSION.tar.gz
    export TRANSFORMERS_SOURCE=transformers-VERSION PYTHONPATH=tests
    pytest -c /dev/null --rootdir . tests/models/zero_token/test_zero_mixins.py

Our own settings of pytest are left out, because they make errors of the unknown marks and of the warnings there. The
distribution leaves out their tests of generation; ours are beside this file.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import torch

from models.zero_token.support_zero import ALL_HOSTS, tokens
from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM

if "TRANSFORMERS_SOURCE" not in os.environ:
    pytest.skip("TRANSFORMERS_SOURCE names no source distribution of transformers", allow_module_level=True)


def mixin():
    package = ModuleType("transformers_tests")
    package.__path__ = [str(Path(os.environ["TRANSFORMERS_SOURCE"]) / "tests")]
    sys.modules[package.__name__] = package
    # The distribution leaves these two out.
    for name, left_out in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = ModuleType(f"{package.__name__}.{name}")
        setattr(module, left_out, type(left_out, (), {}))
        sys.modules[module.__name__] = module
    return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


class Tester:
    """What the mixin asks of a model's own tester."""

    batch_size, seq_length, is_training = 2, 7, True
    hidden_size, num_attention_heads, num_hidden_layers = 16, 4, 8  # visits

    def __init__(self, host):
        self.host = ALL_HOSTS[host] | {"initializer_range": 0.02}

    def prepare_config_and_inputs_for_common(self):
        config = ZeroTokenConfig(host=self.host, n_cycles=3, zero_key_init_std=0.02)
        return config, {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


class Common(mixin()):
    all_model_classes = (ZeroTokenForCausalLM,)
    all_generative_model_classes = ()
    host = "llama"

    def setUp(self):
        self.model_tester = Tester(self.host)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        # The mixin gives labels to the models that it knows by name.
        return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})

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
