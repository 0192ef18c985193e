"""A slow float64 transcription of the zero token's attention and of the looped model, in NumPy."""

from __future__ import annotations

import numpy as np


def attention(q, k, v, zero_key=None, zero_bias=None, visible=None, scale=None):
    """Concat form: the zero token is column 0 with value zero.

    q is (b, h, t, d); k and v (b, g, s, d); zero_key (g, d); zero_bias (h,); visible (b, t, s) boolean.
    """
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    scale = 1 / np.sqrt(d) if scale is None else scale
    out, p0 = np.zeros((b, h, t, d)), np.zeros((b, h, t))
    for i in range(b):
        for j in range(h):
            group = j // (h // g)
            for row in range(t):
                logits = [0.0 if zero_key is None else scale * float(q[i, j, row] @ zero_key[group])]
                if zero_bias is not None:
                    logits[0] += zero_bias[j]
                values = [np.zeros(d)]
                for col in range(s):
                    if visible is None or visible[i, row, col]:
                        logits.append(scale * float(q[i, j, row] @ k[i, group, col]))
                        values.append(v[i, group, col])
                weights = np.exp(np.array(logits) - max(logits))
                weights /= weights.sum()
                p0[i, j, row] = weights[0]
                out[i, j, row] = sum(w * x for w, x in zip(weights, values))
    return out, p0


def schedule(n_layers, n_cycles, n_head=1, n_tail=1):
    """Head once, the middle n_cycles times as a block, tail once."""
    order = [(i, 0) for i in range(n_head)]
    for cycle in range(n_cycles):
        order += [(i, cycle) for i in range(n_head, n_layers - n_tail)]
    return order + [(i, 0) for i in range(n_layers - n_tail, n_layers)]


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x, positions, theta):
    """Rotary embedding of (t, heads, d), the halves being the pairs' two coordinates."""
    d = x.shape[-1]
    angle = positions[:, None] / theta ** (np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Llama:
    """A looped Llama, one token after the other, each with its own number of cycles and the policy ``latest``.

    ``weights`` holds arrays by the names of a Llama checkpoint, and ``zero_token.zero_key`` (rows, g, d).
    """

    def __init__(self, weights, *, n_layers, heads, groups, eps, theta, n_cycles, n_head=1, n_tail=1):
        self.w, self.heads, self.groups, self.eps, self.theta = weights, heads, groups, eps, theta
        self.n_layers, self.n_cycles, self.n_head, self.n_tail = n_layers, n_cycles, n_head, n_tail
        self.cache = {}

    def _layer(self, x, position, layer, cycle):
        w, name = self.w, f"model.layers.{layer}."
        h = rms_norm(x, w[name + "input_layernorm.weight"], self.eps)
        q, k, v = (w[f"{name}self_attn.{p}_proj.weight"] @ h for p in "qkv")
        d = len(q) // self.heads
        where = np.array([position])
        q = rotate(q.reshape(1, self.heads, d), where, self.theta)[0]
        k = rotate(k.reshape(1, self.groups, d), where, self.theta)[0]
        slot = self.cache.setdefault((layer, cycle), [])
        slot.append((k, v.reshape(self.groups, d)))
        keys = np.stack([entry[0] for entry in slot], 1)[None]
        values = np.stack([entry[1] for entry in slot], 1)[None]
        middle = range(self.n_head, self.n_layers - self.n_tail)
        p0 = None
        if layer in middle and "zero_token.zero_key" in w:
            row = cycle * len(middle) + layer - self.n_head
            out, p0 = attention(q[None, :, None], keys, values, w["zero_token.zero_key"][row])
        else:
            out, _ = attention(q[None, :, None], keys, values, np.zeros((self.groups, d)), np.full(self.heads, -np.inf))
        x = x + w[name + "self_attn.o_proj.weight"] @ out.reshape(-1)
        h = rms_norm(x, w[name + "post_attention_layernorm.weight"], self.eps)
        gate = w[name + "mlp.gate_proj.weight"] @ h
        up = w[name + "mlp.up_proj.weight"] @ h
        return x + w[name + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up), p0

    def step(self, token, position, cycles=None, threshold=None):
        """Return the logits of one token and how many cycles it ran."""
        x = self.w["model.embed_tokens.weight"][token]
        for layer in range(self.n_head):
            x, _ = self._layer(x, position, layer, 0)
        middle = range(self.n_head, self.n_layers - self.n_tail)
        for cycle in range(self.n_cycles):
            scores = []
            for layer in middle:
                x, p0 = self._layer(x, position, layer, cycle)
                scores.append(0.0 if p0 is None else p0.mean())
            ran = cycle + 1
            if ran == cycles or (threshold is not None and np.mean(scores) > threshold):
                break
        for later in range(ran, self.n_cycles):
            for layer in middle:
                self.cache.setdefault((layer, later), []).append(self.cache[layer, ran - 1][-1])
        for layer in range(self.n_layers - self.n_tail, self.n_layers):
            x, _ = self._layer(x, position, layer, 0)
        x = rms_norm(x, self.w["model.norm.weight"], self.eps)
        return self.w["lm_head.weight"] @ x, ran
