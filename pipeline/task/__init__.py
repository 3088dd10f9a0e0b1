"""What is learnt: inputs of a batch, losses, answers."""
