import json
import re

from modicum.jobs import execute
from modicum.recipe import parse


def test_lines_without_a_terminal_say_how_long_is_left(tiny_model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "a"}) for i in range(8)))
    recipe = {
        "job": "train",
        "model": str(tiny_model),
        "data": {"path": str(rows), "max_length": 64},
        "adapter": {"rank": 2},
        "trainer": {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1},
    }
    execute(parse(recipe), tmp_path / "r")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and re.search(r"^step 2/3 .* · about \d.* left$", lines[1])
    assert "left" not in lines[-1]
