"""Layers that a merge puts in other places: what the model's class makes of a layer there must be what it was.

A class may go by a layer's number: every second layer attends in a window, the first ones have no experts, some are
listed by their numbers. The configuration of the result is rewritten where it is known how, and then both classes are
built without memory and compared layer by layer, so that a rule that nobody has thought of is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError, first_line
from modicum.layout import FIRST_LAYERS, LAYER_LISTS, LAYER_NUMBERS, layer_of, modules
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.configs import depth_keys, text_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from modicum.weights.plan import Plan

_PLACES = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "training"})  # differ without a meaning
_NOT_LAYERS = ("_token_id", "_token_ids", "architectures")  # lists that may happen to have as many entries


def settled(plan: Plan) -> Plan:
    """Return the plan with a ``config.json`` under which every layer is what it was where it came from.

    Raises:
        CheckpointError: There is none: the class makes another layer of it in its new place.
    """
    order, first = _order(plan), next((model for model in plan.models if isinstance(model, Checkpoint)), None)
    text = plan.companions.get("config.json")
    if order is None or first is None or text is None:
        return plan
    origin = opened(first.config)
    if origin is None:
        return plan
    config = json.loads(text)
    _rewrite(text_of(config), first.config, origin, order)
    made = opened(config)
    if made is not None:
        _derive(text_of(config), origin, made, order)
        _compare(origin, opened(config), order, first.name)
    changed = (json.dumps(config, indent=2) + "\n").encode()
    same = config == json.loads(text)
    return plan if same else replace(plan, companions={**plan.companions, "config.json": changed})


def _order(plan: Plan) -> list[int] | None:
    """Return the number that each layer of the text had, ``None`` where all stay where they were."""
    found: dict[int, int] = {}
    stack = ""
    for step in plan.steps:
        own, layer = layer_of(step.models[0].name), layer_of(step.name)
        if own and layer and modules([step.name])[step.name] in ("text_decoder", "decoder"):
            found[layer.number], stack = own.number, layer.stack
    order = [found[number] for number in sorted(found)]
    config = text_of(json.loads(plan.companions.get("config.json", b"{}")))
    whole = order == list(range(len(order)))
    first = plan.models[0]
    before = text_of(first.config) if isinstance(first, Checkpoint) else {}
    keys = {*depth_keys(config, stack), *depth_keys(before, stack)}
    return None if whole and all(config.get(key) == before.get(key) for key in keys) else order


def opened(config: Mapping[str, Any]) -> PreTrainedConfig | None:
    """Return the configuration by its class; ``None`` where transformers has none, or does not take it."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    with tempfile.TemporaryDirectory() as folder:
        plain = {key: value for key, value in config.items() if key != "auto_map"}
        (Path(folder) / "config.json").write_text(json.dumps(plain))
        try:
            return AutoConfig.from_pretrained(folder)
        except Exception:  # a class may refuse by any kind of error; the job says so itself
            return None


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part that describes the text; a class without parts keeps unknown ones as plain mappings."""
    found = config.get_text_config(decoder=True)
    return found if hasattr(found, "num_hidden_layers") else config


def _lists(config: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield the settings that have an entry for each layer."""
    depth = getattr(config, "num_hidden_layers", None)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and not key.endswith(_NOT_LAYERS):
            yield key, value


def _rewrite(config: Any, before: Mapping[str, Any], origin: PreTrainedConfig, order: Sequence[int]) -> None:
    """Change in ``config`` what lists layers by their places or numbers, or counts the first ones."""
    text = text_of(before)
    for key, value in _lists(_text(origin)):
        # Those of LAYER_LISTS come from the slices' own models; others may be as long as before, in another order.
        if key in text and (key not in LAYER_LISTS or len(config.get(key) or ()) != len(order)):
            config[key] = [value[number] for number in order]
    for key in LAYER_NUMBERS & text.keys():
        if isinstance(text[key], list):
            config[key] = [place for place, number in enumerate(order) if number in text[key]]
    for key in FIRST_LAYERS & text.keys():
        if isinstance(text[key], int):
            later = (place for place, number in enumerate(order) if number >= text[key])
            config[key] = next(later, len(order))


def _derive(config: Any, origin: PreTrainedConfig, made: PreTrainedConfig, order: Sequence[int]) -> None:
    """Write out in ``config`` the lists that the class works out from the layers' numbers, where they differ."""
    now = _text(made)
    for key, value in _lists(_text(origin)):
        expected = [value[number] for number in order if number < len(value)]
        if len(expected) == len(order) and getattr(now, key, expected) != expected and key not in config:
            config[key] = expected


def _compare(origin: PreTrainedConfig, made: PreTrainedConfig | None, order: Sequence[int], name: str) -> None:
    try:
        before = _layers(origin)
    except Exception:  # its class may need a package or a device that is not there
        return
    if before is None or made is None:
        return
    try:
        after = _layers(made) or []
    except Exception as error:  # a class may refuse by any kind of error
        raise CheckpointError(
            f"transformers would not build the result: {first_line(error)} Choose other layers, or merge whole models."
        ) from None
    for place, number in enumerate(order):
        if number >= len(before) or place >= len(after):
            continue
        if told := _difference(_signature(before[number]), _signature(after[place])):
            raise CheckpointError(
                f"Layer {place} of the result is layer {number} of {name}, and {type(origin).__name__} makes another "
                f"layer of it there: {told}. Choose layers that stay as they are, or merge whole models."
            )


def built(config: PreTrainedConfig) -> torch.nn.Module | None:
    """Return a model that takes no memory; ``None`` where there is no class of models."""
    import torch
    import transformers

    maker = next((auto for auto in _makers(transformers) if type(config) in auto._model_mapping), None)
    if maker is None:
        return None
    with torch.device("meta"), torch.random.fork_rng():
        model: torch.nn.Module = maker.from_config(config)
    return model


def _layers(config: PreTrainedConfig) -> Sequence[torch.nn.Module] | None:
    """Return the text's layers of a model; ``None`` where there is no class of models."""
    import torch

    model = built(config)
    if model is None:
        return None
    depth = _text(config).num_hidden_layers
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == depth
        and layer_of(f"{name}.0.weight")
        and modules([f"{name}.0.weight"])[f"{name}.0.weight"] in ("text_decoder", "decoder")
    ]
    return None if not found else list(found[0])


def _makers(transformers: Any) -> Iterator[Any]:
    for kind in ("ImageTextToText", "Seq2SeqLM", "CausalLM", "MaskedLM"):
        yield getattr(transformers, f"AutoModelFor{kind}")
    yield transformers.AutoModel


def _signature(module: torch.nn.Module, at: str = "") -> dict[str, object]:
    """Return what a module is, by the places inside it: classes, settings, shapes."""
    found: dict[str, object] = {at: type(module).__name__}
    for key, value in vars(module).items():
        if key not in _PLACES and not key.startswith("_") and isinstance(value, bool | int | float | str):
            found[f"{at}.{key}"] = value
    for key, parameter in module.named_parameters(recurse=False):
        found[f"{at}.{key}"] = tuple(parameter.shape)
    for key, child in module.named_children():
        found |= _signature(child, f"{at}.{key}")
    return found


def _difference(one: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if not keys:
        return None
    key = keys[0]
    return f"{key.lstrip('.') or 'it'} is {other.get(key, 'not there')}, expected {one.get(key, 'nothing')}"
