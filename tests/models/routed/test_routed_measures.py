"""A routed model under measures and in evaluation tools: the prompt alone chooses the experts."""

import pytest
import torch

from models.routed.support_routed import host, prompts, routed, weights_of
from modicum.evaluate.measures.lm_eval import _by_context
from modicum.jobs.subject import LocalSubject
from modicum.models.routed import route_experts
from modicum.models.router import fit_router
from modicum.weights.mediator import build_experts, units_of
from support import byte_tokenizer, tiny_llama

LETTERS = ("abcdefgh", "stuvwxyz")  # the first expert's prompts, and the second's
ONE_HOT = ([1.0, 0.0], [0.0, 1.0])


@pytest.fixture(scope="module")
def model():
    """A model that knows its prompts by their letters."""
    base = weights_of(tiny_llama())
    rng = torch.Generator().manual_seed(5)
    experts = [{n: t + 0.05 * torch.randn(t.shape, generator=rng) for n, t in base.items()} for _ in LETTERS]
    made = route_experts(tiny_llama(), build_experts(base, experts, list(units_of(base)), sparsifier="sign"))
    tokenizer, x = byte_tokenizer(chat=False), []
    for letters in LETTERS:
        for i in range(24):
            text = "".join(letters[(i * j + i) % 8] for j in range(1, 7))
            x.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    made.router = fit_router(made.features(torch.tensor(x)), [i // 24 for i in range(48)])
    return made


def subject(model):
    return LocalSubject("routed", model, byte_tokenizer(chat=False))


def plain(model, weights):
    other = tiny_llama()
    other.load_state_dict(model.experts.state_dict(weights), strict=False)
    return other.eval()


def rows():
    """Prompts of both tasks, each with answers in letters of either."""
    found = []
    for i in range(6):
        mine, other = LETTERS[i % 2], LETTERS[1 - i % 2]
        answers = ("".join(letters[(i + j) % 8] for j in range(30)) for letters in (mine, other, other[::-1]))
        found.append([{"prompt": mine[: 3 + i % 4], "completion": answer} for answer in answers])
    return found


def test_a_completion_is_scored_by_the_expert_of_its_prompt(model):
    asked = [row for group in rows() for row in group]
    got = [found.nats for found in subject(model).likelihoods(asked, batch_size=4)]
    for t in range(2):
        want = [found.nats for found in subject(plain(model, ONE_HOT[t])).likelihoods(asked, batch_size=4)]
        mine = [i for i in range(len(asked)) if (i // 3) % 2 == t]
        assert [got[i] for i in mine] == pytest.approx([want[i] for i in mine], rel=1e-4)
        others = [i for i in range(len(asked)) if (i // 3) % 2 != t]
        assert all(abs(got[i] - want[i]) > 1e-2 for i in others)


def test_all_answers_to_a_question_are_scored_by_the_same_expert(model):
    asked = rows()
    got = subject(model).alternatives(asked, batch_size=6)
    for t in range(2):
        want = subject(plain(model, ONE_HOT[t])).alternatives(asked, batch_size=6)
        for i in range(t, len(asked), 2):
            assert [x.nats for x in got[i]] == pytest.approx([x.nats for x in want[i]], rel=1e-4)


def test_a_text_is_scored_by_what_stands_before_it_alone(model):
    texts = [{"text": letters * 3} for letters in LETTERS]
    got = [found.nats for found in subject(model).likelihoods(texts)]
    start = torch.tensor([[byte_tokenizer(chat=False).bos_token_id]])
    chosen = model.route(start).weights[0].tolist()
    want = [found.nats for found in subject(plain(model, chosen)).likelihoods(texts)]
    assert got == pytest.approx(want, rel=1e-4)


class Harness:
    """A stand-in for the harness' class: rows filled up by zeros on the right, without a mask."""

    def __init__(self, pretrained, **_):
        self.model = pretrained

    @torch.no_grad()
    def _loglikelihood_tokens(self, asked, disable_tqdm=False):
        rows = [torch.tensor(context + answer) for _, context, answer in asked]
        logits = self.model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.log_softmax(-1)
        spans = [(len(context), len(context) + len(answer)) for _, context, answer in asked]
        return [float(logits[i, torch.arange(a, b) - 1, rows[i][a:b]].sum()) for i, (a, b) in enumerate(spans)]


def test_the_harness_scores_all_candidates_by_the_expert_of_the_question(model):
    tokenizer = byte_tokenizer(chat=False)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    asked = [(None, ids(row["prompt"]), ids(row["completion"])) for group in rows() for row in group]
    got = _by_context(Harness, model)(pretrained=model)._loglikelihood_tokens(asked, disable_tqdm=True)
    for t in range(2):
        other = plain(model, ONE_HOT[t])
        assert _by_context(Harness, other) is Harness
        want = Harness(other)._loglikelihood_tokens(asked)
        mine = [i for i in range(len(asked)) if (i // 3) % 2 == t]
        assert [got[i] for i in mine] == pytest.approx([want[i] for i in mine], rel=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("fill", [0, 38])
def test_rows_filled_up_without_a_mask_have_the_features_of_their_prompts(pooling, fill):
    model, ids = routed(layers=slice(1, None)), prompts(3)
    model.host.config.pad_token_id = 38
    model.config.routing = {**model.config.routing, "tap": 1, "pooling": pooling}
    filled = torch.cat([ids, torch.full((3, 4), fill)], 1)
    torch.testing.assert_close(model.features(filled), model.features(ids), atol=1e-6, rtol=1e-5)
    assert model.features(torch.full((1, 3), fill)).isfinite().all()  # a row of nothing else
    inside = torch.cat([ids, torch.full((3, 4), fill), ids], 1)
    assert not torch.allclose(model.features(inside), model.features(ids))


def test_entropies_of_rows_filled_up_without_a_mask_are_those_of_their_prompts():
    model, ids = routed(), prompts(3)
    model.config.routing = {**model.config.routing, "kind": "entropy"}
    filled = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(model.features(filled), model.features(ids), atol=1e-5, rtol=1e-4)
    assert model.host.config.pad_token_id == host().config.pad_token_id == 0
