"""What was imported from version 0.1.0 is still found under its old name, with a warning that tells the new one."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from modicum.moved import MOVED

# Modules and names that the documentation of version 0.1.0 told to import.
DOCUMENTED = """
modicum.evaluate.attention          attention_contrast
modicum.evaluate.matching           exact_match extract normalize
modicum.evaluate.perplexity         bits_per_byte log_likelihoods perplexity windows
modicum.evaluate.retrieval          make_items
modicum.jobs.adapters               after_backward initialize make_optimizer peft_config
modicum.jobs.answers                answer_rows
modicum.jobs.data                   DataSection LabelledLogits PaddingCollator Rows collate load_rows tokenize
modicum.jobs.hooks                  bad_batches fault_callback gradient_callback read_clipping_log ClippingLog
modicum.jobs.models                 load_model load_tokenizer resolve_model cache_folder check_weights fresh_model
modicum.jobs.objectives             complete_knobs lora_options use_objective
modicum.jobs.serving                export_adapter
modicum.jobs.zeroth_order           export_lora
modicum.models.zero_token           ZeroTokenForCausalLM
modicum.objectives                  expand_sft
modicum.optim.backward              BackwardStep
modicum.optim.family                make_clipper
modicum.optim.spikes                spike_score
modicum.optim.zeroth_order          ZerothOrder
modicum.report                      write
modicum.report.html                 table
modicum.report.runs                 RunView
modicum.report.sections             Section section
modicum.weights.mergekit            plan_mergekit models_of
"""


@pytest.mark.parametrize("line", DOCUMENTED.strip().splitlines(), ids=lambda line: line.split()[0])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_was_documented_is_found_by_its_old_name(line):
    module, *names = line.split()
    for name in names:
        assert getattr(import_module(module), name) is not None


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_warns_and_gives_the_new_names(old):
    # An old name that exists would hide its line.
    assert not (Path(import_module("modicum").__path__[0]).parent / f"{old.replace('.', '/')}.py").exists()
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MOVED[old][0]) as told:
        module = import_module(old)
    assert told[0].filename.endswith("importlib/__init__.py") or told[0].filename == __file__
    for new in MOVED[old]:
        assert new not in MOVED and find_spec(new) is not None, new
        target = import_module(new)
        own = [name for name, value in vars(target).items() if getattr(value, "__module__", None) == new]
        public = [name for name in own if not name.startswith("_")]
        for name in public:
            assert hasattr(module, name) and name in dir(module)
    first = import_module(MOVED[old][0])
    for name in (name for name in vars(first) if not name.startswith("__")):
        assert getattr(module, name) is getattr(first, name)
    with pytest.raises(AttributeError, match="it moved to"):
        _ = module.nothing


def test_the_warning_names_the_line_of_the_import(tmp_path):
    (tmp_path / "mine.py").write_text("\nfrom modicum.optim.family import make_clipper\n")
    command = [sys.executable, "-W", "always::DeprecationWarning", str(tmp_path / "mine.py")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "mine.py:2: DeprecationWarning: modicum.optim.family moved to modicum.optim.gradient.make." in told


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_name_that_was_never_there_is_not_found():
    for name in ("modicum.nothing", "modicum.optim.nothing", "modicum.jobs.models.nothing"):
        with pytest.raises(ModuleNotFoundError):
            import_module(name)


def test_an_old_module_does_not_hide_the_function_of_its_name():
    code = "import modicum.evaluate.perplexity; from modicum.evaluate import perplexity; perplexity.__code__"
    subprocess.run([sys.executable, "-c", code], check=True)
