"""Small models for the zeroth-order tests: every kind of parameter, in float64."""

import copy

import torch
from torch import nn
from torch.nn import functional

from modicum.optim import FZOO, LOZO, ConMeZO, HiZOO, MeZO, SparseMeZO, SubZero, TeZO, ZOAdaMU

METHODS = {
    "mezo": (MeZO, {}),
    "mezo-adam": (MeZO, {"variant": "adam"}),
    "mezo-scalar": (MeZO, {"variant": "scalar"}),
    "n-spsa": (MeZO, {"queries": 3}),
    "tezo": (TeZO, {"rank": 3}),
    "tezo-momentum": (TeZO, {"rank": 3, "variant": "momentum"}),
    "tezo-adam": (TeZO, {"rank": 3, "variant": "adam"}),
    "tezo-lion": (TeZO, {"rank": 3, "variant": "lion"}),
    "tezo-refresh": (TeZO, {"rank": 3, "variant": "factor_adam", "refresh_every": 4}),
    "lozo-momentum": (LOZO, {"variant": "momentum", "refresh_every": 4}),
    "subzero": (SubZero, {"rank": 3, "refresh_every": 4}),
    "subzero-plus": (SubZero, {"rank": 3, "variant": "adam", "queries": 3, "sides": 1}),
    "sparse-mezo": (SparseMeZO, {"density": 0.5}),
    "hizoo": (HiZOO, {"smooth": 1e-3}),
    "fzoo": (FZOO, {"queries": 3, "lr": 1e-3}),
    "conmezo": (ConMeZO, {}),
    "zo-adamu": (ZOAdaMU, {"hold": 2, "fall": 4}),
}


class Tied(nn.Module):
    """Embedding tied to the head, a norm, biases, two matrices."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = norm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        hidden = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        return self.head(hidden)


class ScaleRMSNorm(nn.Module):
    """A norm as model libraries write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


IDS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(2))


def tied(norm=nn.LayerNorm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied(norm).double().eval()


def task(model):
    return lambda: functional.cross_entropy(model(IDS).flatten(0, 1), LABELS.flatten())


def paired_task(model, optimizer):
    def closure():
        logits = model(IDS.repeat(optimizer.branches, 1))
        return torch.stack(
            [
                functional.cross_entropy(part.flatten(0, 1), LABELS.flatten())
                for part in logits.chunk(optimizer.branches)
            ]
        )

    return closure


def train(method, steps=12, *, model=None, lr=1e-2, **knobs):
    """Train a copy of the model; return it, the coefficients, and the optimizer."""
    model = copy.deepcopy(model if model is not None else tied())
    optimizer = method(model.named_parameters(), lr=lr, **knobs)
    engine = knobs.get("engine", "mutate")
    if engine != "mutate":
        optimizer.attach(model)
    closure = paired_task(model, optimizer) if engine == "paired" else task(model)
    kappas = []
    for _ in range(steps):
        optimizer.step(closure)
        kappas.append(optimizer.kappas)
    optimizer.settle_()
    if engine != "mutate":
        optimizer.detach()
    return model, torch.stack(kappas), optimizer


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def matrix(rows=4, columns=3, seed=0):
    """One float64 parameter and a loss on it that both torch and NumPy can evaluate."""
    rng = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(rows, columns, generator=rng, dtype=torch.float64))
    target = torch.randn(rows, columns, generator=rng, dtype=torch.float64)

    def loss(values):
        if isinstance(values, torch.Tensor):
            return ((values - target) ** 2).sum() + (values**4).sum() / 10
        return ((values - target.numpy()) ** 2).sum() + (values**4).sum() / 10

    return weight, loss
