"""Fetch a model's files from the hub through its cache, or say in one line what could not be fetched."""

from __future__ import annotations

from pathlib import Path

from peftc.errors import SourceError
from peftc.source import Located, Source

SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the second only where a model has none of the first


def snapshot(located: Located, source: Source, with_weights: bool) -> Path:
    """Return the local folder of a hub model; weights are fetched only when asked for.

    Raises:
        SourceError: there is no network, no such model, or no access to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    asked = f"{located.name}@{located.revision}" if located.revision else located.name
    wanted = f"`{asked}` (config{' and weights' if with_weights else ''}) from the hub"
    local = "" if "/" not in asked else f"; no local path `{source.spec}` exists either"
    try:
        for weights in WEIGHTS:
            folder = Path(
                snapshot_download(
                    located.name, revision=located.revision, local_files_only=source.offline,
                    allow_patterns=[*SMALL, weights] if with_weights else SMALL,
                )
            )  # fmt: skip
            if not with_weights or any(folder.glob(weights)):
                break
        return folder
    except GatedRepoError as error:
        raise SourceError(
            f"may not download {wanted}", why="access to it has to be granted", hint="`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"cannot download {wanted}",
            why=f"the hub has no such model, or it is private{local}",
            hint="check the name; `hf auth login` for a private one",
        ) from error
    except HFValidationError as error:
        raise SourceError(f"`{source.spec}` is neither a path nor a hub id", why=str(error).splitlines()[0]) from error
    except (LocalEntryNotFoundError, *HfHubHTTPError.__mro__[1:2], OSError) as error:
        why = (
            "the hub may not be asked (`--offline`), and the cache does not hold it"
            if source.offline
            else "the hub cannot be reached, and the cache does not hold it"
        )
        raise SourceError(
            f"would have downloaded {wanted}", why=why + local, hint="connect, or name a local folder or file"
        ) from error
