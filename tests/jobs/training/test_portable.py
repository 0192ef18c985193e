"""What a training leaves can be used from anywhere, by whoever the umask lets."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from modicum.jobs import execute
from modicum.jobs.loading import references
from modicum.jobs.loading.folders import adapter_base
from modicum.jobs.loading.models import load_model
from modicum.jobs.training.parts.adapter import hub_id
from modicum.recipe import parse
from modicum.record import follow_umask

LOOP = {"name": "zero_token", "n_head": 0, "n_tail": 0, "n_cycles": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "abc"}) + "\n" for n in range(8)))
    return path


def trained(model, rows, folder, **changes):
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    data = {"path": str(rows), "max_length": 64}
    recipe = {"job": "train", "model": model, "data": data, "adapter": {"rank": 2}, "trainer": trainer} | changes
    return execute(parse(recipe), folder, quiet=True).folder


def named(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("form", ["relative", "absolute", "builtin"])
def test_stock_peft_finds_the_base_from_another_folder(form, tiny_model, rows, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.setattr(references, "_built", lambda _: tiny_model)
    monkeypatch.chdir(tiny_model.parent)
    model = {"relative": tiny_model.name, "absolute": str(tiny_model), "builtin": "builtin:byte-llama"}[form]
    folder = trained(model, rows, tmp_path / "r")
    monkeypatch.chdir(tmp_path)
    base = named(folder / "adapter")["base_model_name_or_path"]
    assert Path(base).is_absolute() and (Path(base) / "config.json").is_file()
    AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")


def test_the_base_of_a_converted_model_is_found_where_the_run_has_moved(tiny_model, rows, tmp_path):
    model = {"path": str(tiny_model), "convert": LOOP}
    folder = trained(model, rows, tmp_path / "r", adapter={"rank": 2, "config": {"target_modules": ["q_proj"]}})
    assert named(folder / "adapter")["base_model_name_or_path"] == str(folder.resolve() / "base")
    shutil.move(folder, tmp_path / "moved")
    assert adapter_base(tmp_path / "moved" / "adapter") == str(tmp_path / "moved" / "base")
    load_model(tmp_path / "moved" / "adapter")


def test_another_folder_beside_an_adapter_is_not_taken_for_its_base(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "model").mkdir()
    config = {"base_model_name_or_path": "/gone/model"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_base(tmp_path / "adapter") == "/gone/model"


def test_a_hub_id_is_named_with_its_revision_and_read_back(tmp_path):
    assert hub_id("org/name") == ("org/name", None) and hub_id("org/name@v2") == ("org/name", "v2")
    assert hub_id("builtin:byte-llama") is None and hub_id(str(tmp_path)) is None
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/name", "revision": "v2"}')
    assert adapter_base(tmp_path) == "org/name@v2"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_modes_that_the_umask_gives(mask, tmp_path):
    code = (
        "import os, sys, pathlib; os.umask(int(sys.argv[2]))\n"
        "from modicum.record import whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1]) / 'out') as folder:\n"
        "    (folder / 'inner').mkdir(mode=0o700); file = folder / 'inner' / 'weights'\n"
        "    file.touch(); file.chmod(0o600); (folder / 'plain').touch()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(mask)], check=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert modes == {"inner": 0o777 & ~mask, "weights": 0o666 & ~mask, "plain": 0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_no_file_of_a_training_is_its_owners_alone(tiny_model, rows, tmp_path):
    folder = trained(str(tiny_model), rows, tmp_path / "r", adapter={"rank": 2, "init": "pissa"})
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode & 0o777
    other = {
        str(p): oct(p.stat().st_mode) for p in folder.rglob("*") if p.is_file() and p.stat().st_mode & 0o777 != expected
    }
    assert not other and not list(folder.rglob(f".mode.{os.getpid()}"))


def test_links_are_left_as_they_are(tmp_path):
    (tmp_path / "target").touch()
    (tmp_path / "target").chmod(0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "target")
    follow_umask(tmp_path / "folder")
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o600
