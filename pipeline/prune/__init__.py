"""What is pruned and by how much, as pure functions of weights, scores and measurements."""
