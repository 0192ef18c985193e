"""Weight algebra: checkpoints as lazy mappings of tensors, and folds over them."""
