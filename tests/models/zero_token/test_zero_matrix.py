"""The table of hosts and features in the guide is what the code does; ``python test_zero_matrix.py`` writes it anew."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.zero_token.support_zero import ALL_HOSTS, base_model, decode, left_padded, looped, tokens
from modicum.errors import ModicumError
from modicum.models import convert_to_zero_token
from modicum.models.zero_token.export import unroll

TABLE = Path(__file__).parents[3] / "docs/guide/zero-token-hosts.inc"
LEAD = "% Written by tests/models/zero_token/test_zero_matrix.py, which also holds the code to it."


def close(a, b, tolerance=2e-4):
    assert (a - b).abs().max() < tolerance


def logits(model, **knobs):
    with torch.no_grad():
        return model(tokens(), use_cache=False, **knobs).logits


def base_is_kept(host):
    base = base_model(host)
    assert torch.equal(logits(convert_to_zero_token(base, n_cycles=1, zero_token=False)), logits(base))


def caches(host, **knobs):
    model = looped(host, **knobs)
    close(decode(model, tokens(), prefill=3)[0], logits(model))


def pads(host):
    model = looped(host)
    close(model(**left_padded(tokens(), 3)).logits[:, 3:], logits(model))


def generates(host):
    model, knobs = looped(host), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **knobs), model.generate(tokens(), use_cache=False, **knobs))


def trains(host, **knobs):
    model = looped(host, **knobs).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.zero_token.parameters())


def checkpoints(host):
    plain = looped(host).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # some hosts drop out
            model(tokens(), labels=tokens()).loss.backward()
    close(plain.zero_token.zero_key.grad, saving.zero_token.zero_key.grad, 1e-4)


def shifts(host):
    caches(host, zero_key_rope="relative")


def leaves(host):
    model = looped(host, exit_threshold=0.15)
    cycles = model(tokens()).cycles.float()
    assert cycles.min() < 3
    close(decode(model, tokens(), prefill=3)[0], logits(model))


def classifies(host):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(looped(host).config)
    assert model(tokens(), labels=torch.zeros(2, dtype=torch.long)).loss.isfinite()


def kernel(host):
    model = looped(host)
    model.set_attn_implementation("sdpa")
    logits(model)


def static(host):
    model, knobs = looped(host), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        model.generate(tokens(), cache_implementation="static", **knobs), model.generate(tokens(), **knobs)
    )


def drafts(host):
    model, knobs = looped(host), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = tokens()[:1]
    assert torch.equal(model.generate(ids, assistant_early_exit=1, **knobs), model.generate(ids, **knobs))


def unrolls(host):
    model = looped(host, zero_token=False)
    close(unroll(model)(tokens()).logits, logits(model))


FEATURES = {
    "base kept bit for bit": base_is_kept,
    "cache": caches,
    "padding": pads,
    "generate": generates,
    "bf16 training": trains,
    "checkpointing": checkpoints,
    "sdpa": kernel,
    "exits": leaves,
    "static cache": static,
    "drafts": drafts,
    "unrolled": unrolls,
    "`lora_rank`": lambda host: trains(host, lora_rank=2),
    "`ffn_gate`": lambda host: trains(host, ffn_gate="zero_attention"),
    "relative keys": shifts,
    "classification": classifies,
}


def row(host):
    cells = []
    for feature in FEATURES.values():
        try:
            feature(host)
            cells.append("yes")
        except (ModicumError, ValueError) as refusal:  # said by name; anything else fails
            assert str(refusal), host
            cells.append("refused")
        except AssertionError as error:
            raise AssertionError(f"{host}: {feature}") from error
    return f"| {host} | " + " | ".join(cells) + " |"


KINDS = sorted(set(ALL_HOSTS) - {"llama-tied-bias"})
OFTEN = ("gpt2", "llama", "qwen3_moe")  # the others take half a second each


def table():
    lines = [LEAD, "", "| host | " + " | ".join(FEATURES) + " |", "|---" * (1 + len(FEATURES)) + "|"]
    return "\n".join(lines + [row(host) for host in KINDS]) + "\n"


@pytest.mark.parametrize("host", [h if h in OFTEN else pytest.param(h, marks=pytest.mark.slow) for h in KINDS])
def test_the_table_of_hosts_is_what_the_code_does(host):
    assert row(host) in TABLE.read_text().splitlines(), "run: python tests/models/zero_token/test_zero_matrix.py"


@pytest.mark.parametrize("host", ["llama", "opt", "gemma2", "qwen3_moe"])
def test_exits_of_hosts_save_visits(host):
    model = looped(host, exit_threshold=-1.0)
    assert model(tokens()).layer_calls == 4


if __name__ == "__main__":
    TABLE.write_text(table())
