"""Weight algebra: checkpoints as lazy mappings of tensors, and folds over them."""

from modicum.weights.average import average
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.lora import extract_lora, merge_loras
from modicum.weights.merge import merge, merge_state_dicts

__all__ = ["Checkpoint", "average", "extract_lora", "merge", "merge_loras", "merge_state_dicts"]
