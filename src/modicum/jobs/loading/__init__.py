"""Finding and loading models by reference."""
