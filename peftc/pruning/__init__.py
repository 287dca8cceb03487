"""Which layers go: scores, evidence, the choice, and closing the gaps."""
