"""What is not used is not imported: neither torch by a command that lists, nor an optimiser by a recipe without it."""

import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest

FACES = (
    "modicum.optim", "modicum.adapters", "modicum.evaluate", "modicum.evaluate.judges", "modicum.jobs.chat",
    "modicum.objectives", "modicum.safety", "modicum.safety.data", "modicum.safety.losses",
    "modicum.safety.representation", "modicum.submodular",
)  # fmt: skip
# Modules of ours that a run with `gradient: adagc` may import, apart from training parts: those are all imported, to
# know what a recipe may say, and import their engines only when they are used; so are kinds of rows.
MOST = 72  # of its own modules; some hash, commit, guard borders, rehearse, watch losses and check what was saved
PARTS = ("modicum.jobs.training.parts.", "modicum.jobs.data.kinds.")

TRAIN = """
import json, sys
from modicum.jobs import execute
from modicum.recipe import parse
execute(parse(json.loads(sys.argv[1])), sys.argv[2], quiet=True)
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "modicum")))
"""


def loaded(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["modicum", "modicum.jobs", "modicum.report", "modicum.references", *FACES])
def test_importing_a_package_imports_no_framework(package):
    code = f"import sys, {package}; print(sorted({{'torch', 'transformers', 'peft', 'datasets'}} & set(sys.modules)))"
    assert loaded(code) == "[]"


@pytest.mark.parametrize("package", FACES)
def test_a_face_offers_what_it_lists(package):
    face = import_module(package)
    assert set(face.__all__) <= set(dir(face))
    for name in face.__all__:
        assert getattr(face, name) is getattr(face, name)
        assert not inspect.ismodule(getattr(face, name)), name
    assert set(face._homes) == set(face.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = face.nothing


def test_a_function_is_not_hidden_by_a_module_of_its_name():
    code = (
        "import modicum.objectives.collator, modicum.evaluate.measures.perplexity as module;"
        "import modicum.evaluate, types; modicum.evaluate.perplexity = module;"
        "from modicum.evaluate import perplexity; print(isinstance(perplexity, types.FunctionType))"
    )
    assert loaded(code) == "True"


def test_a_recipe_with_a_gradient_rule_imports_no_other_mechanism(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say", "completion": "abc"}\n' * 4)
    recipe = {
        "job": "train",
        "model": str(tiny_model),
        "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 32},
        "gradient": "adagc",
        "trainer": {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"},
    }
    names = json.loads(loaded(TRAIN, json.dumps(recipe), str(tmp_path / "run")))
    others = ("modicum.optim.zeroth_order", "modicum.models", "modicum.adapters", "modicum.weights", "modicum.report")
    assert not [name for name in names if name.startswith(others)]
    counted = [name for name in names if not name.startswith(PARTS)]
    assert "modicum.optim.gradient.adagc" in names and len(counted) <= MOST, "\n".join(counted)


def test_a_looped_model_is_known_to_the_auto_classes_once_its_package_is_imported():
    code = "import modicum.models, transformers; print(transformers.AutoConfig.for_model('zero_token').model_type)"
    assert loaded(code) == "zero_token"
