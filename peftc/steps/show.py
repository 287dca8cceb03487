"""Print an artifact from its manifest and headers alone: no torch, whatever its size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.errors import ArtifactError, PeftcError, did_you_mean
from peftc.models import hub
from peftc.pages.records import modules_table, statistics_table
from peftc.report import Report, Table, count, size
from peftc.store import artifact, manifest, verified
from peftc.store.commands import command_lines
from peftc.store.manifest import Manifest
from peftc.store.source import MANIFEST, Located, Source, locate

if TYPE_CHECKING:
    from peftc.store.header import TensorInfo


def show(model: str | Path | Source, *, commands: bool = False, verify: bool = False) -> Report:
    """Return what an artifact is made of.

    Args:
        model: an artifact folder, or the hub id of one, of which only the small files are fetched.
        commands: only the command lines that rebuild it.
        verify: read every file and compare it with the digest in the manifest, whatever was compared before.

    Raises:
        ArtifactError: it is no artifact, its files do not fit its manifest, or ``verify`` found other bytes.
        SourceError: the hub does not give it.
    """
    source = model if isinstance(model, Source) else Source(str(model))
    folder, there = Path(source.spec), None
    if not folder.is_dir():
        there = _of_the_hub(source)
        if verify:
            folder = hub.snapshot(there, source, True)
        else:
            folder = hub.downloaded(there, source, hub.SMALL, "what describes it")
    name = there.name if there else str(folder)
    if not (folder / MANIFEST).is_file() and (folder / "config.json").is_file():
        raise _is_a_model(name)
    record = manifest.read(folder)
    if verify:
        verified.check(folder, record.files, remembered=False)
    tensors = _tensors(folder, record, there)
    lines = command_lines(record)
    report = Report("show", {"manifest": vars(record), "commands": lines, "tensors": len(tensors)}, artifact=folder)
    if commands:
        report.lines = lines
        return report
    report.notes += [f"rebuilt by: {line}" for line in lines]
    if verify:
        read = size(sum(entry["bytes"] for entry in record.files.values()))
        report.notes.append(f"all {count(len(record.files))} files, {read}, hold the bytes that the manifest promises")
    base = record.base
    stored = size(sum(info.stop - info.start for info in tensors.values()))
    facts = [
        ["id", record.id[:16]],
        ["base", f"{base['library']} {base['architecture']}"],
        ["from", base.get("source", {}).get("spec", "a live network")],
        ["parameters", count(record.parameters)],
        ["statistics" if record.holds_statistics else "weights", f"{len(tensors)} tensors, {stored}"],
        ["files", ", ".join(sorted(record.files))],
        ["classes", count(len(record.labels)) if record.labels else ""],
        ["layers kept", ", ".join(record.kept_layers)],
        ["layers passed over", ", ".join(record.skipped)],
    ]
    if record.holds_statistics:
        _add_statistics(report, facts, folder, artifact.statistics_note(folder, record))
    if record.ordered:
        kept = _tensors(folder, record, there, factors=True)
        facts.append(["factors", f"{len(kept)} tensors, {size(sum(info.stop - info.start for info in kept.values()))}"])
        report.tables.append(modules_table("ordered factors, up to rank", record.ordered))
        report.notes.append(f"cut it to any budget: `peftc truncate {name} --ratio 0.5 -o small`")
    report.tables.insert(0, Table(name, ["", ""], [fact for fact in facts if fact[1]]))
    if record.modules:
        report.tables.insert(1, modules_table("factored modules", record.modules))
    return report


def _is_a_model(name: str) -> ArtifactError:
    return ArtifactError(f"`{name}` is a model, not an artifact of peftc", hint=f"look into it: `peftc analyze {name}`")


def _of_the_hub(source: Source) -> Located:
    """Return the hub id that was named.

    Raises:
        ArtifactError: it is the path of a folder that is not there.
    """
    try:
        there = locate(source)
    except PeftcError:
        there = None
    if there is not None and there.kind == "gguf":
        raise _is_a_model(source.spec)
    if there is None or there.kind not in ("timm", "transformers"):
        why = "`peftc show` reads artifacts: folders, and repositories of the hub"
        raise ArtifactError(f"there is no artifact at `{source.spec}`", why=why, hint=did_you_mean(source.spec))
    return there


def _tensors(folder: Path, record: Manifest, there: Located | None, *, factors: bool = False) -> dict[str, TensorInfo]:
    """Return the tensors of an artifact, or those of its ordered factors, wherever its files are."""
    if there is None or all((folder / name).is_file() for name in record.files):
        return artifact.tensor_table(folder, record, factors=factors)
    names = record.weight_files
    names = [name for name in names if name.startswith(artifact.FACTORS) == factors]
    return hub.tensors(there, folder.name, names)


def _add_statistics(report: Report, facts: list[list[str]], folder: Path, note: Mapping[str, Any]) -> None:
    """Say what a folder of `calibrate` holds."""
    data = note["data"]
    facts += [
        ["calibrated on", f"{count(note['samples'])} samples of split `{data['split']}` of `{data['spec']}`"],
        ["for", f"`--method {note['method']}`: {', '.join(note['needs'])}"],
    ]
    report.data["statistics"] = dict(note)
    report.tables.append(statistics_table(note["modules"]))
    report.notes.append(f"use it at any budget: `peftc decompose MODEL --statistics {folder} --ratio 0.5 -o small`")
