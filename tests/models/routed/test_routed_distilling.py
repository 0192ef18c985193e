"""The sizes of one-bit experts, fitted to the logits of the whole fine-tunes."""

import pytest
import torch

from models.routed.support_routed import experts_of, host, prompts, routed
from modicum.errors import RecipeError
from modicum.models.routed import distilling
from modicum.models.routed.build import fill_host, route_experts
from modicum.models.routed.distilling import distil_scales
from modicum.weights.experts import ExpertSet


def parts(kind="llama", expert=1):
    """A routed model, the whole fine-tune of one expert, and texts of two lengths."""
    model, teacher = routed(kind, router=False), host(kind)
    fill_host(teacher, experts_of(kind)[1][expert])
    texts = [*prompts(12, 9, seed=3).tolist(), *prompts(6, 5, seed=4).tolist()]
    return model, teacher, texts


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_come_nearer_to_those_of_the_fine_tune(kind):
    model, teacher, texts = parts(kind)
    before = {name: part.clone() for name, part in model.experts.parts.items()}
    found = distil_scales(model, teacher, texts[:-4], texts[-4:], expert=1, steps=30, batch_size=4)
    assert found.after < found.before
    signs = [name for name in model.experts.routed if "alpha" in model.experts.reader(name, 1).parts]
    assert list(found.factors) == signs and all(0.5 < r < 1.5 and r != 1 for r in found.factors.values())
    # Norms and biases are stored whole: they have no size.
    assert len(signs) < len(model.experts.routed)
    assert all(torch.equal(part, before[name]) for name, part in model.experts.parts.items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_sizes_that_are_wrong_are_found_again():
    model, teacher, texts = parts()
    teacher.load_state_dict(model.experts.state_dict([0, 1.0, 0]), strict=False)
    stored = {name: part * 0.8 if name.endswith(".alpha") else part for name, part in model.experts.parts.items()}
    small = route_experts(host(), ExpertSet(model.experts.about, model.experts.dense, stored))
    found = distil_scales(small, teacher, texts, texts, expert=1, steps=200, learning_rate=0.02)
    assert found.after < 1e-2 * found.before
    assert sum(abs(r - 1.25) < 0.05 for r in found.factors.values()) > 0.9 * len(found.factors)


def test_a_model_that_was_fitted_serves_its_mixtures_as_before():
    model, teacher, texts = parts()
    ids = prompts()
    want = model(ids, weights=[0, 1.0, 0]).logits
    distil_scales(model, teacher, texts, texts, expert=1, steps=2)
    assert torch.equal(model(ids, weights=[0, 1.0, 0]).logits, want)


def test_the_slope_of_a_factor_is_that_of_the_error():
    model, teacher, texts = parts()
    names = [name for name in model.working.targets if "alpha" in model.experts.reader(name, 1).parts]
    factors = dict.fromkeys(names, 1.0)
    with distilling._slopes(model, 1, names) as slopes:
        distilling._write(model, 1, factors)
        distilling._error(model, teacher, texts).backward()
    for name in names[::5]:
        errors = []
        for apart in (0.02, -0.02):
            distilling._write(model, 1, {**factors, name: 1 + apart})
            errors.append(float(distilling._error(model, teacher, texts)))
        assert slopes[name] == pytest.approx((errors[0] - errors[1]) / 0.04, rel=0.05, abs=1e-5)


def test_padding_is_no_part_of_the_error():
    model, teacher, texts = parts()
    together = float(distilling._error(model, teacher, texts))
    alone = [(float(distilling._error(model, teacher, [text])), len(text)) for text in texts]
    assert together == pytest.approx(sum(e * n for e, n in alone) / sum(n for _, n in alone), rel=1e-4)
    assert distilling._error_of(model, teacher, texts, 5) == pytest.approx(together, rel=1e-4)


def test_every_text_is_read_before_any_is_read_again():
    rng = torch.Generator().manual_seed(0)
    batches = list(distilling._batches([[i] for i in range(6)], 4, 3, rng))
    seen = [text[0] for batch in batches for text in batch]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)) and seen[:6] != seen[6:]
    assert all(len(batch) == 8 for batch in distilling._batches([[1], [2]], 2, 8, rng))


def test_errors_that_are_not_finite_are_refused_by_name():
    model, teacher, texts = parts()
    teacher.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(RecipeError, match=rf"expert {model.experts.about.names[1]}: the error of its logits is nan"):
        distil_scales(model, teacher, texts, texts, expert=1, steps=1)
    assert not any(p.requires_grad for p in model.parameters())
