"""Configuration, the step, the loop, checkpoints, evaluation of checkpoints."""
