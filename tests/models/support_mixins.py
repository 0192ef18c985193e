"""transformers' own tests of a model. Its wheel does not hold them, its source distribution does:

    pip install parameterized
    pip download transformers==VERSION --no-deps --no-binary transformers && tar xzf transformers-VERSION.tar.gz
    export TRANSFORMERS_SOURCE=transformers-VERSION PYTHONPATH=tests
    pytest -c /dev/null --rootdir . tests/models/*/test_*_mixins.py

Our own settings of pytest are left out, because they make errors of the unknown marks and of the warnings there. The
distribution leaves out their tests of generation; ours are beside the tests of each model.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


def common(model_class, tester):
    """Return the common tests of a model class, whose ``host`` says which tester of it they ask."""

    class Common(mixin()):
        all_model_classes = (model_class,)
        all_generative_model_classes = ()
        host = "llama"

        def setUp(self):
            self.model_tester = tester(self.host)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
            # The mixin gives labels to the models that it knows by name.
            return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})

    return Common
