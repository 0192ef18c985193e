"""Write the looped model's code as one file that needs torch and transformers alone: code that a checkpoint can carry.

The modules of this package are put one after the other, without their imports of each other; what they use of the rest
of modicum comes along as source, or as a stand-in where only annotations name it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
from types import ModuleType
from typing import Any

from modicum import errors, random
from modicum.errors import ModicumError, RecipeError, UnsupportedError
from modicum.layout import LAYER_LISTS

FILE = "modeling_zero_token.py"
_PARTS = (
    "attention", "schedule", "hosts", "config", "cache", "exit", "some", "visit", "criterion", "loop", "spent",
    "pool", "body", "looped", "speculation", "model",
)  # fmt: skip
_OURS = ("modicum", "jaxtyping", "annotated_types")
_HEAD = '''"""A looped model with zero tokens (Zero Token Transformer, arXiv:2502.12214) in one file, by modicum.

transformers loads it beside its weights with trust_remote_code=True. Licence: Apache-2.0.
"""
'''
_STAND_INS = '''
class _Shaped:
    """Stands for the shapes of tensors in annotations."""

    def __class_getitem__(cls, _: Any) -> Any:
        return Tensor


Float = Int = Bool = _Shaped
UnitInterval = Positive = NonNegative = float
PositiveInt = NonNegativeInt = int


def _bound(value: Any) -> Any:
    return value


Ge = Lt = _bound


def fields_of(_: type) -> Any:
    """Say of which class the keys are fields; nothing here asks."""
    return lambda keys: keys

'''
_AUTO = {
    "AutoConfig": "ZeroTokenConfig",
    "AutoModel": "ZeroTokenModel",
    "AutoModelForCausalLM": "ZeroTokenForCausalLM",
    "AutoModelForSequenceClassification": "ZeroTokenForSequenceClassification",
    "AutoModelForTokenClassification": "ZeroTokenForTokenClassification",
}


def auto_map() -> dict[str, str]:
    """Return what ``config.json`` says of the classes in the file."""
    return {auto: f"{FILE.removesuffix('.py')}.{name}" for auto, name in _AUTO.items()}


def source() -> str:
    """Return the file.

    Raises:
        ValueError: Two modules give the same name to different things.
    """
    modules = [importlib.import_module(f"modicum.models.zero_token.{name}") for name in _PARTS]
    imports: set[str] = {"from hashlib import blake2b", "from difflib import get_close_matches"}
    imports |= {"from collections.abc import Iterable", "from typing import Any", "from torch import Tensor"}
    owners: dict[str, str] = {}
    bodies = []
    for module in modules:
        bodies.append(_body(module, imports, owners))
    shared: list[Any] = [ModicumError, RecipeError, UnsupportedError, errors.CheckpointError, errors.did_you_mean]
    shared += [random.derive_seed, random.generator]
    parts = [_HEAD, "from __future__ import annotations\n", "\n".join(sorted(imports)), _STAND_INS]
    parts += [f"LAYER_LISTS = frozenset({sorted(LAYER_LISTS)})\n"]
    parts += [inspect.getsource(each) + "\n" for each in shared] + bodies
    parts.append(
        "def __getattr__(name: str) -> Any:\n"
        '    """Return a class of this file by its name, which is how pickle finds it."""\n'
        "    return (_named_model if name.startswith('ZeroToken') else _named_body)(name)\n"
    )
    text = "\n".join(parts)
    # Two such files, and modicum itself, may be loaded at once: each has an attention function of its own.
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return text.replace('"modicum_zero_token"', f'"zero_token_{digest}"')


def _body(module: ModuleType, imports: set[str], owners: dict[str, str]) -> str:
    """Return a module without its imports, which go into ``imports``; note its names in ``owners``."""
    text, name = inspect.getsource(module), module.__name__.rpartition(".")[2]
    tree, lines = ast.parse(text), text.splitlines()
    first = tree.body[0]  # the module's docstring stays, as a comment
    for i in range(first.lineno - 1, first.end_lineno or 1):
        lines[i] = f"# {lines[i].strip().strip('r').strip(chr(34))}".rstrip()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            whole = ast.unparse(node)
            ours = isinstance(node, ast.ImportFrom) and str(node.module).startswith(_OURS)
            if node.col_offset and not ours:
                continue  # inside a function
            if not ours and "__future__" not in whole:
                imports.add(whole)
            _blank(lines, node, "pass" if node.col_offset else "")
    for node in tree.body:
        if ("_auto" in (said := ast.unparse(node)) and "register" in said) or said.startswith("AutoConfig.register"):
            _blank(lines, node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            _own(owners, node.name, name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                _own(owners, ast.unparse(target), name)
    text = (
        "\n".join(lines)
        .replace("hosts.", "")
        .replace("loop.", "")
        .replace("def __getattr__(name: str)", f"def _named_{name}(name: str)")
    )
    return text + "\n"


def _own(owners: dict[str, str], what: str, module: str) -> None:
    if owners.setdefault(what, module) != module and what not in ("logger", "__getattr__"):
        raise ValueError(f"{what} is of {owners[what]} and of {module}: in one file they would be the same.")


def _blank(lines: list[str], node: ast.stmt, instead: str = "") -> None:
    for i in range(node.lineno - 1, node.end_lineno or node.lineno):
        lines[i] = ""
    if instead:
        lines[node.lineno - 1] = " " * node.col_offset + instead
