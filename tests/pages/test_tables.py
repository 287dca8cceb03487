"""The table of a comparison: what stands in a cell, and where."""

from peftc.pages.records import Row
from peftc.pages.tables import table_of


def shares(rows: list[Row]) -> list[object]:
    return [row[3] for row in table_of(rows).rows]


def test_the_size_of_files_stands_beside_the_share_where_it_says_something_else() -> None:
    small = Row("small", ["decompose"], parameters=76, bytes=304, share=0.76, base="dense")
    rows = [Row("dense", parameters=100, bytes=400), small]
    assert shares(rows) == ["", "76.0 %"]
    rows.append(Row("release", ["decompose", "export onnx"], parameters=76, bytes=90, share=0.76, base="dense"))
    assert shares(rows) == ["400 B", "76.0 %, 304 B", "76.0 %, 90 B"]
