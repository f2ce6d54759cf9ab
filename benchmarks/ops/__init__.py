"""What the kernels are checked and timed on: a module an op."""
