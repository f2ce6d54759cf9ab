"""Files that appear whole or not at all, locks, text, tar shards, weights, and folders that a long run fills."""
