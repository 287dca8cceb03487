"""What a format hands back: how to run what it wrote in its own runtime, and what it computes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import ExportError
from peftc.formats import alone
from peftc.models import padding
from peftc.models.inputs import run, taken
from peftc.models.model import Model
from peftc.models.place import dtype_of
from peftc.nn import lowrank
from peftc.store.source import PARTS

Inputs = dict[str, Tensor]
CLOSE = 1e-4  # of the largest output, in float32: other kernels, and products in another order


@dataclass
class Exported:
    """A written export, loaded by what will run it.

    Attributes:
        runtime: its name and version.
        run: inputs by name -> the main output (batch, ...), float32, computed by the runtime.
        prepare: inputs -> a call that computes them again and again, for timing.
        tolerance: largest deviation allowed, as a share of the largest output; None where none can be promised.
        products: shapes of the weights that are multiplied with, where the files tell; None where they do not.
        expected: shapes of the factors that have to be among them.
        about: for ``export.json``.
        notes: what people should know.
        close: lets the runtime go.
        mixes: whether what it answers for a sample depends on what else is in the batch.
        vectors: where it makes one of a sentence as well: what makes that of vectors of tokens and a mask, in torch,
            and inputs -> that by the runtime.
    """

    runtime: str
    run: Callable[[Inputs], Tensor]
    prepare: Callable[[Inputs], Callable[[], object]]
    tolerance: float | None = CLOSE
    products: list[tuple[int, ...]] | None = None
    expected: list[tuple[int, ...]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None
    mixes: bool = False
    vectors: tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Inputs], Tensor]] | None = None


def require(word: str, packages: Sequence[str]) -> None:
    """Import what a format needs, which an extra of its name installs."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            what = f"`--format {word}` needs the package `{package.partition('.')[0]}`"
            raise ExportError(what, why=str(error), hint=f"pip install 'peftc[{word}]'") from None


def named(model: Model, batch: Tensor | Mapping[str, Tensor]) -> Inputs:
    """Return a batch as inputs by name; the only one of a network that takes it by place is ``pixel_values``."""
    if isinstance(batch, Tensor):
        return {"input_ids" if model.kind == "text" else "pixel_values" if model.kind == "image" else "input": batch}
    return dict(batch)


def computed(model: Model, inputs: Inputs) -> tuple[Tensor, str]:
    """Return the main output of a network in memory, float32, and its name."""
    dtype = dtype_of(model.module)
    with torch.inference_mode(), taken(model):
        moved = {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}
        one = next(iter(moved.values()))
        value, name = alone.picked(run(model.module, moved if model.library == "transformers" else one))
    return value.float(), "logits" if model.library == "timm" else name


def plain(
    model: Model, folder: Path, *, trusted: bool = False, factored: bool = False, library: str | None = None
) -> Exported:
    """Load a folder of timm or transformers in a fresh process that knows nothing of peftc.

    Args:
        model: what was written.
        folder: where.
        trusted: the folder holds code of its own, which transformers is to run.
        factored: `peftc.transformers`, or `peftc.timm`, is to build its factors: the process may import that.
        library: that loads it, where that is not the one of the network.
    """
    library, door = library or model.library, f"peftc.{model.library}"
    child = _Child(model, library)
    about: dict[str, Any] = {"folder": str(folder), "architecture": model.architecture, "trusted": trusted}
    about |= {"library": library, "imports": [door] if factored else []}
    about["paths"] = [_place(name) for name in ("peftc", library) if name != "peftc" or factored]
    padded = None  # the id that a user of the folder has to name before several texts are classified at once
    if model.library == "transformers" and padding.reads_last_token(model.module):
        padded = padding.id_to_write(model) if padding.padding_id(model.module) is None else None
    answer = child.ask("load", **about, threads=torch.get_num_threads(), padding=padded)

    def prepare(inputs: Inputs) -> Callable[[], object]:
        def again() -> None:
            if child.last is not inputs:
                child.run(inputs)
            child.ask("again")

        child.run(inputs)
        return again

    how = f"transformers.{model.architecture}.from_pretrained"
    if library == alone.SENTENCES:
        how = "sentence_transformers.SentenceTransformer"
    elif library == "timm":
        how = f"timm.create_model('local-dir:{folder.name}', pretrained=True)"
    elif trusted:
        how = "transformers.AutoModel.from_pretrained(..., trust_remote_code=True)"
    if factored:
        how = f"import {door}; {how}"
    runtime = f"{library.replace('_', '-')} {version(library)}"
    found: Any = {"about": {"load": how, "tried_with": runtime}, "close": child.close}
    if trusted or factored:
        found["products"] = [tuple(shape) for shape in answer["shapes"] if len(shape) > 1]
    helped = f"after `import {door}`" if factored else "without peftc"
    return Exported(f"{runtime} {helped}", child.run, prepare, **found)


def of_sentences(model: Model, folder: Path, *, factored: bool) -> Exported | None:
    """Load a folder as sentence-transformers does; None where it is not installed, or not meant."""
    if not (folder / PARTS).is_file() or find_spec(alone.SENTENCES) is None:
        return None
    return plain(model, folder, factored=factored, library=alone.SENTENCES)


def _place(package: str) -> str:
    """Return the folder that a package lies in, for a process that looks into fewer folders than this one."""
    found = find_spec(package)
    assert found is not None and found.origin is not None
    return str(Path(found.origin).parents[1])


def factors(model: Model) -> list[tuple[int, ...]]:
    """Return the shapes of all factors of a network, that of a shared one once."""
    kinds = (lowrank.LowRankLinear, lowrank.LowRankEmbedding, lowrank.LowRankConv2d)
    parts = [part for module in model.module.modules() if isinstance(module, kinds) for part in module.children()]
    weights = {id(part.weight): part.weight for part in parts if isinstance(part.weight, nn.Parameter)}
    return [tuple(weight.shape) for weight in weights.values()]


class _Child:
    """A process that runs `alone`, and what it is to compute next."""

    def __init__(self, model: Model, library: str) -> None:
        self.model, self.library = model, library
        self.files = tempfile.TemporaryDirectory()
        self.last: Inputs | None = None
        self.errors = Path(self.files.name, "errors")
        with self.errors.open("w") as errors:
            command = [sys.executable, "-I", "-W", "ignore", str(Path(alone.__file__).resolve())]
            ends: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            env = {**os.environ, "HF_MODULES_CACHE": str(Path(self.files.name, "modules"))}
            self.process: Any = subprocess.Popen(command, text=True, env=env, **ends)

    def ask(self, what: str, **about: Any) -> dict[str, Any]:
        """Send a line and return the answer."""
        asked = {"do": what, "named": self.model.library == "transformers", **about}
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            told = self.errors.read_text().strip().splitlines()
            self.close()
            what = f"{self.library} does not load what was written of `{self.model.name}`"
            hint = "use `--format safetensors`, and please report this: it is a bug in peftc, or in that library"
            raise ExportError(what, why=told[-1] if told else "its process ended", hint=hint)
        return dict(json.loads(answer))

    def run(self, inputs: Inputs) -> Tensor:
        """Return what the network gives for a batch."""
        from safetensors.torch import load_file, save_file

        there, back = Path(self.files.name, "inputs"), Path(self.files.name, "outputs")
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, there)
        self.ask("run", inputs=str(there), outputs=str(back))
        self.last = inputs
        return load_file(back)["output"]

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()
        self.process.wait()
        self.files.cleanup()
