"""Fetch a model's files from the hub through its cache, or say in one line what could not be fetched."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftc import progress
from peftc.errors import SourceError, UsageError, did_you_mean, reason_of
from peftc.store import manifest
from peftc.store.header import TensorInfo
from peftc.store.source import MANIFEST, OF_PART, PARTS, Located, Source, in_folder

SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
CODE = "*.py"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the second only where a model has none of the first
OWN = ("arch", "arch_set", "weights")  # of a source: an artifact says these itself


def fetched(located: Located, source: Source, with_weights: bool) -> Located:
    """Return what a hub id turned out to be, with its local folder (SourceError: no model; UsageError: odd options).

    Args:
        located: by `locate`: nothing is known but the id.
        with_weights: fetch weights too; an artifact is fetched whole all the same, as it is whole or damaged.
    """
    folder = snapshot(located, source, with_weights)
    if not any((folder / name).is_file() for name in (MANIFEST, "config.json", "adapter_config.json")):
        why = f"it has neither `{MANIFEST}` (an artifact) nor `config.json` (a transformers or timm model)"
        raise SourceError(f"`{located.name}` is a repository of the hub, but holds no model", why=why)
    found = replace(in_folder(folder, source), name=located.name, revision=located.revision)
    asked = [name for name in OWN if getattr(source, name)]
    if found.kind == "artifact" and asked:
        what = f"`--{asked[0].replace('_', '-')}` says how to build a model, but `{located.name}` is an artifact"
        raise UsageError(what, hint="leave the option out: an artifact knows how it is built")
    return found


def snapshot(located: Located, source: Source, with_weights: bool) -> Path:
    """Return the local folder of a hub model; weights come if asked for, or with an artifact (SourceError: refused)."""
    small = [*SMALL, *([CODE] if source.trust_remote_code else [])]
    folder = downloaded(located, source, small, "config and weights" if with_weights else "config")
    at = replace(located, revision=folder.name)  # the commit that was found: nothing changes in between
    if (folder / MANIFEST).is_file():
        files = [MANIFEST, "result.json", *manifest.read(folder).files]
        return downloaded(at, source, files, "the artifact", asked=located.revision)
    parts = [f"*/{name}" for name in OF_PART] if (folder / PARTS).is_file() else []
    for weights in WEIGHTS if with_weights else ():
        folder = downloaded(at, source, [*small, *parts, weights], "config and weights", asked=located.revision)
        if any(folder.glob(weights)):
            break
    return folder


def failures() -> tuple[Any, ...]:
    """Return what asking the hub may raise: an error of its HTTP client, whichever that is, or of the system."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError)


def tensors(located: Located, commit: str, names: Iterable[str]) -> dict[str, TensorInfo]:
    """Return the tensors of a repository's safetensors files; headers alone are fetched (SourceError: refused)."""
    from huggingface_hub import HfApi

    found: dict[str, TensorInfo] = {}
    for name in names:
        try:
            header = HfApi().parse_safetensors_file_metadata(located.name, name, revision=commit)
        except failures() as error:
            raise _refusal(error, located, Source(located.name), f"the header of `{name}`") from error
        for tensor, info in header.tensors.items():
            found[tensor] = TensorInfo(Path(name), info.dtype, tuple(info.shape), *info.data_offsets)
    return found


def downloaded(located: Located, source: Source, patterns: list[str], what: str, *, asked: str | None = None) -> Path:
    """Return a folder with the files of a hub model that match the patterns (SourceError: ``what`` cannot be had)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with progress.others():
            folder = snapshot_download(
                located.name, revision=located.revision, local_files_only=source.offline, allow_patterns=patterns
            )
    except (HFValidationError, *failures()) as error:
        raise _refusal(error, replace(located, revision=asked or located.revision), source, what) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # an answer that is not the hub's
        why = reason_of(error)
    else:
        if re.fullmatch(r"[0-9a-f]{40}", Path(folder).name):
            return Path(folder)
        why = f"it calls a commit `{Path(folder).name}`, not by 40 hexadecimal digits"
    hint = "check `HF_ENDPOINT` and what stands between here and the hub, or try again later"
    raise SourceError(f"the answer of the hub about `{located.name}` ({what}) is not understood", why=why, hint=hint)


def _refusal(error: Exception, located: Located, source: Source, what: str) -> SourceError:
    from huggingface_hub import errors

    name = f"{located.name}@{located.revision}" if located.revision else located.name
    wanted = f"`{name}` ({what}) from the hub"
    local = "" if "/" not in name else f"; no local path `{source.spec}` exists either"
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"`{source.spec}` is neither a path nor a hub id", why=reason_of(error))
    what = "cannot download"
    if isinstance(error, errors.GatedRepoError):
        what, why = "may not download", "access to it has to be granted"
        hint = "ask for access on its page, then `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"`{located.name}` has no revision `{located.revision}`"
        hint = "name a branch, a tag or a commit that it has"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"the hub has no such model, or it is private{local}"
        hint = "check the name; `hf auth login` for a private one"
    elif answered := answer_of(error):
        why, hint = answered
    else:
        what, why = "would have downloaded", "the hub cannot be reached"
        hint = "connect, or name a local folder or file"
        if source.offline:
            why = "the hub may not be asked (`--offline`)"
        elif isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            why = "the hub may not be asked (`HF_HUB_OFFLINE` is set)"
        why += f", and the cache does not hold it{local}"
    return SourceError(f"{what} {wanted}", why=why, hint=did_you_mean(source.spec, hint))


def answer_of(error: BaseException | None) -> tuple[str, str] | None:
    """Return what the hub answered in place of what was asked, and what to do; None where it did not answer."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if getattr(response, "status_code", None) is not None:
            break
        error = error.__cause__
    else:
        return None
    code = int(response.status_code)
    told = (response.headers.get("X-Error-Message") or "").strip().rstrip(".")
    words = f": {told[:1].lower()}{told[1:]}" if told else ""
    if code == 401:
        return f"the hub does not accept your token ({code}{words})", "`hf auth login`, or set `HF_TOKEN` to another"
    if code == 403:
        return f"your token does not allow it ({code}{words})", "use a token with that right: `hf auth login`"
    return f"the hub answered {code}{words}", "try again later" if code >= 500 or code == 429 else "check the name"
