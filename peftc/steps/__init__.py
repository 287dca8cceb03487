"""One file per command: each step reads top to bottom as the line that the design draws for it."""
