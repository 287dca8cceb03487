"""The network without some of its layers, and whether it still computes what they leave."""

from collections.abc import Sequence

from peftc.errors import PlanError, reason_of
from peftc.models import inputs, layers, shorten, write
from peftc.models.inputs import outputs, probe
from peftc.models.model import Model
from peftc.models.place import one_dtype
from peftc.models.shorten import Shorter
from peftc.pruning.asked import Work
from peftc.report import Report


def shorter_of(work: Work, kept: Sequence[str], report: Report) -> Shorter:
    """Build the model without some layers: by its own config, else with them passed over; PlanError where both fail."""
    stored, dropped = work.stored, [name for name in work.names if name not in set(kept)]
    if stored.manifest is None or not stored.manifest.skipped:
        try:
            shorter = shorten.shorten(stored, work.names, kept)
            _compare(stored, shorter, dropped)
            return shorter
        except PlanError:
            if stored.manifest is not None and stored.manifest.kept_layers:  # some have other names than in the base
                raise
            report.notes.append(
                f"nothing in the config of `{stored.name}` leaves exactly these layers out: they keep their places and "
                "hand on what they read, and no library builds such a network without peftc"
            )
    shorter = shorten.skip(stored, kept, layers.tuples(work.runs, dropped))
    _compare(stored, shorter, dropped)
    return shorter


def _compare(stored: Model, shorter: Shorter, dropped: Sequence[str]) -> None:
    """Refuse a network that is not the whole one less its layers: shifted windows, as of Swin, hang on their places."""
    batch = probe(stored)
    whole = one_dtype(stored)
    with layers.bypassed(whole.module, dropped):
        before = outputs(whole, batch).float()
    try:
        after = outputs(one_dtype(shorter.model), batch).float()
    except inputs.DOES_NOT_RUN as error:
        listed = ", ".join(f"`{name}`" for name in dropped[:4])
        raise PlanError(f"`{stored.name}` does not run without {listed}", why=reason_of(error)) from error
    gap = float((before - after).abs().max()) if before.shape == after.shape else float("inf")
    if gap > write.CLOSE * float(before.abs().max()):
        raise PlanError(
            f"`{stored.name}` without {', '.join(f'`{name}`' for name in dropped[:4])} is not what its library builds",
            why=f"the outputs differ by {gap:.2g}: what a layer computes depends on its place in the stack",
            hint="drop neighbours in pairs with `--drop`, or layers at the end of a stack",
        )
