"""YAML as recipes and run folders hold it: plain data, keys that stand once, and no more values than somebody wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from modicum.borders import MALFORMED, OURS, check_plain
from modicum.errors import CheckpointError, RecipeError, first_line

LONGEST = 4 << 20  # bytes of a document; reading so many takes four seconds
MOST_NODES = 50_000  # values of a document; reading so many takes two seconds


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-4`` is a number, and keys that stand twice are noticed."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.twice: list[str] = []
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._nodes += 1
        if self._nodes > MOST_NODES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_NODES} values, which is no recipe", problem_mark=mark)
        return super().compose_node(parent, index)

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None:
            _expanded(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            # A merge key (<<) may come several times by the standard.
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                self.twice.append(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes a document has once its aliases are written out.

    Raises:
        MarkedYAMLError: So many that nobody wrote them, or without end.
    """
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # what is met again inside itself has no end
        parts = node.value if isinstance(node.value, list) else []
        inner = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_expanded(child, known) for child in inner)
    if known[id(node)] > MOST_NODES:
        raise yaml.MarkedYAMLError(
            problem=f"its aliases (*name) stand for more than {MOST_NODES} values, write them out",
            problem_mark=node.start_mark,
        )
    return known[id(node)]


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    text = str(loader.construct_scalar(node))
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return text


_Loader.add_implicit_resolver(
    "!scientific", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_constructor("!scientific", _float)


def parse_yaml(text: str, source: str = "the recipe") -> Any:
    """Parse YAML, refusing duplicate keys and reading ``1e-4`` as a number.

    Example:
        >>> parse_yaml("lr: 1e-4")
        {'lr': 0.0001}
    """
    found = parse_documents(text, source)
    if len(found) > 1:
        raise RecipeError(f"{source} holds {len(found)} YAML documents, expected one. Only mergekit's may be several.")
    return found[0] if found else None


def parse_documents(text: str, source: str) -> list[Any]:
    """Return the documents of a YAML file.

    Of a key that stands twice the last one counts in a mergekit file, which then says so under ``twice``; in all others
    it is refused.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"{source} has more than {LONGEST >> 20} MiB, which is no recipe. Check the path.")
    found = []
    try:
        loader = _Loader(text)
        while loader.check_data():  # type: ignore[no-untyped-call]
            loader.twice = []
            data = loader.get_data()
            if loader.twice and is_mergekit(data):
                data |= {"twice": loader.twice}
            elif loader.twice:
                raise RecipeError(f"{source}, {loader.twice[0]}. Keep one.")
            found += [] if data is None else [data]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error).rstrip(".")
        raise RecipeError(f"{source}{where} is not valid YAML: {problem}.") from None
    except MALFORMED as error:
        kind = "nested too deeply" if isinstance(error, RecursionError) else first_line(error).rstrip(".")
        raise RecipeError(f"{source} is not YAML that can be read: {kind}.") from None
    return found


def is_mergekit(data: object) -> bool:
    """Whether the data of a file are a merge as mergekit writes it."""
    return isinstance(data, dict) and "merge_method" in data


def stored_yaml(path: Path) -> Any:
    """Return what a YAML file of a run's folder holds.

    Raises:
        CheckpointError: It cannot be read, or is no YAML.
    """
    check_plain(path, OURS)
    try:
        if path.stat().st_size > LONGEST:
            raise CheckpointError(f"{path} has {path.stat().st_size / 1e6:.0f} MB, which is no recipe. Delete it.")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)} Restore it, or delete it.") from None
