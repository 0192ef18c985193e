from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from modicum.report import sections, write
from modicum.report.evaluations import boards
from modicum.report.layers import LayerMap, mean, norm
from modicum.report.runs import RunView
from modicum.report.sections import Section
from modicum.report.text import redact
from report_runs import (
    broken_pipeline,
    cells,
    long_training,
    merge_layers,
    perplexities,
    quickstart,
    training_log,
    write_run,
)

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects what stands in them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def read(path: Path) -> tuple[Outline, str]:
    """The parsed page, and its text with plain spaces."""
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert not outline.open
    return outline, " ".join(" ".join(outline.text).split())


def page_of(folder: Path) -> str:
    return read(write([folder]))[1]


def evaluation(folder: Path, *results: tuple[str, str, float], **extra: Any) -> Path:
    rows = [{"model": m, "task": t, "metric": "exact_match", "value": v} | extra for m, t, v in results]
    return write_run(folder, "evaluate", metrics={"cells": rows})


def test_the_report_of_a_pipeline_tells_what_came_out(tmp_path: Path) -> None:
    outline, text = read(write([quickstart(tmp_path / "quickstart")]))
    assert "tsv does best on average over 2 tasks: exact match 78.1%, base 5.8%." in text
    assert "spelling brought the training loss from" in text
    assert "The experts' changes are nearly orthogonal: their mean cosine is" in text
    assert text.count("The processor has no fast bfloat16: training in float32.") == 1
    titles = [attrs["id"] for tag, attrs in outline.tags if tag == "section"]
    assert titles == [
        "summary",
        "results",
        "paired-differences",
        "training",
        "inside-the-merge",
        "measurements",
        "course",
        "how-it-was-made",
    ]


def test_the_report_needs_no_network_and_no_script(tmp_path: Path) -> None:
    path = write([quickstart(tmp_path / "quickstart")])
    outline, _ = read(path)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in outline.tags}
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in outline.tags)
    assert not re.search(r"url\(|@import|https?://", path.read_text())
    policies = [attrs["content"] for _, attrs in outline.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_picture_is_told_in_words_and_links_lead_somewhere(tmp_path: Path) -> None:
    outline, _ = read(write([quickstart(tmp_path / "quickstart")]))
    pictures = [attrs for _, attrs in outline.tags if attrs.get("role") == "img"]
    assert len(pictures) == 9  # loss, three side figures, norms by layer, two maps of norms, cosines, conflicts
    assert all(attrs["aria-label"] for attrs in pictures)
    anchors = {attrs["id"] for _, attrs in outline.tags if "id" in attrs}
    links = {(attrs["href"] or "").removeprefix("#") for tag, attrs in outline.tags if tag == "a"}
    assert links and links <= anchors


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    run = quickstart(tmp_path / "quickstart")
    first = write([run], tmp_path / "a.html").read_bytes()
    assert first == write([run], tmp_path / "b.html").read_bytes()


def test_importing_and_writing_load_no_heavy_library(tmp_path: Path) -> None:
    run = quickstart(tmp_path / "quickstart")
    code = (
        "import sys, pathlib, modicum.report as report\n"
        "assert not {'jinja2', 'yaml', 'rich', 'torch'} & set(sys.modules)\n"
        f"report.write([pathlib.Path({str(run)!r})])\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_and_texts_of_a_run_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    rows = [row | {"model": evil + row["model"], "task": evil + row["task"]} for row in cells()]
    layers = merge_layers((evil + "a", evil + "b"), layers=2)
    layers["names"] = [f"{name}.{evil}" for name in layers["names"]]
    pair = {"a": evil, "b": evil, "task": evil, "metric": "accuracy", "difference": 0.1}
    stage = write_run(
        tmp_path / "p" / "stages" / "one",
        evil,
        status="failed",
        error=evil,
        notes=[evil],
        metrics={"cells": rows, "layers": layers, "pairs": [pair], evil: evil},
        log=training_log(5, 2, 1),
        outputs={evil: evil},
        environment={"processor": evil, "versions": {evil: evil}},
        recipe={evil: evil},
    )
    listed = [{"name": evil, "job": evil, "status": evil, "folder": "stages/one"}]
    write_run(tmp_path / "p", "pipeline", stages=listed, recipe={evil: evil})
    for folder in (tmp_path / "p", stage):
        outline, text = read(write([folder]))
        assert not {"script", "img"} & {tag for tag, _ in outline.tags}
        assert not any("onerror" in name for _, attrs in outline.tags for name in attrs)
        assert "<script>alert(1)</script>" in text


def test_half_a_character_does_not_stop_the_page(tmp_path: Path) -> None:
    assert "note ?" in page_of(write_run(tmp_path / "run", "train", notes=["note \ud83d"]))


def test_keys_and_passwords_do_not_reach_the_page(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        "train",
        status="failed",
        error="401 for https://ann:pa55word@example.org/v1",
        notes=["pushed with hf_abcdefghijklmnopqrstuvwx"],
        recipe={"trainer": {"hub_token": "plain-old-token", "learning_rate": 2e-4}, "mask_token": "<mask>"},
    )
    page = write([run]).read_text()
    assert not any(secret in page for secret in ("pa55word", "hf_abcdefgh", "plain-old-token"))
    assert "learning_rate: 0.0002" in page and "&lt;mask&gt;" in page


@pytest.mark.parametrize("key", ["hub_token", "token", "API_KEY", "apikey", "judge_password", "client_secret"])
def test_a_secret_is_known_by_its_key(key: str) -> None:
    assert redact({"a": [{key: "x"}]}) == {"a": [{key: "(hidden)"}]}


@pytest.mark.parametrize("key", ["mask_token", "pad_token", "tokens", "max_new_tokens", "api_key_env"])
def test_a_harmless_key_is_shown(key: str) -> None:
    assert redact({key: "x"}) == {key: "x"}


def test_a_failed_pipeline_shows_the_error_once_and_what_never_began(tmp_path: Path) -> None:
    text = page_of(broken_pipeline(tmp_path / "nightly"))
    assert text.count("experts[1] has no tensor") == 1
    assert "third waiting Not started." in text
    assert "first brought the training loss" in text


def test_a_running_job_is_reported_as_it_stands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "train", status="running", seconds=0.0, log=training_log(7, 2.0, 1.0))
    with (run / "log.jsonl").open("a") as log:
        log.write('{"event": "train", "step": 8, "lo')
    text = page_of(run)
    assert "Not finished: still running, or interrupted." in text
    assert "run has brought the training loss from" in text and "in 7 steps" in text


def test_several_training_runs_are_overlaid_each_with_its_color(tmp_path: Path) -> None:
    runs = [long_training(tmp_path / name, seed=i) for i, name in enumerate("abc")]
    outline, text = read(write(runs))
    solid = [
        attrs["class"] for tag, attrs in outline.tags if tag == "path" and (attrs.get("class") or "")[:5] == "solid"
    ]
    assert solid == ["solid c0", "solid c1", "solid c2"]
    assert text.startswith("a, b and c") and "3 runs side by side" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / seed / "train", "train", log=training_log(4, 2, 1)) for seed in ("seed0", "seed1")]
    text = read(write(runs, tmp_path / "both.html"))[1]
    assert "seed0/train and seed1/train" in text


def test_stages_of_two_pipelines_say_whose_they_are(tmp_path: Path) -> None:
    text = read(write([quickstart(tmp_path / "a"), quickstart(tmp_path / "b")]))[1]
    assert "a/spelling" in text and "b/spelling" in text


def test_best_and_worst_of_a_task_are_marked_in_words_too(tmp_path: Path) -> None:
    text = page_of(evaluation(tmp_path / "run", ("a", "t", 0.5), ("b", "t", 0.75), ("c", "t", 0.25)))
    assert "75.0% (best of the column)" in text and "25.0% (worst of the column)" in text
    assert text.count("of the column)") == 2


def test_lower_is_better_for_perplexity(tmp_path: Path) -> None:
    text = page_of(perplexities(tmp_path / "run"))
    assert "Perplexity, lower is better" in text
    assert "10.8 (best of the column)" in text and "33.5 (worst of the column)" in text
    assert "runs/stdlib-plain/model does best on average over 3 tasks: perplexity 19.8." in text


def test_equal_models_have_no_best(tmp_path: Path) -> None:
    text = page_of(evaluation(tmp_path / "run", ("a", "t", 0.5), ("b", "t", 0.5)))
    assert "of the column)" not in text and "does best" not in text


def test_a_model_that_lacks_a_task_has_no_mean() -> None:
    (board,) = boards(
        [("", {"cells": [row for row in cells() if (row["model"], row["task"]) != ("ties", "chain_sum")]})]
    )
    assert "ties" not in board.means and "ties" not in board.worst_tasks
    assert board.means["tsv"] == pytest.approx((0.82 + 0.742) / 2)
    assert board.worst_tasks["spelling"] == 0.06


def test_a_model_measured_by_two_runs_appears_twice(tmp_path: Path) -> None:
    runs = [
        evaluation(tmp_path / name, ("ties", "t", value), ("base", "u", 0.1))
        for name, value in (("x", 0.5), ("y", 0.6))
    ]
    text = read(write(runs))[1]
    assert "ties · x" in text and "ties · y" in text and "ties · y does best" not in page_of(runs[1])
    assert "50.0%" in text and "60.0%" in text


def test_metrics_are_never_averaged_together(tmp_path: Path) -> None:
    rows = [
        {"model": m, "task": t, "metric": metric, "value": v}
        for m in ("a", "b")
        for t, metric, v in (("sum", "exact_match", 0.5), ("text", "perplexity", 12.0))
    ]
    found = boards([("", {"cells": rows})])
    assert [(board.metric, board.tasks) for board in found] == [("exact_match", ["sum"]), ("perplexity", ["text"])]
    assert "Mean" not in page_of(write_run(tmp_path / "run", "evaluate", metrics={"cells": rows}))


def test_a_lead_within_the_interval_is_not_called_a_win(tmp_path: Path) -> None:
    rows = [
        {"model": m, "task": "t", "metric": "exact_match", "value": v, "low": v - 0.1, "high": v + 0.1, "n": 80}
        for m, v in (("a", 0.5), ("b", 0.55), ("c", 0.1))
    ]
    text = page_of(write_run(tmp_path / "run", "evaluate", metrics={"cells": rows}))
    assert "its interval overlaps that of a, so the lead may be chance." in text


def test_a_difference_is_colored_only_when_its_interval_leaves_out_zero(tmp_path: Path) -> None:
    found = [
        {"a": "x", "b": y, "task": "t", "metric": "accuracy", "difference": 0.1, "low": low, "high": 0.3}
        | {"better": "higher", "unit": "share"}
        for y, low in (("sure", 0.01), ("unsure", -0.01))
    ]
    page = write([write_run(tmp_path / "run", "evaluate", metrics={"pairs": found})]).read_text()
    rows = re.findall(r'<tr( class="best")?><th scope="row">x <span class="against">vs (\w+)', page)
    assert rows == [(' class="best"', "sure"), ("", "unsure")]
    assert "+10.0 pp" in page


def test_tensors_are_sorted_into_layers_and_modules() -> None:
    where = LayerMap(
        ["wte.weight", "h.1.attn.c_attn.weight", "h.0.attn.c_attn.weight", "h.0.ln_1.weight", "h.0.ln_1.bias"]
    )
    assert where.layers == [0, 1]
    assert where.labels == ["c_attn", "ln_1", "bias"]
    assert where.outside == [0]
    assert where.matrix([9.0, 1.0, 2.0, 3.0, None], mean) == [[2.0, 1.0], [3.0, None], [None, None]]
    assert where.by_layer([9.0, 1.0, 4.0, 3.0, None], norm) == [5.0, 1.0]


def test_names_that_would_clash_keep_their_parents() -> None:
    where = LayerMap([f"model.layers.0.{part}.proj.weight" for part in ("self_attn", "mlp")])
    assert where.labels == ["self_attn.proj", "mlp.proj"]


def test_the_experts_of_a_mixture_are_taken_together() -> None:
    where = LayerMap([f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(2) for e in range(64)])
    assert where.kinds == ["mlp.experts.*.up_proj"]
    assert where.by_layer([1.0] * 128, norm) == [8.0, 8.0]


def test_tensors_that_no_expert_changed_are_left_out(tmp_path: Path) -> None:
    layers = {
        "names": ["model.embed_tokens.weight", "model.layers.0.q.weight", "model.layers.0.ln.weight"],
        "norms": {"a": [0.0, 3.0, 0.0], "b": [0.0, 4.0, 2.0]},
        "cosines": {"a|b": [0.0, 0.8, 0.0]},
    }
    text = page_of(write_run(tmp_path / "run", "merge", metrics={"layers": layers}))
    assert "1 tensor that no expert changed is left out." in text and "embed_tokens" not in text
    # The unchanged tensors' cosines are not part of the mean.
    assert "largely agree: their mean cosine is 0.80" in text


def test_steps_logged_twice_by_a_resumed_run_count_once(tmp_path: Path) -> None:
    log = [
        {"event": "train", "step": step, "loss": loss}
        for step, loss in ((1, 3.0), (2, 9.0), (3, 9.0), (2, 2.0), (3, 1.0))
    ]
    text = page_of(write_run(tmp_path / "run", "train", log=log))
    assert "brought the training loss from 3.00 to 1.00 in 3 steps" in text and "9.00" not in text


def test_many_experts_share_one_picture(tmp_path: Path) -> None:
    layers = merge_layers(("a", "b", "c", "d", "e"), layers=4)
    outline, text = read(write([write_run(tmp_path / "run", "merge", metrics={"layers": layers})]))
    described = [attrs["aria-label"] or "" for _, attrs in outline.tags if attrs.get("role") == "img"]
    assert sum("cosine" in words for words in described) == 1
    assert any("10 rows by 4 layers" in words for words in described)
    assert "a and b" in text


def test_merges_of_the_same_experts_are_drawn_once(tmp_path: Path) -> None:
    quickstart(tmp_path / "quickstart")
    outline, _ = read(write([tmp_path / "quickstart"]))
    assert sum("agree" in text for text in outline.text) == 1


@pytest.mark.parametrize("conflict", [{"a|b": [0.1, 0.2]}, [0.1, 0.2]])
def test_sign_conflicts_are_drawn_when_there(tmp_path: Path, conflict: object) -> None:
    layers = {"names": ["model.layers.0.q.weight", "model.layers.1.q.weight"], "conflict": conflict}
    assert "Where do their signs conflict?" in page_of(write_run(tmp_path / "run", "merge", metrics={"layers": layers}))


def test_a_new_section_is_a_function_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "_sections", dict(sections._sections))

    @sections.section(order=5)
    def mine(run: RunView) -> Section | None:
        from markupsafe import Markup

        return Section("Mine", Markup("<p>{}</p>").format(run.job), findings=("it works",))

    outline, text = read(write([write_run(tmp_path / "run", "train", log=training_log(3, 2, 1))]))
    assert "it works" in text and "Mine train" in text
    assert [attrs["id"] for tag, attrs in outline.tags if tag == "section"][:3] == ["summary", "mine", "training"]


def test_figures_that_nobody_draws_are_tabulated(tmp_path: Path) -> None:
    metrics = {"peak_bytes": 1_900_000_000, "regret": {"final": 0.25}, "label": "x" * 100, "flag": True}
    text = page_of(write_run(tmp_path / "run", "coordinate", metrics=metrics))
    assert "peak bytes 1.9 GB" in text and "regret: final 0.250" in text and "flag True" in text
    assert "xxx" not in text
