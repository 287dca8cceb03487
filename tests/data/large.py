"""Small data treated as large, so that tests see how large data is kept and read."""

import os
from pathlib import Path

import pytest

from peftc.data import remembered


def treat_as_large(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Treat small and young files as large and settled ones, with caches in a folder."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    patch.setattr(remembered, "LARGE", 1)
    patch.setattr(remembered, "SETTLED", 0.0)
