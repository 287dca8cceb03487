"""Formats that a model is exported to, one function each."""
