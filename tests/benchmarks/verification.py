"""What it costs to compare a large file with its digest, the first time and when it is remembered."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from peftc.store import manifest, verified

BLOCK = 1 << 20


def main() -> None:
    """Print seconds on the clock and of CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place, "cache"))
        path, block = Path(place, "model.safetensors"), os.urandom(BLOCK)
        with path.open("wb") as file:
            for _ in range(int(asked.gigabytes * 1024)):
                file.write(block)
        digest = manifest.file_digest(path)
        time.sleep(verified.QUIET + 0.5)  # a file that was just written is not remembered
        for name in ("first", "second", "third"):
            clock, cpu = time.monotonic(), time.process_time()
            verified.check(Path(place), {path.name: {"sha256": digest}})
            print(f"{name:7} {time.monotonic() - clock:8.4f} s, {time.process_time() - cpu:8.4f} s of CPU")


if __name__ == "__main__":
    main()
