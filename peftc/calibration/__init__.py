"""Statistics of what modules read and give, within a memory."""
