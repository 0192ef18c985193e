"""The parts of a training run, one mechanism a file."""
