"""Drop-ins for the released implementations, and readers of their checkpoints."""
