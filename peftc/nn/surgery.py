"""Find, replace and fill the modules of a network; nothing here decides anything."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import ArtifactError, WeightError, named
from peftc.nn import lowrank, shared, skipped


def apply_edits(network: nn.Module, edits: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the modules in ``edits`` (name -> form and rank) by empty low-rank ones (ArtifactError: one is unfit)."""
    for name, edit in edits.items():
        try:
            old = network.get_submodule(name)
        except AttributeError:
            raise ArtifactError(f"the artifact factors `{name}`, which its base network does not have") from None
        try:
            rank = edit["rank"]  # a list for `tucker2`, which artifacts of earlier versions hold
            new = lowrank.build(old, edit["form"], tuple(rank) if isinstance(rank, list | tuple) else rank)
        except (AttributeError, TypeError, ValueError) as error:
            what = f"the artifact factors `{name}` as `{edit['form']}` at rank {edit['rank']}"
            raise ArtifactError(what, why=f"in its base network that is a {type(old).__name__}: {error}") from error
        replace(network, old, new)
    groups: dict[str, list[nn.Module]] = {}  # those that share a down factor, by the first of them
    for name, edit in edits.items():
        if "shares" in edit:
            groups.setdefault(edit["shares"], []).append(network.get_submodule(name))
    for first, members in groups.items():
        try:
            shared.share(members)
        except (AttributeError, TypeError, ValueError) as error:
            raise ArtifactError(f"modules cannot share the down factor of `{first}`", why=str(error)) from error


def skip(network: nn.Module, layers: Mapping[str, Sequence[int]]) -> None:
    """Let `Skipped` stand in for each layer (name -> lengths of the tuples it gave; ArtifactError: it is absent)."""
    for name, lengths in layers.items():
        try:
            old = network.get_submodule(name)
        except AttributeError:
            raise ArtifactError(f"the artifact skips `{name}`, which its base network does not have") from None
        replace(network, old, skipped.Skipped(lengths))


def replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands, also where one module is shared by several parents."""
    for parent in list(network.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old:
                parent._modules[leaf] = new


def place(module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> None:
    """Give a module built on the meta device its parameters, by their names in it; None is skipped."""
    for name, parameter in parameters.items():
        if parameter is not None:
            owner, leaf = _owner(module, name)
            owner._parameters[leaf] = parameter


def tie(network: nn.Module, tied: Mapping[str, str]) -> None:
    """Make each alias in ``tied`` the parameter whose name it points to (ArtifactError: the network lacks either)."""
    for alias, name in tied.items():
        try:
            owner, leaf = _owner(network, alias)
            owner._parameters[leaf] = network.get_parameter(name)
        except AttributeError:
            raise ArtifactError(f"the artifact ties `{alias}` to `{name}`, which its base network lacks") from None


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return network.get_submodule(path), leaf


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer by name; a module's extra state that is no tensor is left out."""
    return {name: value for name, value in network.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def stored_names(network: nn.Module) -> dict[str, list[str]]:
    """Return first name -> all names of each tensor that a file has to hold, in the network's order; tied ones once."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors_of(network).items():
        groups.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in groups.values()}


def fill(
    network: nn.Module,
    available: Iterable[str],
    read: Callable[[str], Tensor],
    *,
    where: str,
    ignore: Callable[[str], bool] = lambda name: False,
) -> dict[str, str]:
    """Give every parameter and persistent buffer its tensor, strictly, without a copy (WeightError: one is unlike).

    Args:
        network: with parameters on the meta device.
        available: the names that the file or files hold, of which ``read`` returns the tensors.
        where: the file or folder, for messages.
        ignore: whether a name that the network lacks may be left over.

    Returns:
        for each first name of `stored_names`, the name under which its tensor was found.
    """
    left = set(available)
    found: dict[str, str] = {}
    missing: list[str] = []
    for first, names in stored_names(network).items():
        several = [name for name in names if name in left]
        if not several:
            # files from before torch 0.4.1 lack a counter, which only training reads and which starts at 0
            missing += [] if first.endswith("num_batches_tracked") else [first]
            continue
        tensor = read(several[0])
        for name in several[1:]:
            if not torch.equal(tensor, read(name)):
                what = f"`{several[0]}` and `{name}` in `{where}` differ, but the network ties them"
                hint = "set `tie_word_embeddings` to false in config.json if they were trained apart"
                raise WeightError(what, hint=hint)
        expected: Tensor = getattr(*_owner(network, first))
        if expected.shape != tensor.shape:
            what = f"`{first}` in `{where}` has shape {list(tensor.shape)}; the network needs {list(expected.shape)}"
            hint = "the weights belong to another architecture or other constructor arguments (`--arch`, `--arch-set`)"
            raise WeightError(what, hint=hint)
        if expected.dtype != tensor.dtype and not (expected.is_floating_point() and tensor.is_floating_point()):
            what = f"`{first}` in `{where}` holds {tensor.dtype}; the network needs {expected.dtype}"
            why = "only floating numbers are read in another precision: it is quantized, or the file is damaged"
            raise WeightError(what, why=why)
        assign(network, names, tensor)
        found[first] = several[0]
        left.difference_update(names)
    left -= {name for name, _ in network.named_buffers()}  # older files hold buffers that are computed now
    left = {name for name in left if not ignore(name)}
    whys = [f"{len(missing)} missing: {named(missing, 4)}"] if missing else []
    whys += [f"{len(left)} left over: {named(sorted(left), 4)}"] if left else []
    if whys:
        hint = "no gap is filled with random numbers: check the architecture (`--arch`, `--arch-set`) and the file"
        raise WeightError(f"the tensors of `{where}` do not match the network", why="; ".join(whys), hint=hint)
    return found


def assign(network: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer that has these names."""
    owner, leaf = _owner(network, names[0])
    old = owner._parameters.get(leaf)
    if old is not None:
        trains = old.requires_grad and tensor.is_floating_point()
        tensor = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=trains)
    for name in names:
        owner, leaf = _owner(network, name)
        (owner._parameters if old is not None else owner._buffers)[leaf] = tensor


def two_halves(network: nn.Module) -> str | None:
    """Return a sentence on a network of which some tensors are float16 and some bfloat16; None where there is none.

    Both have 16 bits: a damaged header that takes one for the other changes values, and no size.
    """
    names: dict[torch.dtype, list[str]] = {torch.float16: [], torch.bfloat16: []}
    for name, tensor in tensors_of(network).items():
        names.get(tensor.dtype, []).append(name)
    few, many = sorted(names, key=lambda dtype: len(names[dtype]))
    if not names[few]:
        return None
    one, other = (str(dtype).removeprefix("torch.") for dtype in (few, many))
    return (
        f"weights: {len(names[few])} of the tensors are {one}, as `{names[few][0]}`, and {len(names[many])} {other}: "
        "a file seldom holds both; see that it is not damaged"
    )


def uniform_dtype(network: nn.Module) -> torch.dtype | None:
    """Return the one dtype of all floating parameters and buffers, or None where they differ."""
    dtypes = {tensor.dtype for tensor in tensors_of(network).values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def parameters(module: nn.Module) -> int:
    """Count parameters; tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers; tied ones once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
