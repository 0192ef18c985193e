"""What is kept of a run of a recipe among the results: the command line of every ``record.py`` of a study."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.provenance import origin
from benchmarks.tables import RESULTS


def keep(kept: Callable[[Path], dict[str, Any]], *, doc: str | None, name: str) -> None:
    """Read the command line, and write what ``kept`` returns of a run's folder, with when and of which code.

    Args:
        kept: From the folder to what is kept.
        doc: What ``--help`` says.
        name: Of the result file, where none is given.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default=name)
    given = parser.parse_args()
    found = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | origin() | kept(given.run)
    (RESULTS / f"{given.name}.json").write_text(json.dumps(found, indent=1) + "\n")
