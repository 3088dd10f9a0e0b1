"""Images and labels: sources, shards, order, decoding."""
