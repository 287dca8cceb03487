"""Networks that the tests of decompose share, each decomposed once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from peftc.report import Report
from peftc.steps.decompose import decompose
from peftc.store.source import Source
from tests.networks import NETWORKS, save_network


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Source, Path, Report]]:
    """Decompose a network of `NETWORKS` once: its source, the artifact, the report."""
    folder, known = tmp_path_factory.mktemp("networks"), {}

    def make(name: str) -> tuple[Source, Path, Report]:
        if name not in known:
            library, architecture, arguments, options = NETWORKS[name]
            source = save_network(folder / f"{name}-base", library, architecture, arguments)
            report = decompose(source, output_dir=folder / name, ratio=0.5, **options)
            known[name] = source, folder / name, report
        return known[name]

    return make
