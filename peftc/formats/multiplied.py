"""Factors multiplied out: the plain network of its own library that computes what a factored one does."""

from dataclasses import replace

from torch import Tensor

from peftc.formats.foreign import instead, refuse_bound
from peftc.models import build
from peftc.models.model import Model
from peftc.nn import lowrank, surgery

PARTS = ("up.weight", "down.weight", "core.weight")


def multiplied(model: Model) -> Model:
    """Return a model with every pair of factors as the one weight of its original module; one without any as it is.

    The products are computed in float64 and stored in the dtype of their factors.
    """
    record = model.manifest
    edits = record.modules if record else {}
    refuse_bound(model, f"`{model.name}` cannot be multiplied out", f"leave `--dense` out, and {instead(model)}")
    if record is None or model.folder is None or not edits:
        return model
    base = build.from_record(record, model.folder, model.source)
    there, wanted = surgery.tensors_of(model.module), surgery.tensors_of(base.module)
    tied = {alias: name for alias, name in record.tied.items() if alias in wanted and name in wanted}
    surgery.tie(base.module, tied)

    def read(name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        if path not in edits:
            return there[name]
        if leaf == "bias":
            return there[f"{path}.up.bias"]
        parts = {part: there[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in there}
        wide = {part: tensor.double() for part, tensor in parts.items()}
        weight = lowrank.dense_weight(wide, tuple(wanted[name].shape), edits[path]["form"])
        return weight.to(parts["up.weight"].dtype).contiguous()

    surgery.fill(base.module, wanted, read, where=model.name)
    infos = {name: info for name, info in model.infos.items() if name in wanted}
    plain = replace(record, modules={}, tied=tied)
    return replace(model, module=base.module.eval(), manifest=plain, infos=infos, files=[])
