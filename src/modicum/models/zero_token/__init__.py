"""The Zero Token Transformer: layers that are visited several times, with early exit."""
