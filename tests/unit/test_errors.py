"""A refusal in words."""

import inspect

import pytest

from peftc import errors
from peftc.errors import PeftcError, UsageError, one_of

CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, Exception)]


def test_a_refusal_is_one_to_three_lines() -> None:
    assert str(PeftcError("it failed")) == "it failed"
    assert str(PeftcError("it failed", hint="try again")) == "it failed\n  hint: try again"
    assert str(PeftcError("it failed", why="no", hint="try again")) == "it failed\n  cause: no\n  hint: try again"


@pytest.mark.parametrize("one", CLASSES, ids=lambda one: one.__name__)
def test_every_class_is_drawn_in_the_tree(one: type[PeftcError]) -> None:
    assert issubclass(one, PeftcError)
    assert f"{one.__name__} " in str(errors.__doc__)
    assert one.exit_code == (2 if issubclass(one, UsageError) else 1)


def test_an_unknown_value_is_refused_with_the_list_and_the_nearest() -> None:
    one_of("--method", "svd", ["svd", "asvd"])
    with pytest.raises(UsageError, match="unknown value `svdd` for `--method`") as refusal:
        one_of("--method", "svdd", ["svd", "asvd"])
    assert refusal.value.why == "it is one of `svd`, `asvd`"
    assert refusal.value.hint == "did you mean `--method svd`?"
    with pytest.raises(UsageError) as refusal:
        one_of("--method", "zzz", ["svd"])
    assert refusal.value.hint is None
