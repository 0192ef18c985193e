import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import UnsupportedError
from modicum.models.zero_token.attention import standard_attention, zero_attention
from oracles import zero_token as oracle

ROUTES = ("eager", "concat", "query_row", "lse")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parts(b=2, h=4, g=2, t=5, d=8, dtype=torch.float64, seed=0):
    q, k, v = random(b, h, t, d, seed=seed), random(b, g, t, d, seed=seed + 1), random(b, g, t, d, seed=seed + 2)
    return [x.to(dtype) for x in (q, k, v, random(g, d, seed=seed + 3))]


def padded_causal(b, t, left):
    mask = torch.ones(b, 1, t, t, dtype=torch.bool).tril()
    mask[0, :, :, :left] = False
    return mask


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_every_route_equals_the_oracle(dtype, tolerance, heads, route, bias, padded):
    h, g = heads
    q, k, v, z = parts(h=h, g=g, dtype=dtype)
    b0 = random(h, seed=9).to(dtype) if bias else None
    if route == "query_row" and (bias or padded):
        pytest.skip("route is causal and keyed only")
    mask = padded_causal(2, 5, 2) if padded else None
    visible = padded_causal(2, 5, 2 if padded else 0)[:, 0].numpy()
    expected, expected_p0 = oracle.attention(
        *(x.double().numpy() for x in (q, k, v, z)), None if b0 is None else b0.double().numpy(), visible
    )
    knobs = {"zero_bias": b0, "attn_mask": mask, "is_causal": not padded, "route": route}
    out = zero_attention(q, k, v, z, **knobs)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.double().numpy(), expected, atol=tolerance)
    if route != "query_row":
        out, p0 = zero_attention(q, k, v, z, return_zero_attention=True, **knobs)
        np.testing.assert_allclose(out.double().numpy(), expected, atol=tolerance)
        np.testing.assert_allclose(p0.double().numpy(), expected_p0, atol=tolerance)
        assert p0.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_all_routes_have_the_same_gradients(bias, padded, heads):
    tensors = [x.requires_grad_() for x in parts(h=heads[0], g=heads[1])]
    b0 = random(heads[0], seed=9).requires_grad_() if bias else None
    weight = random(2, heads[0], 5, 8, seed=5)
    mask = padded_causal(2, 5, 2) if padded else None
    found = {}
    for route in ROUTES:
        if route == "query_row" and (bias or padded):
            continue
        out = zero_attention(*tensors, zero_bias=b0, attn_mask=mask, is_causal=not padded, route=route)
        found[route] = torch.autograd.grad((out * weight).sum(), [*tensors, *([b0] if bias else [])])
    for route, gradients in found.items():
        for ours, reference in zip(gradients, found["eager"]):
            torch.testing.assert_close(ours, reference, atol=1e-12, rtol=0, msg=route)


def test_gradients_of_the_lse_route_agree_with_finite_differences():
    tensors = [x.requires_grad_() for x in parts(b=1, h=2, g=1, t=3, d=4)]
    assert torch.autograd.gradcheck(lambda *x: zero_attention(*x, is_causal=True, route="lse"), tensors)


def test_zero_attention_carries_gradient_by_concat_and_eager():
    tensors = [x.requires_grad_() for x in parts()]
    gradients = []
    for route in ("concat", "eager"):
        _, p0 = zero_attention(*tensors, is_causal=True, route=route, return_zero_attention=True)
        gradients.append(torch.autograd.grad(p0.square().sum(), [tensors[0], tensors[1], tensors[3]]))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@given(st.integers(0, 10_000))
def test_it_is_standard_attention_gated_by_the_log_sum_exp(seed):
    q, k, v, z = parts(seed=seed)
    out, p0 = zero_attention(q, k, v, z, is_causal=True, route="concat", return_zero_attention=True)
    keys = k.repeat_interleave(2, 1)
    logits = (q @ keys.mT / 8**0.5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    s0 = torch.einsum("bhtd,hd->bht", q, z.repeat_interleave(2, 0)) / 8**0.5
    lse = logits.logsumexp(-1)
    standard = standard_attention(q, k, v, attn_mask=None, is_causal=True, scale=None)
    torch.testing.assert_close(p0, torch.sigmoid(s0 - lse), atol=1e-12, rtol=0)
    torch.testing.assert_close(out, torch.sigmoid(lse - s0)[..., None] * standard, atol=1e-12, rtol=0)
    assert (p0 > 0).all() and (p0 < 1).all()


@pytest.mark.parametrize("route", ROUTES)
def test_zero_queries_and_zero_key_average_over_one_more_token(route):
    q, v = torch.zeros(1, 1, 2, 4), random(1, 1, 2, 4, dtype=torch.float32)
    out = zero_attention(q, q, v, torch.zeros(1, 4), is_causal=True, route=route)
    torch.testing.assert_close(out[0, 0], torch.stack([v[0, 0, 0] / 2, v[0, 0].sum(0) / 3]))


@pytest.mark.parametrize("route", ["eager", "concat", "lse"])
def test_bias_switches_the_zero_token_off_and_the_layer_out(route):
    q, k, v, z = (x.requires_grad_() for x in parts())
    weight = random(2, 4, 5, 8, seed=5)
    off = zero_attention(q, k, v, z, zero_bias=torch.full((4,), -torch.inf).double(), is_causal=True, route=route)
    plain = zero_attention(q, k, v, None, is_causal=True)
    torch.testing.assert_close(off, plain, atol=1e-13, rtol=0)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), [q, k, v]) for x in (off, plain))):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    bias = torch.full((4,), torch.inf).double().requires_grad_()
    knobs = {"zero_bias": bias, "is_causal": True, "route": route}
    closed, p0 = zero_attention(q, k, v, z, return_zero_attention=True, **knobs)
    assert torch.equal(closed, torch.zeros_like(closed)) and torch.equal(p0, torch.ones_like(p0))
    assert all(g.isfinite().all() for g in torch.autograd.grad((closed * weight).sum(), [q, k, v, z, bias]))


@pytest.mark.parametrize("route", ["eager", "concat", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_exactly_zero(route, dtype):
    q, k, v, z = (x.requires_grad_() for x in parts(dtype=dtype))
    mask = padded_causal(2, 5, 2)
    out, p0 = zero_attention(q, k, v, z, attn_mask=mask, route=route, return_zero_attention=True)
    assert torch.equal(out[0, :, :2], torch.zeros_like(out[0, :, :2]))
    assert torch.equal(p0[0, :, :2].float(), torch.ones(4, 2))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), [q, k, v, z]))


@pytest.mark.parametrize("route", ["eager", "concat", "lse"])
def test_a_masked_row_with_the_zero_token_off_is_zero_and_not_nan(route):
    q, k, v, z = (x.requires_grad_() for x in parts())
    off = torch.full((4,), -torch.inf).double()
    out = zero_attention(q, k, v, z, zero_bias=off, attn_mask=padded_causal(2, 5, 2), route=route)
    assert torch.equal(out[0, :, :2], torch.zeros_like(out[0, :, :2]))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), [q, k, v, z]))


@pytest.mark.parametrize("route", ROUTES)
def test_later_tokens_change_nothing_before_them(route):
    q, k, v, z = parts()
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 3], v2[:, :, 3] = 7.0, -5.0
    a, b = (zero_attention(q, *kv, z, is_causal=True, route=route) for kv in ((k, v), (k2, v2)))
    torch.testing.assert_close(a[:, :, :3], b[:, :, :3], atol=0, rtol=0)
    assert not torch.allclose(a[:, :, 3:], b[:, :, 3:])


@pytest.mark.parametrize("route", ["eager", "lse"])
def test_a_key_for_each_query_equals_a_constant_one(route):
    q, k, v, z = parts()
    per_query = z[None, :, None].expand(2, -1, 5, -1)
    a = zero_attention(q, k, v, per_query, is_causal=True, route=route)
    torch.testing.assert_close(a, zero_attention(q, k, v, z, is_causal=True, route="concat"), atol=1e-12, rtol=0)


def test_one_token_and_one_key():
    q, k, v, z = parts(t=1)
    out = zero_attention(q, k, v, z)
    s, s0 = (
        (q * x.repeat_interleave(2, -x.dim() + 1 if x.dim() == 2 else 1)).sum(-1) / 8**0.5
        for x in (k[:, :, :], z[None, :, None])
    )
    torch.testing.assert_close(out, torch.sigmoid(s - s0)[..., None] * v.repeat_interleave(2, 1))


def test_inputs_are_left_alone():
    tensors = parts()
    copies = [x.clone() for x in tensors]
    for route, causal in itertools.product(ROUTES, [True]):
        zero_attention(*tensors, is_causal=causal, route=route)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies))


def test_a_sink_per_head_needs_no_key():
    q, k, v, _ = parts()
    sink = random(4, seed=3)
    a, b = (zero_attention(q, k, v, z, zero_bias=sink, is_causal=True) for z in (None, torch.zeros(2, 8).double()))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "knobs",
    [
        {"is_causal": True, "cached": True},
        {"is_causal": True, "attn_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)},
        {"attn_mask": torch.ones(1, 1, 5, 6, dtype=torch.bool)},
        {"route": "lse", "dropout": 0.1},
        {"route": "query_row"},
        {"route": "nonsense"},
        {"route": "concat", "dropout": 0.1, "return_zero_attention": True},
        {"none": True, "return_zero_attention": True},
        {"per_query": True, "route": "concat"},
    ],
)
def test_what_a_route_cannot_express_is_refused(knobs):
    q, k, v, z = parts()
    if knobs.pop("cached", False):
        k, v = torch.cat([z[None, :, None].expand(2, -1, 1, -1), k], 2), torch.cat([v[:, :, :1], v], 2)
    if knobs.pop("none", False):
        z = None
    if knobs.pop("per_query", False):
        z = z[None, :, None].expand(2, -1, 5, -1)
    with pytest.raises(UnsupportedError):
        zero_attention(q, k, v, z, **knobs)
