"""The project of a working folder: peftc.toml, and the ledger of `run`."""
