"""MLflow, and nothing else that knows it."""
