"""p-hop induction: does cycling, and do zero tokens, beat an equal number of parameters?

    python -m benchmarks.claims.zero_token.p_hop [--steps 900] [--seeds 3] [--minutes 8]

A cell is a variant and a seed; cells with a result are skipped, so the study may be stopped and started again. All of
them take about 35 minutes of one core.
"""

from __future__ import annotations

import torch
from benchmarks.claims.zero_token.cells import arguments, measure_all
from torch.nn.functional import cross_entropy

from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM
from modicum.random import generator

RESULT = "zero-token-p-hop"
SYMBOLS, LENGTH, HOPS, BATCH, HELD_OUT = 4, 32, 3, 32, 512
SHARES = [k / 10 for k in range(1, 10)]  # of the tokens, that the threshold lets out after the first cycle
HOST = {
    "model_type": "llama",
    "vocab_size": SYMBOLS,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS = {
    "vanilla-3": {"n_cycles": 1, "zero_token": False},
    "vanilla-5": {"n_cycles": 1, "zero_token": False, "layers": 5},
    "BC 3x2": {"n_cycles": 2, "n_head": 0, "n_tail": 0, "zero_token": False},
    "HTC": {"n_cycles": 3, "zero_token": False},
    "HTC + cycle embedding": {"n_cycles": 3, "zero_token": False, "cycle_embedding": "add"},
    "ZTT": {"n_cycles": 3},
    "ZTT random cycles": {"n_cycles": 3, "train_cycles": "random"},
}


def batch(rng: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences and the symbol that p hops reach from each position; -100 where the chain breaks."""
    x = torch.randint(SYMBOLS, (size, LENGTH), generator=rng)
    position = torch.arange(LENGTH)
    same = (x[:, :, None] == x[:, None, :]) & (position[None, :] < position[:, None])
    last = torch.where(same, position, -1).amax(-1)
    hop = torch.where(last >= 0, last + 1, -1)
    where = position.expand(size, -1)
    for _ in range(HOPS):
        where = torch.where(where >= 0, hop.gather(1, where.clamp(min=0)), -1)
    return x, torch.where(where >= 0, x.gather(1, where.clamp(min=0)), -100)


def accuracy(logits: torch.Tensor, target: torch.Tensor) -> float:
    counts = target >= 0
    return float((logits.argmax(-1)[counts] == target[counts]).float().mean())


def measure(variant: str, seed: int, steps: int) -> dict[str, object]:
    knobs = dict(VARIANTS[variant])
    host = HOST | {"num_hidden_layers": knobs.pop("layers", 3)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ZeroTokenForCausalLM(ZeroTokenConfig(host=host, seed=seed, **knobs))
    plain = [p for n, p in model.named_parameters() if n.startswith("zero_token.") or p.dim() < 2]
    weights = [p for n, p in model.named_parameters() if not n.startswith("zero_token.") and p.dim() >= 2]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        x, target = batch(generator(seed, "p-hop", step), BATCH)
        model.set_training_step(step)
        loss = cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return evaluate(model)


@torch.no_grad()
def evaluate(model: ZeroTokenForCausalLM) -> dict[str, object]:
    model.eval()
    x, target = batch(generator(0, "p-hop", "held out"), HELD_OUT)
    out = model(x, use_cache=False, output_zero_attention=True)
    result: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "visits": model.config.num_hidden_layers,
        "accuracy": accuracy(out.logits, target),
        "loss": float(cross_entropy(out.logits.flatten(0, 1), target.flatten(), ignore_index=-100)),
    }
    depth = model.config.depth
    if depth == 1:
        return result
    result["accuracy by cycles"] = [
        accuracy(model(x, use_cache=False, n_cycles=c).logits, target) for c in range(1, depth + 1)
    ]
    if out.zero_attention:
        result["zero attention by cycle"] = [
            float(torch.stack([p.mean() for (_, at), p in out.zero_attention.items() if at == c]).mean())
            for c in range(depth)
        ]
        result["exits"] = exits(model, x, target)
    return result


def exits(model: ZeroTokenForCausalLM, x: torch.Tensor, target: torch.Tensor) -> dict[str, list[dict[str, float]]]:
    """Accuracy against mean cycles for three criteria; the random exit shows what the mean depth alone is worth."""
    found: dict[str, list[dict[str, float]]] = {}
    model.config.exit_scope = "token"
    for criterion, never in (("zero_attention", 1.0), ("latent", 0.0), ("random", 0.0)):
        model.config.exit_criterion = criterion
        scores = model(x, use_cache=False, exit_threshold=never).exit_scores[0].flatten()
        found[criterion] = []
        for share in SHARES:
            cut = float(scores.quantile(1 - share))
            threshold = {"zero_attention": cut, "random": 1 - cut}.get(criterion, -cut)
            out = model(x, use_cache=False, exit_threshold=threshold)
            counts = target >= 0
            found[criterion].append(
                {
                    "threshold": threshold,
                    "mean cycles": float(out.cycles[counts].float().mean()),
                    "accuracy": accuracy(out.logits, target),
                }
            )
    model.config.exit_criterion, model.config.exit_scope = "zero_attention", "sequence"
    return found


def main() -> None:
    options = arguments(__doc__, steps=900)
    about = {
        "symbols": SYMBOLS,
        "length": LENGTH,
        "hops": HOPS,
        "batch": BATCH,
        "host": HOST,
        "variants": VARIANTS,
    }
    wanted = [(variant, seed, options.steps) for seed in range(options.seeds) for variant in VARIANTS]
    measure_all(RESULT, about, wanted, measure, minutes=options.minutes)


if __name__ == "__main__":
    main()
