"""Training: objective, data order, optimisation, and the run itself."""
