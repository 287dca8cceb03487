"""The page of what to expect: made from tests/benchmarks/results.jsonl and the cells of the language models beside it.

Every figure of that file stands in the section of RESULTS.md that a row names; a test compares them.
"""

import json
import math
from pathlib import Path
from typing import Any

from peftc.docs.source.writing import page, table
from peftc.report import percent, size

BENCHMARKS = Path(__file__).parents[3] / "tests" / "benchmarks"
FIRST = """\
What was measured of trained models, with the defaults unless a row says otherwise. Read it before you choose how much
to keep: a model that is healed by [`distill`](commands/distill.md) stands far more than one that is only cut."""
LAST = """\
*Size* is of the weight file, or the share of the parameters where no file was weighed. *Speed* is that of a large batch
on a CPU, with factors of equal ranks, or the milliseconds of a batch of 16 in ONNX Runtime, before and after. An empty
cell was not measured. Small convolutional networks do not gain time on a CPU: two thin convolutions cost more than one.
int8 goes on top of factors. ImageNet figures are of 150 images (8 points either way), so read what is large. Measure
yours: [`evaluate`](commands/evaluate.md) and [`bench`](commands/bench.md) say it with intervals. Where each figure is
from, with the commands, the machine and the methods of others beside it, stands in `tests/benchmarks/RESULTS.md` of the
sources."""


def rows() -> list[dict[str, Any]]:
    """Return the rows as they are kept, those of language models with the perplexities of their cells."""
    lines = (BENCHMARKS / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [found | ({"quality": perplexities(found)} if "cells" in found else {}) for found in map(json.loads, lines)]


def perplexities(row: dict[str, Any]) -> list[str]:
    """Return the perplexity of the dense model and that of peftc's default at a ratio."""
    lines = (BENCHMARKS / "language" / row["cells"] / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    cells = {(cell["method"], cell["ratio"]): cell for cell in map(json.loads, lines) if cell["draw"] == 0}
    chosen = [cells["dense", None], cells["peftc", row["ratio"]]]
    return [f"{math.exp(sum(cell['nll']) / len(cell['nll']) / cell['tokens']):.4g}" for cell in chosen]


def written() -> str:
    """Return the page."""
    lines = []
    for row in rows():
        before, after = row.get("bytes", (0, 0))
        large = f"{size(before)} to {size(after)} ({percent(after / before)})" if before else row.get("share", "")
        fast = row.get("speed") or " to ".join(f"{each} ms" for each in row.get("ms", []))
        lines.append([row["model"], row["done"], large, fast, row["metric"], " to ".join(row["quality"]), row["date"]])
    columns = ("model", "what is kept", "size", "speed", "measured by", "quality", "seen on")
    source = "it is made from tests/benchmarks/results.jsonl"
    return page(source, "# What to expect", FIRST, table(columns, lines), LAST)
