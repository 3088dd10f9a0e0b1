"""The pruning method: data, criteria, rounds, retraining, results. Never imports Ray."""
