"""Run another tool with looped and routed models known to it: ``python -m modicum.models TOOL ARGUMENTS``.

A tool that loads models by ``AutoModelForCausalLM`` in a process of its own does not know ours, and a checkpoint holds
no code that could tell it. This imports them first and hands the command line over.
"""

from __future__ import annotations

import runpy
import sys

import transformers

from modicum.models import RoutedForCausalLM, ZeroTokenForCausalLM


def main() -> None:
    """Run the module that the first argument names with the others."""
    if len(sys.argv) < 2:
        raise SystemExit("No tool was named. Usage: python -m modicum.models TOOL ARGUMENTS, where TOOL is a module.")
    # AutoModel knows the classes, but `transformers serve` does not ask it: ModelManager takes a text model's class by
    # getattr(transformers, config.architectures[0]), and transformers has no public way to add a name to itself.
    transformers.ZeroTokenForCausalLM = ZeroTokenForCausalLM
    transformers.RoutedForCausalLM = RoutedForCausalLM
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
