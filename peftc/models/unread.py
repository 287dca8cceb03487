"""What a language model gives before its head, where whole logits would take much memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftc.models import inputs
from peftc.models.model import Batch, Model
from peftc.models.place import moved
from peftc.models.sharding import full
from peftc.nn.vocabulary import Logits, Unread

LARGE = 16_384  # words, from which on logits are never whole

_known: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def head_of(model: Model, used: Iterable[str] = ()) -> nn.Linear | None:
    """Return the linear whose output is the logits, of a large vocabulary; None where they are taken whole.

    That is so, too, where it is one of the modules that are ``used`` themselves, as it has to run then.
    A model that does something with its logits, as to cap them, is one of those. It is run once to see it, on 4 tokens.
    """
    find = getattr(model.module, "get_output_embeddings", None)
    head = find() if model.library == "transformers" and callable(find) else None
    if not isinstance(head, nn.Linear) or type(head) is not nn.Linear:  # what is put around one does more
        return None
    if len(head.weight) < LARGE or head.weight.is_meta:
        return None
    if any(model.module.get_submodule(name) is head for name in used):
        return None
    known = _known.get(model.module)
    if known is None or known[0] is not head:
        known = _known[model.module] = head, _gives_logits(model, head)
    return head if known[1] else None


def _gives_logits(model: Model, head: nn.Linear) -> bool:
    given: list[Tensor] = []
    hook = head.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    try:
        logits = inputs.outputs(model, inputs.probe(model, max_length=4))
    except inputs.DOES_NOT_RUN:
        return False
    finally:
        hook.remove()
    return len(given) == 1 and given[0].shape == logits.shape and torch.equal(given[0].float(), logits.float())


@contextmanager
def _handing_on(head: nn.Linear) -> Iterator[None]:
    """Let a head hand on what it reads."""
    head.forward = lambda hidden: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def forward(model: Model, batch: Batch, head: nn.Linear | None) -> Logits:
    """Return the main output for a batch; where a head is given, what it reads, and the head.

    Args:
        model: that runs.
        batch: on its device.
        head: as `head_of` found it, before anything watches the model.
    """
    return inputs.forward(model, batch) if head is None else through(model, model.module, batch, head)


def through(model: Model, module: nn.Module, batch: Batch, head: nn.Linear | None) -> Logits:
    """Return the same of a module in the place of the model's own."""
    with nullcontext() if head is None else _handing_on(head):
        found = inputs.main_output(model, inputs.run(module, batch))
    if head is None:
        return found
    return Unread(found, full(head.weight), None if head.bias is None else full(head.bias))


def outputs(model: Model, batch: Batch, head: nn.Linear | None) -> Logits:
    """Return the same without gradients, and with the same random draws at every call, as `inputs.outputs` does."""
    with inputs.still(model):
        found = forward(model, batch, head)
    if isinstance(found, Tensor):
        return found
    return Unread(found.hidden, found.weight.detach(), None if found.bias is None else found.bias.detach())


def of_batch(model: Model, given: Any) -> Logits:
    """Return what an evaluation looks at of a batch of samples, which is moved to the model."""
    return outputs(model, moved(model, given.inputs), head_of(model))
