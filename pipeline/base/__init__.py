"""What imports no other package: errors, names, seeds, environment, records, statistics of differences."""
