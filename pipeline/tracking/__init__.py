"""All that uses MLflow; no other package does."""
