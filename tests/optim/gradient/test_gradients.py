import math

import pytest
import torch

from modicum.errors import UnsupportedError
from modicum.optim.gradient.gradients import SLAB, _scale_on_device, _scale_on_host, named_tensors, scale_, tensor_norms

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def mixed(dtype=None):
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (0, 5), (7,), (2, 1, 3)]
    return [torch.randn(s, generator=g).to(dtype or DTYPES[i % 4]).mul(2.0**i) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("scale", [_scale_on_host, _scale_on_device])
def test_both_ways_of_scaling_multiply_and_erase(scale):
    grads = mixed()
    grads[3].fill_(math.inf)
    grads[4][0, 0, 0] = math.nan
    want = [g.double() * f for g, f in zip(grads[:3], (0.5, 0.123, 1.0))]
    scale(grads, torch.tensor([0.5, 0.123, 1.0, 0.0, 0.0]))
    for got, expected in zip(grads, want):
        assert torch.allclose(got.double(), expected, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-6)
    assert (grads[3] == 0).all() and (grads[4] == 0).all()


def test_norms_of_many_types_are_those_of_float64():
    for dtype in DTYPES:
        grads = mixed(dtype)
        norms = tensor_norms(grads)
        assert norms.dtype == torch.float32
        assert torch.allclose(norms.double(), torch.stack([g.double().norm() for g in grads]), rtol=1e-6)
    assert tensor_norms(mixed(), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("extra", [0, 1, 12345])
def test_long_sums_keep_their_digits(dtype, bound, extra):
    grad = torch.randn(8 * SLAB + extra, generator=torch.Generator().manual_seed(1)).mul(1e-3).to(dtype)
    exact = grad.double().norm()
    assert abs(float(tensor_norms([grad])[0]) / float(exact) - 1) < bound
    assert abs(float(tensor_norms([grad, grad[:5]])[0]) / float(exact) - 1) < bound


def test_a_transposed_gradient_is_measured_and_scaled_in_place():
    grad = torch.randn(600, 400).t()
    before = grad.clone()
    assert torch.allclose(tensor_norms([grad]), before.norm().view(1), rtol=1e-5)
    scale_([grad], torch.tensor([0.25]))
    assert torch.equal(grad, before * 0.25)


def test_names_do_not_depend_on_wrappers_and_must_differ():
    a, b = torch.zeros(1), torch.zeros(1)
    assert list(named_tensors([("module._orig_mod.x", a)])) == ["x"]
    assert list(named_tensors([a, b, a])) == ["0", "1"]
    assert list(named_tensors(a)) == ["0"]
    with pytest.raises(UnsupportedError, match="Two different parameters are called 'x'"):
        named_tensors([("x", a), ("x", b)])
