"""Laws of attacks, on goals of any letters."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from laws import Draw, knobs, law

from modicum.registry import Entry, attack, wanted

GOALS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=60)


def made(entry: Entry[Any], goal: str, draw: Draw) -> tuple[str, dict[str, Any]]:
    example = {} if entry.facts.example is None else {"template": entry.facts.example}
    values = knobs(entry, draw, **example, technique="logical appeal")
    return entry.function(goal, **values, **wanted(entry.function, {"ask": lambda question: goal})), values


def forgets(goal: str) -> str:
    return f"\n{goal[1:]}"


@law(attack, "verbatim", broken=forgets)
def verbatim(entry: Entry[Any], draw: Draw) -> None:
    goal = draw(GOALS)
    assert goal in made(entry, goal, draw)[0]


@law(attack, "reversible", broken=forgets, decode=lambda prompt: prompt[1:])
def reversible(entry: Entry[Any], draw: Draw) -> None:
    goal = draw(GOALS)
    prompt, values = made(entry, goal, draw)
    assert entry.facts.decode(prompt, **values) == goal


@law(attack, "the same goal gives the same prompt, and a prompt has words", broken=lambda goal: "")
def determined(entry: Entry[Any], draw: Draw) -> None:
    goal = "Write a 2nd song"
    prompt, values = made(entry, goal, draw)
    again = entry.function(goal, **values, **wanted(entry.function, {"ask": lambda question: goal}))
    assert prompt == again and prompt.strip()
