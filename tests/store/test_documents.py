"""Documents are read within limits, checked in shape, and tell when they were edited."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftc.store import documents
from peftc.store.documents import is_sealed, misfit, read_json, sealed

PERSON = {"name": str, "age?": (int, None), "marks": [float], "by_year": {str: bool}}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"name": "a", "marks": [], "by_year": {}}, None),
        ({"name": "a", "age": None, "marks": [1, 2.5], "by_year": {"1": True}, "more": 3}, None),
        ([], "it is `[]`, not a map"),
        ({"marks": [], "by_year": {}}, "`name` is missing"),
        ({"name": 3, "marks": [], "by_year": {}}, "`name` is `3`, not a text"),
        ({"name": "a", "age": True, "marks": [], "by_year": {}}, "`age` is `true`, not"),
        ({"name": "a", "age": 1.5, "marks": [], "by_year": {}}, "`age` is `1.5`, not"),
        ({"name": "a", "marks": [1, "x"], "by_year": {}}, '`marks[1]` is `"x"`, not a number'),
        ({"name": "a", "marks": [], "by_year": {"1": 0}}, "`by_year.1` is `0`, not true or false"),
    ],
)
def test_a_value_that_is_not_of_its_shape_is_named_by_its_place(value: Any, said: str | None) -> None:
    found = misfit(value, PERSON)
    assert found is None if said is None else found is not None and found.startswith(said)


def test_of_several_shapes_the_nearest_says_what_is_wrong() -> None:
    assert misfit({"a": {"b": 1}}, {"a": (None, {"b": str})}) == "`a.b` is `1`, not a text"


@pytest.mark.parametrize("depth", [300, 20_000, 1_000_000])
def test_deep_nesting_is_refused_with_the_limit(tmp_path: Path, depth: int) -> None:
    (tmp_path / "x.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(ValueError, match="more than 200 deep"):
        read_json(tmp_path / "x.json")


def test_a_document_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(documents.MOST_BYTES + 1)
    with pytest.raises(ValueError, match="536,870,913 bytes; peftc reads documents of up to 536,870,912"):
        read_json(tmp_path / "x.json")


def test_half_a_character_is_refused_and_a_whole_one_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(r'{"a": "\ud83d\ude00"}')
    assert read_json(tmp_path / "x.json") == {"a": "\U0001f600"}
    (tmp_path / "x.json").write_text(r'{"a": "\ud83d"}')
    with pytest.raises(ValueError, match="half of a character"):
        read_json(tmp_path / "x.json")


def test_every_edit_of_a_sealed_document_is_noticed() -> None:
    value = sealed({"a": 1, "b": {"c": [1.5, "x", None]}})
    assert is_sealed(json.loads(json.dumps(value))) is True
    assert is_sealed({**value, "a": 2}) is False
    assert is_sealed({**value, "a": 1.0}) is False
    assert is_sealed({**value, "more": None}) is False
    assert is_sealed({**value, "a": float("nan")}) is False
    assert is_sealed({"a": 1}) is None and is_sealed([value]) is None
