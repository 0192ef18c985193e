"""Weight algebra: checkpoints as lazy mappings of tensors, and folds over them."""

from modicum.weights.average import average, average_state_dicts
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.extract import extract_lora
from modicum.weights.lora import merge_loras
from modicum.weights.merge import merge, merge_state_dicts
from modicum.weights.moving import MovingAverage
from modicum.weights.normalisation import refresh_batch_norm
from modicum.weights.snapshots import Snapshots

__all__ = [
    "Checkpoint",
    "MovingAverage",
    "Snapshots",
    "average",
    "average_state_dicts",
    "extract_lora",
    "merge",
    "merge_loras",
    "merge_state_dicts",
    "refresh_batch_norm",
]
