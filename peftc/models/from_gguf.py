"""A GGUF file as a plain transformers folder: dequantised once, into the user's cache."""

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from peftc import progress
from peftc.errors import SourceError, named, reason_of, told_as
from peftc.models.skeleton import on_meta
from peftc.store import cache, manifest, pointers
from peftc.store.source import Located

MAGIC = b"GGUF"


def unpacked(located: Located) -> Located:
    """Return the folder that holds in float32 what a GGUF file does; the second time it is there already.

    Raises:
        SourceError: the file is damaged, or of a model that transformers does not read; `gguf` is not installed; or
            the cache cannot be written.
    """
    file = located.file
    assert file is not None
    try:
        with file.open("rb") as start:
            begins = start.read(len(MAGIC))
        digest = manifest.file_digest(file)
    except OSError as error:
        raise SourceError(f"cannot read `{file}`", why=reason_of(error)) from error
    if begins != MAGIC:
        pointers.refuse(file, SourceError)
        raise SourceError(f"`{file}` is no GGUF file", why="it does not begin with `GGUF`")
    try:
        folder = cache.folder(f"gguf/{digest}", partial(_fill, file.resolve(), digest))
    except (OSError, RuntimeError) as error:
        hint = "make room there, or let `XDG_CACHE_HOME` name a folder that can be written"
        raise SourceError(f"cannot keep what `{file}` holds in the cache", why=reason_of(error), hint=hint) from error
    return replace(located, kind="transformers", name=file.stem, folder=folder)


def _fill(file: Path, digest: str, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file into a folder, as transformers saves them."""
    import transformers
    from safetensors import SafetensorError

    if find_spec("gguf") is None:
        what, why = f"reading `{file.name}` takes the package `gguf`", "it is not installed"
        raise SourceError(what, why=why, hint="pip install 'peftc[gguf]'")
    _tell_version()
    # an absolute path: transformers looks for a name in the working folder first, and for adapters beside the file
    with progress.track(f"dequantising {file.name}, once", 3) as advance, _quiet(), tempfile.TemporaryDirectory() as no:
        how: dict[str, Any] = {"gguf_file": str(file), "local_files_only": True}
        with _refusing(file, "model"):
            config, auto = transformers.AutoConfig.from_pretrained(no, **how), transformers.AutoModelForCausalLM
            about = json.loads(config.to_json_string())
            on_meta(partial(auto.from_config, config), file.stat().st_size, about)  # refused where it is far too large
            model, info = auto.from_pretrained(no, dtype=torch.float32, output_loading_info=True, **how)
        _refuse_gaps(file, info)
        advance("weights")
        with _refusing(file, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(no, **how)
        advance("tokenizer")
        try:
            _plain(model).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(reason_of(error)) from error
        advance("written")
    if manifest.file_digest(file) != digest:
        raise SourceError(f"`{file}` was written to while it was read", hint="try again when it is whole")


def _tell_version() -> None:
    """Give `gguf` its version as an attribute: under Python 3.10 transformers finds no other."""
    module: Any = import_module("gguf")
    if not hasattr(module, "__version__"):
        module.__version__ = version("gguf")


def _plain(model: Any) -> Any:
    """Return the same model without a trace of its quantisation, which would not let it be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    return plain


def _refuse_gaps(file: Path, info: dict[str, Any]) -> None:
    """Refuse a file that lacks tensors of its model, or has some of other shapes (SourceError)."""
    lost = sorted({*map(str, info["missing_keys"]), *(str(each[0]) for each in info["mismatched_keys"])})
    if lost:
        why = f"it holds no fitting {named(lost, 4)}"
        raise SourceError(f"`{file}` does not hold its whole model", why=why, hint="no gap is filled: get it again")


def _refusing(file: Path, what: str) -> AbstractContextManager[None]:
    """Refuse a file on which a library raises, or its Rust code panics (SourceError)."""
    hint = "is it whole, and of a family that transformers reads from GGUF?"
    return told_as(SourceError, f"cannot read the {what} in `{file}`", hint)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and from logging what is refused anyway."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    shown, level, bar = logging.is_progress_bar_enabled(), logging.get_verbosity(), getattr(reader, "tqdm", None)
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    if bar is not None:  # it heeds neither of these
        reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
