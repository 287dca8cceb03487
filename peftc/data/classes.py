"""Match the classes of a data set with the outputs of a model."""

import re
from collections import defaultdict
from collections.abc import Sequence

from peftc.errors import ClassesError, DataError, named


def match(classes: Sequence[str], labels: Sequence[str] | None, outputs: int) -> tuple[list[int], str]:
    """Return the output index of each class, and a sentence that says how they were matched.

    Tried in this order: WordNet ids, the model's class names (``labels``, or ImageNet's), class indices, and, for a
    model that knows no names, sorted order. A class matches wholly or not at all.

    Raises:
        ClassesError: no class has a counterpart.
        DataError: some have none, or two.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": outputs})  # the ImageNet with so many classes
    imagenet = ImageNetInfo(subset) if subset else None
    if imagenet and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        index = {name: number for number, name in enumerate(imagenet.label_names())}
        return _all(classes, index, outputs, "WordNet ids"), "classes: folders matched by WordNet id"
    of_imagenet = imagenet.label_descriptions() if imagenet else None
    for names, whose in ((labels, "the model's class names"), (of_imagenet, "ImageNet's class names")):
        if names:
            found = _by_name(classes, names)
            if len(found) == len(classes):
                return [found[name] for name in classes], f"classes: matched by name with {whose}"
            if found and not all(map(is_index, classes)):
                return _all(classes, found, outputs, whose), ""
    numbers = [int(name) for name in classes if is_index(name)]
    is_numbered = len(set(numbers)) == len(classes) and max(numbers, default=0) < outputs  # `01` and `1` are two
    # 0, 1, ... without reaching the outputs, as ten digits count, number something else
    if is_numbered and not (1 < len(classes) < outputs and sorted(numbers) == list(range(len(classes)))):
        return numbers, "classes: their names read as class indices"
    if labels is None and len(classes) == outputs:
        note = f"classes: the model has no class names, so its {outputs} outputs are taken in sorted order"
        return list(range(outputs)), note
    if labels is None:
        why = f"the data has {named(list(classes))}"
        hint = "name them by WordNet id, class index or class name"
        raise ClassesError(f"cannot match {len(classes)} classes with a model of {outputs} outputs", why=why, hint=hint)
    return _all(classes, {}, outputs, f"class names {named(list(labels), 3)}"), ""


def is_index(name: str) -> bool:
    """Whether a name reads as a number; Python reads none of more than 4,300 digits."""
    return name.isdecimal() and len(name) < 20


def _all(classes: Sequence[str], index: dict[str, int], outputs: int, whose: str) -> list[int]:
    missing = [name for name in classes if name not in index]
    if missing:
        kind = ClassesError if len(missing) == len(classes) else DataError
        what = f"{len(missing)} of {len(classes)} classes of the data are unknown to the model: {named(missing)}"
        why = f"its {outputs} outputs are known by {whose}"
        raise kind(what, why=why, hint="rename or remove these classes, or evaluate the model made for them")
    return [index[name] for name in classes]


def _by_name(classes: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Look classes up by whole names first, then by one of the synonyms in `tench, Tinca tinca`."""
    exact, whole, parts = (defaultdict[str, list[int]](list) for _ in range(3))
    for number, name in enumerate(names):
        exact[name].append(number)
        whole[_plain(name)].append(number)
        for part in name.split(","):
            parts[_plain(part)].append(number)
    found = {}
    for name in classes:
        at = exact.get(name) or whole.get(_plain(name)) or parts.get(_plain(name), [])
        if len(at) > 1:
            why = f"the model's outputs {at} share that name"
            raise DataError(f"class `{name}` of the data is ambiguous", why=why, hint="use class indices")
        if at:
            found[name] = at[0]
    if len(set(found.values())) < len(found):
        raise DataError("two classes of the data match the same output of the model", why=named(sorted(found)))
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())
