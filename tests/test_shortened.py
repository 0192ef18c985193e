"""A file that is truncated while it is mapped: one line and exit status 2, in place of a signal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from modicum.shortened import mapped_at

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the handler is Linux's")

READ = """
import mmap, os, sys, threading
from modicum import shortened
shortened.install()
path, how = sys.argv[1:]
with open(path, "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
os.truncate(path, 4096)
if how == "torch":
    import torch
    work = lambda: torch.frombuffer(mapped, dtype=torch.float32).sum()
else:
    work = lambda: mapped[-1]
if how == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
elif how == "fork":
    if os.fork() == 0:
        work()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
else:
    work()
"""


@pytest.mark.parametrize("how", ["plain", "thread", "torch"])
def test_a_truncated_file_is_named(tmp_path, how):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\1" * 100_000)
    done = subprocess.run([sys.executable, "-c", READ, str(path), how], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"modicum: {path} became shorter while it was read. Run again when nothing writes to it any more.\n"
    )


def test_a_forked_worker_leaves_the_word_to_the_first_process(tmp_path):
    (tmp_path / "x").write_bytes(b"\1" * 100_000)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / "x"), "fork"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_an_address_of_no_file_is_nobodys():
    assert mapped_at(0) is None
    assert os.fspath(sys.executable)
