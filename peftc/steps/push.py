"""A finished folder > card > one commit in a repository of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftc.errors import OutputError, UsageError, reason_of
from peftc.models.hub import answer_of, failures
from peftc.pages.card import subject_of, text_of
from peftc.pages.records import Record
from peftc.report import Report, count, size
from peftc.steps.compare import compare

CARD = "README.md"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".onnx", ".onnx.data", ".pt2")
LICENCE = ("license", "license_name", "license_link")
FRONT_MATTER = f"mend the front matter of your `{CARD}`, or remove it: then peftc writes one"
AGAIN = "run the same command again: what is done is not done again, and nothing was committed"


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False) -> Report:
    """Push an artifact or an export to a repository of the hub, with a card that says what it is.

    Everything is one commit: the repository holds all of it, or what it held before.

    Args:
        folder: finished.
        repo: ``owner/name``; made where there is none.
        private: of a repository that is made.

    Raises:
        OutputError: there is no token, no network, no right to write, or another model in the repository.
        UsageError: ``repo`` is no name of a repository.
        ArtifactError: the folder is neither an artifact nor an export, or is damaged.
    """
    check(repo)
    subject = subject_of(Path(folder))
    licence = licence_of(subject)
    compared = compare([subject.folder]) if subject.format == "artifact" else None
    text = text_of(subject, repo, licence, compared)
    names = sorted(path.relative_to(folder).as_posix() for path in subject.folder.rglob("*") if path.is_file())
    url, commit = _pushed(subject.folder, names, text, repo, private)
    total = sum((subject.folder / name).stat().st_size for name in names)
    report = Report("push", {"pushed": {"repo": repo, "url": url, "commit": commit}}, artifact=subject.folder)
    report.notes.append(f"pushed {count(len(names))} files, {size(total)}, and a card to {url}")
    if not licence and CARD not in names:
        report.notes.append(f"the licence of the base is not known: add `license:` to the card of `{repo}`")
    beneath = subject.manifest.delta.get("source", {}).get("spec", "")
    if beneath and not _is_hub_id(beneath):
        report.warnings.append(
            f"`{repo}` is a delta on `{beneath}`, which is not on the hub: whoever loads it has to name a copy with "
            "`--base`; push the base and tune from its id, or push what `peftc merge` writes"
        )
    return report


def check(repo: str) -> None:
    """Refuse what is sure to fail, before any work.

    Raises:
        OutputError: there is no token, or the hub may not be asked.
        UsageError: ``repo`` is no name of a repository.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"`{repo}` is no name of a repository", why=reason_of(error)) from None
    if repo.count("/") != 1:
        raise UsageError(f"`{repo}` names no owner", hint=f"write it as `--push-to-hub OWNER/{repo}`")
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"cannot push to `{repo}`", why="`HF_HUB_OFFLINE` is set", hint="`unset HF_HUB_OFFLINE`")
    if get_token() is None:
        why = "no token says who you are"
        raise OutputError(f"cannot push to `{repo}`", why=why, hint="`hf auth login`, or set `HF_TOKEN`")


def licence_of(subject: Record) -> dict[str, str]:
    """Return what the base's own card, or timm, says of its licence; empty where neither does."""
    from huggingface_hub import ModelCard

    named = Path(subject.spec or "").expanduser()
    if subject.hub_base is None and (named / CARD).is_file():
        own = ModelCard((named / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
        return _picked(own.data.to_dict())
    timm = str((subject.config.get("pretrained_cfg") or {}).get("license") or "")
    return _of_the_hub(subject.hub_base) or ({"license": timm} if timm else {})


def _of_the_hub(base: str | None) -> dict[str, str]:
    """Return what the front matter of a model of the hub says of its licence."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    if base is None:
        return {}
    try:
        data = HfApi().model_info(base).card_data
    except (HFValidationError, *failures()):  # it is gone, or not ours to see
        return {}
    return _picked(data.to_dict() if data is not None else {})


def _picked(data: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(data[key]) for key in LICENCE if data.get(key)} if data.get("license") else {}


def _pushed(folder: Path, names: list[str], text: str, repo: str, private: bool) -> tuple[str, str]:
    """Make the repository where there is none, and commit all files at once; return its address and the commit.

    Raises:
        OutputError: the hub refuses, cannot be reached, or is gone half way; then nothing was committed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    additions = [CommitOperationAdd(name, str(folder / name)) for name in names]
    if CARD not in names:
        additions.append(CommitOperationAdd(CARD, text.encode()))
    try:
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        info = api.model_info(repo)
        there = [each.rfilename for each in info.siblings or []]
        gone = [CommitOperationDelete(name) for name in _outdated(api, repo, there, names)]
        message = f"Push {folder.name}, written by peftc"
        made = api.create_commit(repo, [*additions, *gone], commit_message=message, parent_commit=info.sha)
    except (*failures(), RuntimeError) as error:  # the last wraps an upload that ended
        answered = answer_of(error)
        why, hint = answered or (f"the hub cannot be reached, or was lost half way ({_first(error)})", AGAIN)
        raise OutputError(f"cannot push `{folder}` to `{repo}`", why=why, hint=hint) from error
    except ValueError as error:  # the hub looks at the front matter of a card before it takes anything
        raise OutputError(f"`{repo}` does not take what was pushed", why=_first(error), hint=FRONT_MATTER) from error
    return url, str(made.oid)


def _first(error: BaseException) -> str:
    """Return the first line of what was said first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason_of(error).rstrip(".")


def _outdated(api: Any, repo: str, there: Iterable[str], names: list[str]) -> list[str]:
    """Return the files of an earlier push that would be taken for a part of this one.

    Raises:
        OutputError: the repository holds weights that peftc did not push.
    """
    import json

    from peftc.store.source import EXPORT, MANIFEST

    known: set[str] = set()
    for note in {MANIFEST, EXPORT} & set(there):
        found = json.loads(Path(api.hf_hub_download(repo, note)).read_text(encoding="utf-8"))
        known |= {note, *found.get("files", {})}
    left = set(there) - set(names)
    foreign = sorted(name for name in left - known if name.endswith(WEIGHTS))
    if foreign:
        why = f"peftc did not push its `{foreign[0]}`, and does not delete it"
        raise OutputError(f"`{repo}` holds another model", why=why, hint="push to another repository")
    return sorted(left & known)


def _is_hub_id(spec: str) -> bool:
    return spec.startswith(("hf:", "timm:")) or (spec.count("/") == 1 and not Path(spec).expanduser().exists())
