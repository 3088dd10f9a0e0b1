"""What imports no other package of ours: errors, names, seeds, environment, records, statistics of differences."""
