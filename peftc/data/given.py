"""Data given in Python: data sets, loaders, lists and tensors become tables and arrays, as files are read into.

What is given is named by what it is and by the sha256 of its content, so that a record says which samples they were.
"""

import hashlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from peftc.data import arrays, limits, remembered, tables
from peftc.data.dataset import Dataset, Splits, split_word
from peftc.data.rows import IMAGE, LABEL, Rows
from peftc.data.spec import GENERATED, Columns, columns_of, parts_of
from peftc.errors import DataError, UsageError, named, reason_of
from peftc.options import COLUMNS, Reading
from peftc.store.commands import GIVEN

if TYPE_CHECKING:
    import datasets

# what every step takes as `data`
Data: TypeAlias = "str | Path | datasets.Dataset | DataLoader[Any] | Tensor | Sequence[Any] | Mapping[str, Any]"
Arrays = dict[str, np.ndarray]

TAKEN = (
    "give what `--data` takes, a `datasets.Dataset`, a torch `DataLoader`, a pair of tensors `(inputs, labels)`, "
    "a list of texts, of `(input, label)` pairs or of dicts, or a dict with one of these for each split"
)
ZIPPED = "pair inputs and labels up: `list(zip(inputs, labels))`"
ALONE = "all"  # the split of data that has no splits
INPUTS = {*arrays.INPUTS, *IMAGE, "pixel_values"}  # usual names of numbers in rows
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F")  # of images that are kept as they are
AT_ONCE = 1000  # rows


@dataclass(frozen=True)
class Part:
    """One split of what was given: a table of the `datasets` library, or arrays by their role."""

    words: str
    content: Any
    notes: tuple[str, ...] = ()

    def update(self, total: Any) -> None:
        """Add the content to a hash."""
        if isinstance(self.content, dict):
            for role, values in self.content.items():
                total.update(f"{role} {values.dtype.str} {values.shape}".encode())
                for start in range(0, len(values), AT_ONCE):
                    total.update(np.ascontiguousarray(values[start : start + AT_ONCE]).tobytes())
        else:
            for block in _blocks(self.content):
                total.update(block)

    def table(self, name: str, split: str, columns: Columns, task: str | None) -> Dataset:
        """Return the samples of a table."""
        look = None
        if self.content.data.nbytes >= remembered.LARGE:
            known = remembered.Identity(remembered.key_of(name, split), is_settled=True)
            look = lambda: known  # noqa: E731
        return tables.dataset(Rows(self.content, name, split, columns, task, list(self.notes), None, look))


class Given(str):
    """What a `--data` spec is for data that was given in Python: its name, which holds the data as well.

    A copy is the name alone, so that no record keeps the data.
    """

    parts: Mapping[str, Part]

    def __new__(cls, name: str, parts: Mapping[str, Part]) -> "Given":
        """Return a name that holds data by split."""
        made = super().__new__(cls, name)
        made.parts = parts
        return made

    def __deepcopy__(self, memo: Any) -> str:
        return str(self)

    def splits(self, name: str, columns: Columns, task: str | None) -> Splits:
        """Return the samples of each split, read by the columns that were named."""
        found = {split: part.content for split, part in self.parts.items() if isinstance(part.content, dict)}
        if found and columns.names():
            raise DataError(f"`{name}` has no columns", why="it holds tensors", hint="leave the names of columns out")
        read = arrays.splits(name, found, []) if found else {}
        return {
            split: read[split] if split in read else partial(part.table, name, split, columns, task)
            for split, part in self.parts.items()
        }


def spec_of(data: Any, reading: Reading) -> str:
    """Return the spec of data, with the columns that options name; both may not name different ones of a kind.

    Args:
        data: a spec, or samples themselves, which become a `Given`.
        reading: the options.
    """
    spec = str(data) if isinstance(data, Path) else data if isinstance(data, str) else given(data)
    options: dict[str, str | None] = {kind: getattr(reading, f"{kind}_column") for kind in COLUMNS}
    if not any(options.values()) or spec.startswith(GENERATED):  # what is drawn has no columns
        return spec
    name, split = parts_of(spec)
    bare, own = columns_of(name)
    parts = []
    for kind, other in options.items():
        one: str | None = getattr(own, kind)
        if one and other and one != other:
            what = f"`--data {bare}` names `{one}` as the {kind} column, and `--{kind}-column` names `{other}`"
            raise UsageError(what, hint="name it once")
        if column := one or other:
            parts.append(f"{kind}={quote(column, safe=', ')}")
    return _renamed(spec, f"{bare}?{'&'.join(parts)}" + (f"@{split}" if split else ""))


def other_split(spec: str, split: str) -> str:
    """Return the spec of another split of the same data."""
    return _renamed(spec, f"{parts_of(spec)[0]}@{split}")


def _renamed(spec: str, name: str) -> str:
    return Given(name, spec.parts) if isinstance(spec, Given) else name


def given(data: Any) -> Given:
    """Return samples as the spec that holds them.

    Raises:
        DataError: they are of no kind that is taken, or not alike.
    """
    if isinstance(data, Mapping):
        other = [key for key in data if key != ALONE and not (isinstance(key, str) and split_word(key))]
        if other or not data:
            why = f"`{other[0]}` is no name of a split" if other else "it is empty"
            hint = f"of columns make a table: `datasets.Dataset.from_dict(data)`; or {TAKEN}"
            raise DataError("`data` is a dict, and not one of splits", why=why, hint=hint)
        parts = {key: _part(each) for key, each in data.items()}
        words = f"dict of {len(parts)} splits"
    else:
        parts = {ALONE: _part(data)}
        words = parts[ALONE].words
    total = hashlib.sha256()
    for split, part in parts.items():
        total.update(split.encode())
        part.update(total)
    return Given(GIVEN.format(words, total.hexdigest()[:16]), parts)


def _part(data: Any) -> Part:
    """Return what was given for one split."""
    library = sys.modules.get("datasets")
    kind = type(data).__name__
    if library is not None and isinstance(data, library.Dataset):
        custom = data.format["type"] == "custom"
        note = "data: the transform of the Dataset is left out, as samples are prepared for the model here"
        return Part(f"Dataset of {len(data):,} rows", data.with_format(None), (note,) if custom else ())
    if isinstance(data, DataLoader):
        return _of_samples(_of_loader(data), "DataLoader of {:,} samples")
    if isinstance(data, Tensor | np.ndarray):
        return _of_arrays({"x": _numbers(data, kind)}, f"{kind} of {{}}")
    if isinstance(data, tuple) and len(data) == 2 and all(map(_is_array, data)):
        inputs, labels = (_numbers(each, kind) for each in data)
        return _of_arrays({"x": inputs, "y": labels}, "pair of tensors of {}")
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, IterableDataset):
        return _of_samples([data[row] for row in range(len(data))], f"{kind} of {{:,}} samples")
    if isinstance(data, Sequence) and not isinstance(data, str | bytes | bytearray):
        return _of_samples(list(data), f"{'tuple' if isinstance(data, tuple) else 'list'} of {{:,}} {{}}")
    why = None
    if hasattr(data, "__next__"):
        why = "it can be read once only, and samples are read more than once: make a list of it, `list(data)`"
    elif hasattr(data, "__iter__") and not hasattr(data, "__len__"):
        why = "it has no length: make a list of it, or of a part, as `list(data.take(1000))`"
    raise DataError(f"`data` is a {kind}, which peftc does not read", why=why, hint=TAKEN)


def _of_loader(loader: DataLoader[Any]) -> list[Any]:
    """Return all samples of a loader, in its own order; what torch draws meanwhile is the same every time."""
    found: list[Any] = []
    own = None if loader.generator is None else loader.generator.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in loader:
            found += (
                [batch] if loader.batch_sampler is None else _unbatched(batch, loader.collate_fn is default_collate)
            )
    if own is not None and loader.generator is not None:
        loader.generator.set_state(own)
    return found


def _unbatched(batch: Any, is_usual: bool) -> list[Any]:
    """Return the samples of a batch; a collate function of the user's may have left them as a list."""
    if isinstance(batch, Mapping):
        size = len(next(iter(batch.values()), ()))
        return [{key: values[row] for key, values in batch.items()} for row in range(size)]
    if not isinstance(batch, tuple | list) or any(isinstance(each, str) for each in batch):
        return list(batch)
    if is_usual and len(batch) == 1:
        return list(batch[0])
    is_pair = len(batch) == 2 and _is_array(batch[1]) and batch[1].ndim == 1 and len(batch[0]) == len(batch[1])
    return list(zip(*batch, strict=True)) if is_usual or is_pair else list(batch)


def _of_samples(samples: list[Any], words: str) -> Part:
    """Return samples that are texts, images, arrays, rows, or pairs of one of these and a label."""
    if not samples:
        raise DataError("`data` holds no samples", hint=TAKEN)
    hint = ZIPPED if len(samples) == 2 and all(isinstance(each, list) for each in samples) else TAKEN
    kind = _kind_of(samples, ("texts", "images", "arrays", "rows", "pairs"), "sample", hint)
    if kind == "rows":
        return _of_rows(samples, words)
    inputs, labels = samples, None
    if kind == "pairs":
        inputs = [pair[0] for pair in samples]
        kind = _kind_of(inputs, ("texts", "images", "arrays"), "input of sample", hint)
        labels = _labels([pair[1] for pair in samples])
        if kind == "texts" and isinstance(labels[0], str):
            why = "two texts may be a text and its class, or a pair to compare"
            hint = 'say which by dicts: `{"text": ..., "label": ...}`, or `{"sentence1": ..., "sentence2": ...}`'
            raise DataError("sample 0 of `data` is a pair of texts", why=why, hint=hint)
    words = words.format(len(samples), kind if labels is None else "samples")
    if kind == "arrays":
        found = [_numbers(each, "data") for each in inputs]
        if len({each.shape for each in found}) == 1:
            more = {} if labels is None else {"y": np.array(labels)}
            return Part(words, {"x": np.stack(found), **more})
        if any(each.dtype != np.uint8 for each in found):
            shapes = sorted({" x ".join(map(str, each.shape)) for each in found})
            what, why = "the tensors of `data` differ in shape", f"they are {named(shapes, 3)}"
            raise DataError(what, why=why, hint="bring them to one size; a pair of tensors is a tuple")
        inputs = [_picture(each) for each in found]
    name = "text" if kind == "texts" else "image"
    return Part(words, _table({name: inputs, **({} if labels is None else {"label": labels})}))


def _kind_of(values: list[Any], known: Sequence[str], word: str, hint: str) -> str:
    """Return what all of the samples, or of their inputs, are (DataError: one is something else)."""
    kinds = [_kind(each) for each in values]
    row = next((row for row, kind in enumerate(kinds) if kind not in known or kind != kinds[0]), None)
    if row is None:
        return str(kinds[0])
    why = f"{word} {row} is {_said(values[row])}" + (f", and {word} 0 is {_said(values[0])}" if row else "")
    what = "the samples of `data` are not of one kind" if row else "`data` holds no samples that peftc reads"
    raise DataError(what, why=why, hint=hint)


def _of_rows(rows: list[Mapping[str, Any]], words: str) -> Part:
    """Return dicts as a table; where they hold tensors of numbers and neither texts nor images, as arrays."""
    words, first = words.format(len(rows), "rows"), rows[0]
    label = next((key for key in first if str(key).lower() in LABEL), None)
    numbers = [key for key, value in first.items() if _is_array(value) and not _is_picture(value)]
    if numbers and not any(_kind(value) in ("texts", "images") for key, value in first.items() if key != label):
        one = next((key for key in numbers if str(key).lower() in INPUTS), None)
        if one is None:
            why, hint = f"they hold {named([*map(str, first)])}", "give `(input, label)` pairs"
            if "input_ids" in first:
                why = "they hold tokens, and peftc makes tokens itself, as the model was trained"
                hint = 'give the texts: `{"text": ..., "label": ...}`'
            raise DataError("the rows of `data` are not read", why=why, hint=hint)
        pairs = [each.get(one) if label is None else (each.get(one), each.get(label)) for each in rows]
        return _of_samples(pairs, words)
    names = dict.fromkeys(key for row in rows for key in row)
    return Part(words, _table({str(key): [_plain(row.get(key)) for row in rows] for key in names}))


def _of_arrays(found: Arrays, words: str) -> Part:
    return Part(words.format(" x ".join(map(str, found["x"].shape))), found)


def _table(columns: Mapping[str, list[Any]]) -> Any:
    """Return columns as a table, in which images are files without loss."""
    import datasets
    from pyarrow import ArrowException

    pictures = [key for key, values in columns.items() if isinstance(values[0], Image.Image)]
    made = {key: [_file(each) for each in values] if key in pictures else values for key, values in columns.items()}
    try:
        table = datasets.Dataset.from_dict(made)
        for key in pictures:
            table = table.cast_column(key, datasets.Image(decode=False))
    except (*limits.DAMAGED, ArrowException) as error:
        hint = "the values of a column have to be of one kind"
        raise DataError("`data` is no table", why=reason_of(error)[: limits.LONGEST], hint=hint) from None
    return table


def _blocks(table: Any) -> Iterator[bytes]:
    """Yield the content of a table, images as the bytes of their files."""
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    yield repr(sorted(map(str, table.features.items()))).encode()
    for batch in table.iter(AT_ONCE):
        for column, values in batch.items():
            yield column.encode("utf-8", "surrogatepass")
            for value in values:
                if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
                    path = value["path"]
                    yield value["bytes"] or (Path(path).read_bytes() if path and Path(path).is_file() else b"")
                yield repr(value).encode("utf-8", "surrogatepass")


# samples


def _kind(sample: Any) -> str | None:
    if isinstance(sample, str):
        return "texts"
    if isinstance(sample, Image.Image):
        return "images"
    if _is_array(sample):
        return "arrays"
    if isinstance(sample, Mapping):
        return "rows"
    return "pairs" if isinstance(sample, tuple | list) and len(sample) == 2 else None


def _said(sample: Any) -> str:
    if isinstance(sample, tuple | list):
        return f"a {type(sample).__name__} of {len(sample)}"
    return "a text" if isinstance(sample, str) else f"a {type(sample).__name__}"


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0


def _is_picture(value: Any) -> bool:
    """Whether an array is an image: of 8 bits, in rows of pixels."""
    return _is_array(value) and value.ndim in (2, 3) and str(value.dtype).endswith("uint8")


def _plain(value: Any) -> Any:
    """Return a value of a row as a table takes it."""
    if _is_picture(value):
        return _picture(_numbers(value, "data"))
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _labels(values: list[Any]) -> list[Any]:
    """Return labels as numbers or texts of Python.

    Raises:
        DataError: one is something else, or some are texts and others are not.
    """
    found: list[Any] = []
    for row, value in enumerate(values):
        plain = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
        plain = plain[0] if isinstance(plain, list) and len(plain) == 1 else plain
        if not isinstance(plain, str | int | float):
            why = "a label is a number, or the name of a class"
            raise DataError(f"the label of sample {row} of `data` is {_said(plain)}", why=why, hint=TAKEN)
        if found and isinstance(plain, str) != isinstance(found[0], str):
            raise DataError("some labels of `data` are texts and others numbers", why=f"{found[0]!r} and {plain!r}")
        found.append(plain)
    return found


def _numbers(value: Any, name: str) -> np.ndarray:
    """Return a tensor as an array in the memory of the CPU."""
    with limits.refused(name, "it is no dense tensor of numbers: "):
        if isinstance(value, Tensor):
            plain = value.detach().cpu()
            value = (plain.float() if plain.dtype in (torch.bfloat16, torch.float16) else plain).numpy()
        return np.asarray(value)


def _picture(pixels: np.ndarray) -> Image.Image:
    """Return 8-bit pixels, channels first or last, as an image."""
    last = arrays.channels_last("data", pixels[None])[0]
    return Image.fromarray(np.ascontiguousarray(last))


def _file(image: Any) -> dict[str, Any]:
    """Return an image as the bytes of a file that holds all of its pixels, upright."""
    upright = ImageOps.exif_transpose(image)
    if "transparency" in upright.info or upright.mode == "PA":
        upright = upright.convert("RGBA")
    kept = upright if upright.mode in MODES else upright.convert("RGB")
    content = io.BytesIO()
    kept.save(content, "TIFF", compression="raw")
    return {"bytes": content.getvalue(), "path": None}
