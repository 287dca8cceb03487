"""Low-rank modules and the surgery that puts them into a network."""
