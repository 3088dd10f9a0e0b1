"""A run's folder: its state, lease, layout and documents."""
