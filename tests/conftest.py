"""Settings and parts that every test may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch and the tokenizers are imported: tests run side by side, one thread each, and never ask the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
from hypothesis import HealthCheck, settings

from support import byte_tokenizer, tiny_llama

# The first call into torch alone exceeds Hypothesis' default deadline.
settings.register_profile(
    "modicum", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("modicum")


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    """Refuse a test that leaves torch with other threads: later tests of its process would get other last bits."""
    torch = sys.modules.get("torch")
    before = torch and torch.get_num_threads()
    yield
    assert torch is None or torch.get_num_threads() == before


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer random Llama and a byte tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama(seed=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
