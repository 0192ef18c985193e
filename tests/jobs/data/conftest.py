import pytest

from support import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()
