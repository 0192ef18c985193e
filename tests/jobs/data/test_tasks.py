import re

import pytest
import torch
from torch.nn import functional

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.evaluate.measures.exact_match import exact_match, f1
from modicum.jobs.data.sources.suite import TASKS, Example, k_shot, task_examples
from modicum.jobs.training.task_losses import Question, TaskLoss, answer_batch, answer_scores, reward_loss
from modicum.objectives.answers import candidate_scores, label_words, multiple_choice
from modicum.optim import MeZO, TeZO
from support import byte_tokenizer, tiny_llama

ROWS = {
    "sst2": ({"sentence": "fine film", "label": 1}, "fine film It was", " great"),
    "rte": ({"premise": "P.", "hypothesis": "H", "label": 0}, 'Does this mean that "H" is true? Yes or No?\n', "Yes"),
    "cb": ({"premise": "P.", "hypothesis": "H", "label": 2}, 'Can we infer that "H"? Yes, No, or Maybe?\n', "Maybe"),
    "boolq": ({"passage": "P", "question": "is it so", "label": 1}, "P Is it so?\n", "Yes"),
    "wsc": ({"text": "T", "span1_text": "Ann", "span2_text": "she", "label": 1}, 'pronoun "she" refer to Ann?', "Yes"),
    "wic": ({"word": "w", "sentence1": "A", "sentence2": "B", "label": 0}, "Yes, No?\nA\nB\n", "No"),
    "multirc": ({"paragraph": "P", "question": "Q", "answer": "A", "label": 1}, 'this answer "A". Is that', "Yes"),
    "copa": (
        {"premise": "It rained.", "question": "effect", "choice1": "Dry.", "choice2": "Wet.", "label": 1},
        "It rained so ",
        "wet.",
    ),
    "record": (
        {"passage": "P\n@highlight\nH", "query": "Who is @placeholder", "entities": ["A", "B"], "answers": ["B"]},
        "P\n- H\n- ",
        "Who is B",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_task_s_prompt_and_right_candidate(name):
    row, prompt, right = ROWS[name]
    example = TASKS[name].render(row)
    assert prompt in example.prompt and example.candidates[example.answer] == right


def test_generated_tasks_have_references():
    squad = {"title": "T", "context": "C", "question": " Q?", "answers": {"text": ["a", "b"]}}
    assert TASKS["squad"].render(squad).references == ("a", "b")
    drop = {"passage": "P", "question": "Q?", "answers_spans": {"spans": ["3"]}}
    assert TASKS["drop"].render(drop) == Example("Passage: P\nQuestion: Q?\nAnswer:", references=("3",))


def test_a_saved_data_set_is_read_from_disk(tmp_path):
    import datasets

    rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(10)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "sst2"))
    examples = task_examples("sst2", size=4, path=str(tmp_path / "sst2"))
    assert len({e.prompt for e in examples}) == 4
    assert examples == task_examples("sst2", size=4, path=str(tmp_path / "sst2"))
    assert examples != task_examples("sst2", size=4, seed=1, path=str(tmp_path / "sst2"))
    with pytest.raises(CheckpointError, match="rows of .* have no 'premise'"):
        task_examples("rte", size=1, path=str(tmp_path / "sst2"))
    with pytest.raises(CheckpointError, match="Cannot read test of"):
        task_examples("sst2", split="test", size=1, path=str(tmp_path / "sst2"))


def test_made_tasks_follow_their_seed_and_split():
    assert task_examples("polarity", size=5) == task_examples("polarity", size=5)
    assert task_examples("polarity", size=5) != task_examples("polarity", size=5, split="test")
    with pytest.raises(RecipeError, match="There is no task 'parities'. Did you mean 'parity'"):
        task_examples("parities", size=1)


@pytest.mark.parametrize("name", ["parity", "order"])
def test_made_answers_are_right(name):
    for example in task_examples(name, size=20):
        numbers = [int(n) for n in re.findall(r"\d+", example.prompt)]
        right = numbers[0] % 2 if name == "parity" else int(numbers[1] > numbers[0])
        assert example.answer == right


def test_k_shot_balances_answers():
    examples = task_examples("polarity", size=60)
    chosen = k_shot(examples, 8, seed=3)
    assert sorted(e.answer for e in chosen) == [0] * 8 + [1] * 8
    assert chosen == k_shot(examples, 8, seed=3) != k_shot(examples, 8, seed=4)
    with pytest.raises(CheckpointError, match="expected at least 100"):
        k_shot(examples, 100)


@pytest.mark.parametrize(("answer", "refs", "expected"), [("", ["x"], 0.0), ("a b", ["b c"], 2 / 3), ("x", [], 0.0)])
def test_answers_are_scored_by_shared_words(answer, refs, expected):
    assert f1(answer, refs) == pytest.approx(expected, abs=0.01) and exact_match(answer, refs) == 0


def test_label_words_equal_the_candidates_likelihoods():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers = torch.tensor([0, 1, 1, 0, 2])
    words = [3, 7, 11]
    likelihoods = logits.log_softmax(-1)[:, words]
    torch.testing.assert_close(
        label_words(logits[:, words], answers),
        functional.cross_entropy(likelihoods.float(), answers),
        rtol=1e-6,
        atol=1e-6,
    )


def test_candidate_scores_are_means_over_what_is_predicted():
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    found = candidate_scores(logits, torch.tensor([[-100, 3, 4], [-100, -100, 5]]))
    log = logits.log_softmax(-1)
    torch.testing.assert_close(found, torch.stack([(log[0, 1, 3] + log[0, 2, 4]) / 2, log[1, 2, 5]]))


def test_a_likelihood_learns_from_the_right_candidate_alone():
    scores = torch.tensor([[-1.0, -5.0], [-2.0, -torch.inf]])
    assert multiple_choice(scores, torch.tensor([1, 0]), learn="likelihood") == 3.5


def batch(**knobs):
    model = tiny_llama().eval()
    examples = [Example("good", ("a", "b"), 0), Example("bad one", ("a", "b"), 1)]
    return model, TaskLoss(model, byte_tokenizer(), examples, **knobs)


def test_the_short_way_to_label_words_gives_the_long_way_s_loss():
    model, short = batch()
    assert short.words and short.batch["input_ids"].shape[0] == 2
    tokens = byte_tokenizer()
    asked = [Question(tokens(p)["input_ids"], [tokens(c)["input_ids"] for c in "ab"]) for p in ("good", "bad one")]
    long = answer_batch(asked, pad=0, words=False)
    assert long["input_ids"].shape[0] == 4
    scores = answer_scores(model, long, words=[])[0]
    expected = functional.cross_entropy(scores, torch.tensor([0, 1]))
    torch.testing.assert_close(short(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(short.correct(), scores.argmax(-1) == torch.tensor([0, 1]))


@pytest.mark.parametrize("branches", [1, 2])
def test_logits_are_computed_only_where_a_candidate_is_predicted(branches):
    model = tiny_llama().eval()
    asked = [Question([5, 6, 7, 8, 9], [[10, 11], [12]]), Question([13], [[14, 15, 16]])]
    batch = answer_batch(asked, pad=0, words=False)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2]))
    found = answer_scores(model, batch, words=[], branches=branches)
    handle.remove()
    assert seen == [(3 * branches, 3)] and len(found) == branches
    for index, question in enumerate(asked):
        for place, candidate in enumerate(question.candidates):
            ids = torch.tensor([[*question.prompt, *candidate]])
            log = model(ids).logits[0].log_softmax(-1)
            start = len(question.prompt)
            each = [log[start + i - 1, token] for i, token in enumerate(candidate)]
            torch.testing.assert_close(found[-1][index, place], torch.stack(each).mean(), rtol=1e-4, atol=1e-5)
    assert found[0][1, 1] == -torch.inf


def test_prompts_and_candidates_without_tokens_are_refused():
    with pytest.raises(CheckpointError, match="candidate has no tokens"):
        answer_batch([Question([1], [[]])], pad=0, words=False)
    with pytest.raises(CheckpointError, match="prompt has no tokens"):
        answer_batch([Question([], [[2]])], pad=0, words=True)


def test_a_task_loss_is_what_an_optimizer_asks_for():
    model, loss = batch()
    # A rate at which steps are small: at a larger one the course hangs on the last bits of every sum.
    optimizer = TeZO(model.named_parameters(), lr=2e-3, rank=4, engine="adapter")
    optimizer.attach(model)
    values = [optimizer.step(loss).item() for _ in range(30)]
    assert values[-1] < values[0]


def test_candidates_of_unequal_number_and_text_losses():
    model = tiny_llama().eval()
    examples = [Example("x", ("ab", "c", "d"), 2), Example("y", ("e", "f"), 0)]
    loss = TaskLoss(model, byte_tokenizer(), examples)
    assert loss.scores().shape == (2, 3) and loss.scores()[1, 2] == -torch.inf and torch.isfinite(loss())
    text = TaskLoss(model, byte_tokenizer(), [Example("x", references=("yes",))], train="text")
    assert text() > 0
    with pytest.raises(UnsupportedError, match="no candidates to compare"):
        TaskLoss(model, byte_tokenizer(), [Example("x", references=("yes",))])
    with pytest.raises(RecipeError, match="no examples"):
        TaskLoss(model, byte_tokenizer(), [])


def test_a_reward_without_a_gradient_is_maximized():
    weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    words = ["no", "maybe", "yes"]
    loss = reward_loss(
        lambda prompts: [words[int(weight.detach().sum().clamp(0, 2).round())] for _ in prompts],
        [Example("q", references=("yes",))],
        lambda answer, refs: words.index(answer) / 2,
    )
    optimizer = MeZO([("w", weight)], lr=0.1, eps=1.0, queries=4)
    for _ in range(60):
        optimizer.step(loss)
    assert loss() == -1.0
