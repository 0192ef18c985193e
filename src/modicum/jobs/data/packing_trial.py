"""Whether a model would keep packed samples apart, before its weights are read: tried on a small one of its kind.

Apart or not is a matter of the architecture and its configuration, not of the weights: a model with a few layers, one
of each kind at least, and random weights tells it in a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modicum.errors import ModicumError
from modicum.jobs.data.collators import collate
from modicum.jobs.data.packing import isolating, ordinary_ids
from modicum.jobs.data.positions import within_table
from modicum.jobs.data.tokens import tokenize
from modicum.jobs.data.trial import try_rows
from modicum.jobs.loading.folders import beneath
from modicum.jobs.loading.models import fresh_model, load_tokenizer, model_shape
from modicum.jobs.loading.references import resolve_model
from modicum.shortage import pass_on

if TYPE_CHECKING:
    from modicum.evaluate.rows import Rows
    from modicum.jobs.data.section import DataSection

LARGEST = 300_000_000  # weights of a model that is made for a trial
LATER = "Whether it keeps packed samples apart is tried when the run begins."


def foresee(
    reference: str,
    *,
    max_length: int,
    fields: Mapping[str, Any] | None = None,
    attention: str | None = None,
    remote_code: bool = False,
) -> str | None:
    """Refuse packed rows for a model that would let samples see each other; return a note where none can be tried.

    Args:
        reference: The model, or an adapter, whose base counts.
        max_length: Of the packed rows.
        fields: Fields of the configuration that are to differ.
        attention: Attention implementation.
        remote_code: Run the code that comes with the model.

    Raises:
        UnsupportedError: Samples would see each other.

    Cost:
        A model of two layers in float32, as wide as the real one, and at most eight passes over 24 tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    *_, folder = beneath(resolve_model(reference, remote_code=remote_code), remote_code=remote_code)
    tokenizer = load_tokenizer(folder, remote_code=remote_code)
    try:
        if fields is None:
            whole = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
        else:
            whole = model_shape(folder, fields, remote_code=remote_code)
        config = few_layers(whole)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code)
        if sum(parameter.numel() for parameter in empty.parameters()) > LARGEST:
            return LATER
        model = fresh_model(config, seed=0, attention=attention, remote_code=remote_code)
    except (ModicumError, TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        pass_on(error)
        return LATER  # not every configuration can be cut; the run tries the whole model
    isolating(model, collate(tokenizer), ids=ordinary_ids(tokenizer), max_length=max_length)
    return None


def foresee_batches(
    section: DataSection, rows: Rows, reference: str, *, model: Any, remote_code: bool = False
) -> list[str]:
    """Encode rows as :func:`~modicum.jobs.data.batches.load_batches` will; do :func:`foresee` where they are packed.

    Args:
        section: Where the rows come from.
        rows: All of them.
        reference: The model that is measured on them.
        model: What :func:`~modicum.jobs.loading.models.rehearse_model` made of it.
        remote_code: Run the code that comes with the model.

    Returns:
        Notes.

    Raises:
        ModicumError: The rows cannot be learned from, or samples would see each other.
    """
    notes: list[str] = []
    section = within_table(section, model.config.to_dict(), notes.append)
    tokenizer = load_tokenizer(reference, remote_code=remote_code)
    if not section.packing:
        try_rows(rows, tokenizer, section, lambda _: None, model=model)  # numbers of a sample say little of all rows
    elif "position_ids" in tokenize(rows, tokenizer, section).column_names:
        notes += filter(None, [foresee(reference, max_length=section.max_length, remote_code=remote_code)])
    return [f"note: {note}" for note in notes]


def few_layers(config: Any) -> Any:
    """Return a configuration with so few layers that one of each kind is left.

    Example:
        >>> from transformers import AutoConfig
        >>> kinds = ["conv", "conv", "full_attention", "conv"]
        >>> config = AutoConfig.for_model("lfm2", num_hidden_layers=4, layer_types=kinds)
        >>> few_layers(config).layer_types
        ['conv', 'conv', 'full_attention']
    """
    text = config.get_text_config()
    fields, layers = text.to_dict(), text.num_hidden_layers
    lists = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == layers}
    kinds = [value for value in lists.values() if all(isinstance(kind, (str, int)) for kind in value)]
    wanted = [max(value.index(kind) for kind in value) + 1 for value in kinds if len(set(value)) < layers]
    wanted += [value for key, value in fields.items() if key.endswith("_period") and isinstance(value, int)]
    kept = min(layers, max([2, *wanted]))
    for key, value in lists.items():
        setattr(text, key, value[:kept])
    text.num_hidden_layers = kept
    return config
