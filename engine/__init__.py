"""The runtime of sampling: scheduler tables, caches and loops."""
