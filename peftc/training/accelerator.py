"""The accelerator of a training: Accelerate's devices and processes, and what peftc refuses of them."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from peftc import processes
from peftc.errors import PeftcError, reason_of
from peftc.models.place import device_of
from peftc.options import Recipe, cannot_train

FSDP = "ACCELERATE_USE_FSDP"


@contextmanager
def _without_fsdp() -> Iterator[None]:
    """Hide that a launcher asks for FSDP: weights are cut by `peftc.models.sharding`, with any device, by layers."""
    asked = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[FSDP] = asked


def accelerator_of(recipe: Recipe, device: str, log_with: str | None, folder: Path | None) -> Accelerator:
    """Return the accelerator that a recipe trains with on a device; a tracker writes into ``folder``.

    Raises:
        PeftcError: Accelerate, or peftc, cannot train so here.
    """
    place = device_of(device)
    own_gpu = place.type == "cuda" and processes.a_gpu_each()
    fresh = processes.size() == 1 or own_gpu  # else processes that met on the CPU stay there
    AcceleratorState._reset_state(reset_partial_state=fresh)  # of an earlier training in this process
    try:
        with warnings.catch_warnings(), _without_fsdp():  # that a tracker is missing is refused below
            warnings.simplefilter("ignore")
            accelerator = Accelerator(
                cpu=place.type == "cpu",
                mixed_precision=recipe.mixed_precision,
                log_with=log_with,
                project_dir=None if folder is None else str(folder),
            )
    except (ValueError, ImportError) as error:
        raise PeftcError("Accelerate cannot train here as asked", why=reason_of(error)) from error
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise cannot_train(kind)
    if log_with:
        if not accelerator.log_with:
            raise PeftcError(f"`{log_with}` is not installed", hint=f"`pip install {log_with}`, or leave `--log-with`")
        accelerator.init_trackers("peftc")
    return accelerator
