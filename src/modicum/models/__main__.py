"""Run another tool with looped models known to it: ``python -m modicum.models lm_eval --model hf …``.

A tool that loads models by ``AutoModelForCausalLM`` in a process of its own does not know ours, and a checkpoint holds
no code that could tell it. This imports them first and hands the command line over.
"""

from __future__ import annotations

import runpy
import sys

import modicum.models  # noqa: F401 - importing it is what makes the models known

# Commands whose module has another name.
_MODULES = {"transformers": "transformers.cli.transformers"}


def main() -> None:
    """Run the module that the first argument names with the others."""
    if len(sys.argv) < 2:
        raise SystemExit("No tool was named. Usage: python -m modicum.models TOOL ARGUMENTS, TOOL as lm_eval.")
    del sys.argv[0]
    runpy.run_module(_MODULES.get(sys.argv[0], sys.argv[0]), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
