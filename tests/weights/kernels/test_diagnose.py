from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.weights import merge
from modicum.weights.kernels.diagnose import diagnose
from modicum.weights.methods import task_arithmetic
from modicum.weights.methods.tsv import task_interference
from weights.conftest import MakeFamily, statistics_of
from weights.test_merging import REQUIRED, number_of_experts

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_what_is_diagnosed_is_true() -> None:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(12, 20, generator=rng)
    line = torch.outer(torch.ones(12), torch.ones(20))
    other = torch.randn(12, 20, generator=rng)
    merged = base + line
    found = diagnose(base, [base + line, base + other, base], merged, merged, directions=True)
    assert found["spectra"][0][0] == pytest.approx(240**0.5, rel=1e-5)
    assert found["spectra"][0][1:] == pytest.approx([0.0] * 7, abs=1e-4)
    assert found["spectra"][1] == pytest.approx(torch.linalg.svdvals(other)[:8].tolist(), rel=1e-4)
    assert found["energy_ranks"][0] == 1
    assert found["energy_ranks"][2] == 0
    held = torch.linalg.svdvals(other).square().cumsum(0) / other.square().sum()
    assert found["energy_ranks"][1] == int((held < 0.9).sum()) + 1
    expected = task_interference([line, other, torch.zeros(12, 20)])
    assert found["interference"] == pytest.approx(expected, rel=1e-4)
    assert found["survival"] == 1
    assert found["cast_error"] == 0


def test_an_expert_without_a_change_interferes_with_nobody() -> None:
    delta = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert task_interference([delta, torch.zeros(8, 8)], rank=2) == pytest.approx(0, abs=1e-6)


def test_outliers_are_counted_by_their_magnitude() -> None:
    delta = torch.cat([torch.ones(99), torch.tensor([-101.0])])
    found = diagnose(torch.zeros(100), [delta], delta, delta, directions=False)
    assert found["outliers"] == pytest.approx([101 / 200])
    assert "spectra" not in found


def test_small_changes_do_not_survive_bfloat16() -> None:
    rng = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(200, 200, generator=rng)).bfloat16()
    expert = base.float() + 1e-4 * torch.randn(200, 200, generator=rng)
    merged = task_arithmetic(base.float(), [expert])
    found = diagnose(base, [expert], merged, merged.bfloat16(), directions=False)
    assert 0.5 < found["survival"] < 0.8
    assert 0.2 < found["cast_error"] < 0.5
    whole = diagnose(base, [expert], merged, merged, directions=False)
    assert whole["survival"] == 1
    assert whole["cast_error"] == 0


@pytest.mark.parametrize("method", list(merge_method))
def test_diagnostics_change_no_byte(make_family: MakeFamily, tmp_path: Path, method: str) -> None:
    base, experts = make_family(number_of_experts(method))
    knobs = REQUIRED.get(method, {}) | statistics_of(method, experts)
    plain = merge(base, experts, tmp_path / "plain", method=method, **knobs)
    if method == "passthrough":  # a model taken as it is has no difference that could be lost
        experts = experts[:1]
    told = merge(base, experts, tmp_path / "told", method=method, diagnostics=True, **knobs)
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "told/model.safetensors").read_bytes()
    assert "outliers" not in plain[Q_PROJ]
    assert len(told[Q_PROJ]["spectra"]) == len(told[Q_PROJ]["outliers"]) == len(experts)
    assert "spectra" not in told["model.embed_tokens.weight"]
    assert 0 <= told["model.embed_tokens.weight"]["survival"] <= 1


def test_methods_that_choose_say_what_they_chose(make_family: MakeFamily, tmp_path: Path) -> None:
    base, experts = make_family(2)
    told = merge(base, experts, tmp_path / "out", method="resm", ranks="uniform", outliers="count", sigmas=1.0)
    chosen = told[Q_PROJ]
    assert chosen["ranks"] == [3, 3]
    assert sum(chosen["weights"]) == pytest.approx(2)
    assert 0 < chosen["kept"] <= 1
    assert 0 < chosen["weakest"] <= 1
    assert "ranks" not in told["model.norm.weight"]
    twins = merge(base, [experts[0], experts[0]], tmp_path / "twins", method="tsv")
    assert twins[Q_PROJ]["kept"] == 0.5  # of two equal subspaces one is left


def test_diagnostics_need_a_base(make_family: MakeFamily, tmp_path: Path) -> None:
    _, experts = make_family(2)
    with pytest.raises(RecipeError, match="measures differences from a base model, and none is given"):
        merge(None, experts, tmp_path / "out", method="linear", diagnostics=True)
    assert not (tmp_path / "out").exists()
