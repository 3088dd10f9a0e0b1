"""Training on one process or many: worlds, sessions, the loop, checkpoints."""
