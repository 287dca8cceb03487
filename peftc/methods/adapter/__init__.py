"""Adapters: a module -> the update that learns beside it (`peftc.nn.adapted` says what an update is)."""
