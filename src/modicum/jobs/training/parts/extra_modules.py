"""Train and save what a conversion added to the model beside any adapter."""

from __future__ import annotations

from typing import Any

from modicum.jobs.training.parts import Part
from modicum.registry import training_part


@training_part("extra_modules")
class ExtraModules(Part):
    """Put the modules that a conversion added into the adapter; the Trainer spares them weight decay."""

    def adapter(self, fields: dict[str, Any], model: Any) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` with these modules in ``modules_to_save``."""
        from modicum.jobs.training.extra_modules import additions

        added = additions(model)
        saved = sorted({*(fields.get("modules_to_save") or ()), *added})
        return fields | {"modules_to_save": saved} if added else fields
