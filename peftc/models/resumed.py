"""Run a network from a layer in the middle on, from what the layer before it gave in an earlier pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from peftc.models import layers
from peftc.models.layers import in_place_of, main
from peftc.models.model import Model
from peftc.models.place import place_of
from peftc.models.weights import save_part

CLOSE = 1e-4  # of the largest output, that one from the middle may differ from a whole pass


@dataclass
class Passes:
    """What every layer gave in passes over some batches, kept in files, and the network from a layer on.

    A network that looks back further than to the layer before, as over a bridge, does not give the same from the
    middle: it is found out on the first batch, layer by layer, and runs whole then.

    Attributes:
        model: that runs.
        names: of its layers, in running order.
        folder: of the files; one pass over a batch replaces an earlier one.
        trusted: the first layers from which on it was seen to give the same, and those from which not.
        forms: of each layer's output, with the main tensor left out; known after a pass.
    """

    model: Model
    names: Sequence[str]
    folder: Path
    trusted: dict[int, bool] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)

    def layer_of(self, name: str) -> int:
        """Return the number of the layer that holds a module; 0 where none does, so that all of them run."""
        return next((at for at, layer in enumerate(self.names) if f"{name}.".startswith(f"{layer}.")), 0)

    def record(self, batch: int, run: Callable[[], Tensor]) -> Tensor:
        """Run a whole pass, and keep what each layer gave of a batch."""
        given: dict[str, Tensor] = {}

        def saw(name: str, _read: Tensor, output: Any) -> None:
            tensor = main(output)
            if tensor is not None:
                given[name] = tensor.detach()
                self.forms[name] = _emptied(output)

        with layers.seen(self.model.module, self.names, saw):
            found = run()
        if self.names and set(given) == set(self.names) and self._has_room(given):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_part(self._part(batch), {name: each.contiguous() for name, each in given.items()}, {})
        else:
            self._part(batch).unlink(missing_ok=True)
        return found

    def resume(self, start: int, batch: int, run: Callable[[], Tensor]) -> Tensor:
        """Return what a pass gives, with the layers before ``start`` left out where that was seen to be the same."""
        if not self.trusted.get(start) or not self._part(batch).is_file():
            return run()
        with self._from(start, batch):
            return run()

    def check(self, start: int, batch: int, run: Callable[[], Tensor], whole: Tensor) -> None:
        """Compare a pass from ``start`` on with a whole one of the same network; where they differ, it runs whole."""
        if start in self.trusted or start == 0 or not self._part(batch).is_file():
            return
        try:
            with self._from(start, batch):
                found = run()
            gap = (found.float() - whole.to(found.device).float()).abs().max()
            self.trusted[start] = bool(gap <= CLOSE * whole.float().abs().max())
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            self.trusted[start] = False

    @contextmanager
    def _from(self, start: int, batch: int) -> Iterator[None]:
        last, place = self.names[start - 1], place_of(self.model.module)
        with safe_open(self._part(batch), "pt") as file:
            tensor = file.get_tensor(last).to(place)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in self.names[: start - 1]}
        blank = tensor.new_zeros(())
        stand_ins = {name: blank.expand(shape) for name, shape in shapes.items()} | {last: tensor}
        with ExitStack() as kept:
            for name, given in stand_ins.items():
                module = self.model.module.get_submodule(name)
                kept.enter_context(_giving(module, in_place_of(self.forms[name], given)))
            yield

    def _part(self, batch: int) -> Path:
        return self.folder / f"layers-{batch:05d}.safetensors"

    def _has_room(self, given: dict[str, Tensor]) -> bool:
        needed = sum(each.nbytes for each in given.values())
        return needed < shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent).free // 8


def _emptied(output: Any) -> Any:
    """Return the tuples that a layer's main output stands first in, with nothing in them."""
    if isinstance(output, list | tuple):
        return (_emptied(output[0]), *(None for _ in output[1:]))
    return None


@contextmanager
def _giving(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module give something without running."""
    module.forward = partial(_constant, output)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _constant(output: Any, *_args: Any, **_named: Any) -> Any:
    return output
