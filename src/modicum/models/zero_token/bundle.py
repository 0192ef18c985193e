"""Write the looped model's code as one file that needs torch and transformers alone: code that a checkpoint can carry.

The modules of this package are put one after the other, without their imports of each other; what they use of the rest
of modicum comes along as source, or as a stand-in where only annotations name it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import symtable
import sys
from types import ModuleType

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
_STOOD_IN = [one.get_name() for one in symtable.symtable(_STAND_INS, "", "exec").get_symbols() if one.is_assigned()]
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
    imports = {"from typing import Any", "from torch import Tensor"}  # for the stand-ins
    owners: dict[str, str] = {}
    shared = dict.fromkeys(_STOOD_IN, "") | {"LAYER_LISTS": f"LAYER_LISTS = frozenset({sorted(LAYER_LISTS)})\n"}
    bodies = []
    for module in modules:
        bodies.append(_body(module, imports, owners))
        for name, statement in _imported(module).items():
            if _is_shared(statement):
                _bring(name, module, shared, imports)
    parts = [_HEAD, "from __future__ import annotations\n", "\n".join(sorted(imports)), _STAND_INS]
    parts += [*filter(None, shared.values()), *bodies]
    parts.append(
        "def __getattr__(name: str) -> Any:\n"
        '    """Return a class of this file by its name, which is how pickle finds it."""\n'
        "    return (_named_model if name.startswith('ZeroToken') else _named_body)(name)\n"
    )
    text = "\n".join(parts)
    # Two such files, and modicum itself, may be loaded at once: each has an attention function of its own.
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return text.replace('"modicum_zero_token"', f'"zero_token_{digest}"')


def _bring(name: str, module: ModuleType, shared: dict[str, str], imports: set[str]) -> None:
    """Put into ``shared`` the source of what a module calls ``name``, after all that this in turn is made of."""
    if name in shared:
        return
    value = getattr(module, name)
    home, text = sys.modules[value.__module__], inspect.getsource(value)
    shared[name] = ""  # it may name itself
    taken = _imported(home)
    for used in sorted(_globals(symtable.symtable(text, "", "exec"))):
        if used in taken and not _is_shared(taken[used]):
            imports.add(taken[used])
        elif type(value := vars(home).get(used)) in (int, float, str) and not used.startswith("__"):
            if shared.setdefault(used, told := f"{used} = {value!r}\n") != told:
                raise ValueError(f"{used} of {home.__name__} is not that of another module. Rename one.")
        elif used in taken or getattr(value, "__module__", None) == home.__name__:
            _bring(used, home, shared, imports)
    del shared[name]
    shared[name] = text + "\n"


def _globals(table: symtable.SymbolTable) -> set[str]:
    """Return the names of its module that a piece of source reads."""
    here = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module")
    }
    return here.union(*map(_globals, table.get_children()))


def _imported(module: ModuleType) -> dict[str, str]:
    """Return the statement behind each name that a module imports."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                one = (
                    ast.ImportFrom(node.module, [alias], 0) if isinstance(node, ast.ImportFrom) else ast.Import([alias])
                )
                found[alias.asname or alias.name.partition(".")[0]] = ast.unparse(one)
    return found


def _is_shared(statement: str) -> bool:
    """Whether an import is of modicum, and not of this package."""
    return statement.startswith("from modicum") and not statement.startswith("from modicum.models.zero_token")


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
