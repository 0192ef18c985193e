"""Whether transformers opens what a merge writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modicum.borders import loads
from modicum.errors import first_line


def without_dtype(config: Any) -> Any:
    """Return a configuration without its dtypes."""
    if isinstance(config, dict):
        return {k: without_dtype(v) for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    return config


def closed(folder: Path) -> str | None:
    """Return why transformers cannot open the configuration of a model of its own, ``None`` when it can."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = loads((folder / "config.json").read_text())
    if config.get("model_type") not in CONFIG_MAPPING or "auto_map" in config:
        return None
    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:  # a class of configuration may refuse by any kind of error
        return first_line(error)
    return None
