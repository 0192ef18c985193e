"""``python -m modicum``, which ``accelerate launch -m modicum`` and ``torchrun -m modicum`` need."""

from modicum.cli import main

main()
