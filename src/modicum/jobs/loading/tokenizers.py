"""Tokenizers apart from their models: found without weights, and older files turned into a ``tokenizer.json``."""

from __future__ import annotations

from pathlib import Path

from modicum.errors import UnsupportedError, first_line
from modicum.jobs.loading.references import resolve_model


def find_tokenizer(reference: str) -> Path:
    """Return the folder of a tokenizer; from the Hub no weights are fetched along with it.

    Raises:
        CheckpointError: There is no such folder or Hub repository.
    """
    return resolve_model(reference, weights=False)


def tokenizer_json(folder: Path) -> bytes:
    """Return the text of the ``tokenizer.json`` that transformers makes of a tokenizer's other files.

    Raises:
        UnsupportedError: It cannot make one.
    """
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(folder)
        files = set(type(made).vocab_files_names.values())
        if not any((folder / name).is_file() for name in files):  # it would be one of special tokens alone
            raise ValueError(f"{type(made).__name__} is made of {' or '.join(sorted(files))}, and there is none")
        text: str = made.backend_tokenizer.to_str()
    except Exception as error:  # of several libraries, each with errors of its own
        raise UnsupportedError(
            f"{folder}: its tokenizer has no tokenizer.json, and transformers makes none of its other files "
            f"({first_line(error)}). Install what it asks for, such as sentencepiece or tiktoken, or save the "
            "tokenizer with transformers elsewhere."
        ) from None
    return text.encode()
