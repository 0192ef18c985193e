"""The shipped recipe ``safety`` to its end, on a tiny model that says prepared sentences."""

import base64
import re
import zlib
from importlib.resources import files
from itertools import count

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from modicum.errors import CheckpointError
from modicum.evaluate.chat import ChatResult, Choice
from modicum.jobs import attack_data, execute, plan
from modicum.jobs.chat.local import LocalHF
from modicum.recipe import parse, parse_yaml
from modicum.report import write
from support import byte_tokenizer, tiny_llama


def everything(data):
    """Return bytes with whatever is compressed or encoded in them laid open: gzip-like streams of base64 in JSON."""
    yield data
    for found in re.findall(rb'"packed": "([^"]+)"', data):
        yield zlib.decompress(base64.b64decode(found))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The recipe with a tiny model in the place of SmolLM2, and the sentences that this model will have said."""
    try:
        prompts = [goal.text for name in ("harmbench", "strongreject") for goal in attack_data.goals(name)]
    except CheckpointError as error:
        pytest.skip(str(error))
    folder = tmp_path / "model"
    tiny_llama(max_position_embeddings=8192).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    said, numbers = [], count()

    def generate(_self, requests):
        found = []
        for request in requests:
            texts = [
                f"Sentence number {next(numbers)} that the model has said, and nobody else."
                for _ in range(request.params.n)
            ]
            said.extend(texts)
            found.append(ChatResult(tuple(Choice(text) for text in texts)))
        return found

    monkeypatch.setattr(LocalHF, "generate", generate)
    text = (files("modicum") / "recipes" / "safety.yaml").read_text()
    text = text.replace("builtin:smollm2-135m-instruct", str(folder)).replace("max_length: 512", "max_length: 8192")
    recipe = parse(parse_yaml(re.sub(r"max_steps: \d+", "max_steps: 1", text), "safety"))
    return recipe, prompts, said, folder


@pytest.mark.slow
def test_the_recipe_runs_to_its_end_and_nothing_unsafe_lies_in_clear(shipped, tmp_path):
    recipe, prompts, said, base = shipped
    assert plan(recipe)
    run = execute(recipe, tmp_path / "run", quiet=True)
    folders = {path.name: path for path in (run.folder / "stages").iterdir()}
    assert set(folders) == {"synthesis", "rt", "srg", "filler", "attack", "helpfulness", "inside"}
    for arm in ("rt", "srg", "filler"):  # stock PEFT opens what was trained
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[arm] / "adapter")
        assert adapted(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert len(said) > 100
    words = {text.encode() for text in [*prompts, *said] if len(text) > 20}
    clear = 0
    for file in (path for path in run.folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        assert not any(word in data for word in words if word in data), file
        # The check finds what is there: replies are packed, and laid open they hold the sentences.
        clear += sum(any(text.encode() in part for text in said[:4]) for part in everything(data))
    assert clear
    page = write([run.folder], tmp_path / "report.html").read_text()
    assert all(title in page for title in ("Safety", "Seen from inside")) and not any(text in page for text in said)
