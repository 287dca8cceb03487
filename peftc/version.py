"""The version of peftc, which everything that wants it takes from here."""

__version__ = "0.1.0"
