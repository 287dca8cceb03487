"""Layers that run otherwise for a while: compiled, or computed a second time in the backward pass.

It is the ``forward`` of each layer that is replaced, below its hooks, so that names, hooks and files stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftc.errors import PeftcError, UsageError, reason_of
from peftc.models import layers
from peftc.models.model import Model

VARIANTS = 8  # of one layer: shapes of batches, with gradients and without


@contextmanager
def layerwise(model: Model, *, compiled: bool = False, fixed: bool = False, recomputed: bool = False) -> Iterator[None]:
    """Let the layers of a runnable model run compiled, or forget what a backward pass needs and compute it again.

    Results of ``recomputed`` are the same to the bit; those of ``compiled`` are rounded otherwise.

    Args:
        model: whose layers `peftc.models.layers` finds; without any, the whole of it is compiled.
        compiled: by `torch.compile`, each layer on its own.
        fixed: compile for each shape of a batch anew; else, from the second on, once for all.
        recomputed: by `torch.utils.checkpoint`.

    Raises:
        UsageError: no layers are known that could be computed again.
        PeftcError: inside, where torch cannot compile a layer here.
    """
    if not compiled and not recomputed:
        yield
        return
    names = layers.layers(model)
    if recomputed and not names:
        why = "no layers that run one after the other were found in it"
        raise UsageError(f"`--gradient-checkpointing` does not fit `{model.name}`", why=why, hint="leave it out")
    parts = [model.module.get_submodule(name) for name in names] or [model.module]
    with ExitStack() as held:
        if compiled:
            limit = VARIANTS * len(parts)  # layers share their code, and ranks make each another case of it
            held.enter_context(torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=8 * limit))
        if recomputed:
            held.enter_context(_without_cache(model.module))
        for part in parts:
            run = part.forward
            if compiled:
                run = _compiled(run, model.name, dynamic=False if fixed else None)
            if recomputed:
                run = _recomputed(run, part)
            part.forward = run  # type: ignore[method-assign]
            held.callback(part.__delattr__, "forward")
        yield


def _compiled(run: Callable[..., Any], name: str, *, dynamic: bool | None) -> Callable[..., Any]:
    quick = torch.compile(run, dynamic=dynamic)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return quick(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = reason_of(error)
            raise PeftcError(f"`{name}` cannot be compiled here", why=why, hint="leave `--compile` out") from error

    return call


def _recomputed(run: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
    norms = [each for each in layer.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        contexts = lambda: (nullcontext(), _counted_once(norms))  # noqa: E731
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return call


@contextmanager
def _counted_once(norms: list[Any]) -> Iterator[None]:
    """Let a batch that batch norms see a second time leave their running statistics alone."""
    held = [(each, each.momentum, each.training) for each in norms]
    for each in norms:
        each.momentum = 0.0
    try:
        yield
    finally:
        for each, momentum, training in held:
            each.momentum = momentum
            if training and each.num_batches_tracked is not None:
                each.num_batches_tracked.sub_(1)


@contextmanager
def _without_cache(module: nn.Module) -> Iterator[None]:
    """Let a language model keep no keys and values, to which a second pass of a layer would add its own."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "use_cache"):
        yield
        return
    before, config.use_cache = config.use_cache, False
    try:
        yield
    finally:
        config.use_cache = before
