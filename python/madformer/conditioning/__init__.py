"""What images are conditioned on: texts and class names, and the token ids and class numbers that they become."""
