"""The arithmetic that merge methods share: blocks, selection, elections, draws, matrices."""
