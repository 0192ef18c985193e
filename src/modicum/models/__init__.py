"""Models: input ids to logits, as transformers models."""
