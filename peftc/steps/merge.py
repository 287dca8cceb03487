"""Delta, or artifact with updates > Model > updates taken into the weights > Artifact > Report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftc.errors import PlanError
from peftc.models import write
from peftc.models.load import load, without_updates
from peftc.models.model import Model
from peftc.models.place import place_of
from peftc.models.weights import pieces_of
from peftc.nn.adapted import adapted_modules
from peftc.nn.surgery import tensor_bytes
from peftc.pages import brief
from peftc.report import Report, gate_size
from peftc.store.source import Source
from peftc.training import imitation


def merge(
    model: str | Path | Source | Model,
    *,
    output_dir: str | Path | None = None,
    same_rank: bool = False,
    max_params: float | None = None,
    max_bytes: float | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> Report:
    """Make a delta whole: take its updates into the weights that they change, and write every tensor.

    Args:
        model: a delta, or an artifact whose updates are not merged; it is not changed.
        output_dir: the artifact's folder; ``<model>-merge`` when None.
        same_rank: cut factored modules that were adapted as a whole back to the rank they had; the error is reported.
        max_params, max_bytes: gates.
        max_shard_size: bytes per weight file, as ``5GB``.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    shard_bytes = write.shard_bytes(max_shard_size)
    stored = load(model, merge=False)
    if not adapted_modules(stored.module) and not (stored.manifest and stored.manifest.delta):
        hint = "`peftc finetune --delta` writes what can be merged"
        raise PlanError(f"`{stored.name}` has nothing to merge", why="it is a whole model without updates", hint=hint)
    request = {"command": "merge", "same_rank": same_rank, "max_shard_bytes": shard_bytes}
    output = write.output_folder(output_dir, stored, "merge")
    with write.writing(stored, output, request, overwrite=overwrite) as (job, base):
        if job.done:
            report = write.already(job, "merge")
        else:
            job.require(tensor_bytes(stored.module))
            report = Report("merge", notes=list(stored.notes))
            whole, adapters = taken_in(
                stored, stored.manifest.adapters if stored.manifest else {}, report, same_rank=same_rank
            )
            record = write.write_artifact(
                job,
                whole,
                base,
                request,
                pieces_of(whole),
                imitation.factored(whole),
                max_shard_bytes=shard_bytes,
                adapters=adapters,
            )
            write.close(job, record, report, whole, place_of(whole.module))
    gate_size(report, max_params, max_bytes)
    merged = {}
    if "merge" in report.data:
        found = report.data["merge"]
        differ = f"outputs on a random input differ by {found['relative_deviation']:.1e} of the largest"
        merged = {"merged": f"{found['modules']} updates; {differ}"}
    brief.tell(report, f"make `{stored.name}` whole", merged, then=brief.time(report.artifact))
    return report


def taken_in(
    model: Model, adapters: Mapping[str, Any], report: Report, *, same_rank: bool = False
) -> tuple[Model, dict[str, Any]]:
    """Take the updates of a model into its weights, in place, and say by how much its outputs differ then.

    Returns:
        the model, and those of its updates that change no weight.
    """
    before = write.probe_outputs(model)
    merged, changed = without_updates(model, same_rank=same_rank)
    after = write.probe_outputs(merged)
    if changed and before is not None and after is not None:
        gap = float((before - after).abs().max()) / max(float(before.abs().max()), 1e-30)
        report.data["merge"] = {"modules": len(changed), "relative_deviation": gap}
        report.notes.append(
            f"merged {len(changed)} updates: outputs on a random input differ by {gap:.1e} of the largest"
        )
    cut = {name: each.error for name, each in changed.items() if each.rank is not None and same_rank}
    if cut:
        worst = max(cut, key=lambda name: cut[name])
        report.data["merge"]["errors"] = cut
        report.notes.append(
            f"{len(cut)} factored modules were cut back to their ranks: the relative error of a weight is "
            f"{cut[worst]:.1e} at most, of `{worst}`"
        )
    return merged, {name: dict(entry) for name, entry in adapters.items() if name not in changed}
