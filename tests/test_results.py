"""The page of results: every figure of its rows stands in the section of RESULTS.md that the row names."""

import re
from datetime import date
from typing import Any

import pytest

from peftc.docs.source import results

TEXT = (results.BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
ROWS = results.rows()


def section(heading: str) -> str:
    found = re.search(rf"^##+ {re.escape(heading)}$(.*?)(?=^##+ |\Z)", TEXT, re.M | re.S)
    assert found, f"RESULTS.md has no section `{heading}`"
    return found[1]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}: {row['done']}")
def test_a_row_says_what_the_results_say(row: dict[str, Any]) -> None:
    told = "".join(map(section, row["sections"]))
    figures = [f"{each:,}" for each in row.get("bytes", [])] + row.get("ms", [])
    figures += [each for key in ("speed", "share") if key in row for each in re.findall(r"[\d.]+", row[key])]
    figures += [] if "cells" in row else row["quality"]
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", told), f"{figure} is not in {row['sections']}"
    assert date(2026, 11, 1) <= date.fromisoformat(row["date"]) <= date.today()


def test_the_perplexities_of_a_language_model_are_those_of_the_table() -> None:
    row = next(row for row in ROWS if row.get("cells") == "gemma-3-270m")
    assert row["quality"][1] in section(row["sections"][0])


def test_the_page_is_one_screen() -> None:
    lines = results.written().splitlines()
    assert len(lines) <= 40
    for row in ROWS:
        assert any(row["done"] in line and " to ".join(row["quality"]) in line for line in lines)
