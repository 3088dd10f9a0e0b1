"""What knows nobody: errors, names, seeds, environment, statistics of differences."""
