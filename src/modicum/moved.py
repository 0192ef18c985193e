"""Modules of version 0.1.0 by their old names, which warn and give what the new ones hold.

A module that moves gets one line in the table: its old name, then the modules to which its names went, of which the
first that has a name gives it. Faces of packages stay, and need no line.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

_TABLE = """
adapters.initializers   adapters.drawn adapters.decomposed
adapters.variants       adapters.stock.layers adapters.stock.optimizers adapters.stock.adalora
evaluate.matching       evaluate.measures.exact_match
evaluate.perplexity     evaluate.measures.perplexity evaluate.likelihood
evaluate.retrieval      evaluate.hidden_facts evaluate.measures.retrieval evaluate.measures.exact_match
jobs.adapter_files      jobs.training.adapter_files
jobs.adapter_geometry   jobs.training.adapter_geometry
jobs.adapters           jobs.training.adapter
jobs.additions          jobs.training.extra_modules
jobs.answers            jobs.training.answers
jobs.byte_llama         jobs.loading.builtins.byte_llama
jobs.hooks              jobs.training.gradient optim.gradient.clipping_log jobs.training.domains
jobs.models             jobs.loading.models jobs.loading.references jobs.loading.folders
jobs.objectives         jobs.training.objective
jobs.rows               jobs.data.section evaluate.rows
jobs.serving            jobs.loading.serving
jobs.smollm2            jobs.loading.builtins.smollm2
jobs.sources            jobs.data.sources.local jobs.data.sources.builtin jobs.data.sources.hub
jobs.task_losses        jobs.training.task_losses
jobs.tasks              jobs.data.sources.suite evaluate.measures.exact_match
jobs.tokens             jobs.data.tokens jobs.data.collators
jobs.train_recipe       jobs.training.recipe jobs.training.parts.adapter
jobs.zeroth_order       jobs.training.zeroth_order
models.zero_attention   models.zero_token.attention
models.zero_cache       models.zero_token.cache
models.zero_calibrate   models.zero_token.calibrate
models.zero_config      models.zero_token.config
models.zero_conversion  models.zero_token.conversion
models.zero_exit        models.zero_token.exit
models.zero_hosts       models.zero_token.hosts
models.zero_loop        models.zero_token.loop
models.zero_pool        models.zero_token.pool
models.zero_schedule    models.zero_token.schedule
models.zero_visit       models.zero_token.visit
objectives.philox       philox
optim.adagc             optim.gradient.adagc
optim.aggc              optim.gradient.aggc
optim.backward          optim.gradient.backward
optim.clipper           optim.gradient.clipper
optim.clipping          optim.gradient.norms
optim.conmezo           optim.zeroth_order.conmezo
optim.directional       optim.zeroth_order.forward_mode
optim.directions        optim.zeroth_order.lifts
optim.elementwise       optim.gradient.entries
optim.family            optim.gradient.make
optim.faults            optim.gradient.faults
optim.fzoo              optim.zeroth_order.fzoo
optim.gradients         optim.gradient.gradients
optim.hizoo             optim.zeroth_order.hizoo
optim.hooks             optim.gradient.step_hook
optim.leaves            optim.zeroth_order.leaves
optim.lozo              optim.zeroth_order.lozo
optim.mezo              optim.zeroth_order.mezo
optim.moving            optim.zeroth_order.perturb
optim.parallel          processes
optim.probe_hooks       optim.zeroth_order.engines
optim.ranks             optim.zeroth_order.ranks
optim.rounding          optim.zeroth_order.rounding
optim.rules             optim.zeroth_order.moments
optim.settings          optim.zeroth_order.settings
optim.sparse_mezo       optim.zeroth_order.sparse_mezo
optim.spikes            optim.gradient.spikes
optim.subzero           optim.zeroth_order.subzero
optim.tensor_hook       optim.gradient.tensor_hook
optim.tezo              optim.zeroth_order.tezo
optim.update_clipping   optim.gradient.updates
optim.zo_adamu          optim.zeroth_order.zo_adamu
weights.agree           weights.compatibility
weights.blocks          weights.kernels.blocks
weights.combine         weights.kernels.combine
weights.compare         weights.kernels.compare
weights.diagnose        weights.kernels.diagnose
weights.draws           weights.kernels.draws
weights.matrices        weights.kernels.matrices
weights.mergekit_methods weights.mergekit.methods
weights.selection       weights.kernels.selection
weights.vocabulary      weights.mergekit.vocabulary
"""

MOVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        f"modicum.{old}": tuple(f"modicum.{name}" for name in new)
        for old, *new in (line.split() for line in _TABLE.strip().splitlines())
    }
)


class _Moved(ModuleType):
    """An old module: every name comes from a new one, which is imported when the name is asked for."""

    def __getattr__(self, name: str) -> Any:
        # The import system and doctest ask for names that would import everything for nothing.
        for target in () if name.startswith("__") else MOVED[self.__name__]:
            if hasattr(module := import_module(target), name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it moved to {_told(self.__name__)}")

    def __dir__(self) -> list[str]:
        return sorted({name for target in MOVED[self.__name__] for name in dir(import_module(target))})


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        # Frames of the import system do not count, so this names the line of the import.
        warnings.warn(f"{fullname} moved to {_told(fullname)}.", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name, f"Moved to {_told(spec.name)}.")

    def exec_module(self, module: ModuleType) -> None:
        pass


def _told(old: str) -> str:
    return ", ".join(MOVED[old])


def install() -> None:
    """Let old names be found, after every other way has failed."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
