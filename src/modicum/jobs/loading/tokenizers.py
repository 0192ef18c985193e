"""Tokenizers apart from their models: found without weights, and older files turned into a ``tokenizer.json``."""

from __future__ import annotations

import re
from pathlib import Path

from modicum.borders import LARGEST, check_plain, read_json
from modicum.errors import UnsupportedError, first_line
from modicum.jobs.loading.references import resolve_model
from modicum.vocabulary import TOKENIZER, token_ids


def find_tokenizer(reference: str) -> Path:
    """Return the folder of a tokenizer; from the Hub no weights are fetched along with it.

    Raises:
        CheckpointError: There is no such folder or Hub repository.
    """
    return resolve_model(reference, weights=False)


def check_tokens(folder: Path) -> None:
    """Refuse a vocabulary of ids for which nobody has rows, before a library makes room for them.

    Raises:
        CheckpointError: ``tokenizer.json`` holds such an id, or is no file.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return check_plain(path)
    # Most vocabularies hold no such number at all, and need not be read twice.
    if path.stat().st_size > LARGEST or re.search(rb"(?<![\w.-])-?\d{7,}|-\d", path.read_bytes()):
        token_ids(read_json(path, str(folder)), str(folder))


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
