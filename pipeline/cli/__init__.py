"""The command line: what its commands do, and what they show."""
