"""What is said of an export whose format comes from another package."""

from pathlib import Path
from typing import Any

import pytest

from peftc.errors import ArtifactError
from peftc.formats.exported import Exported
from peftc.formats.safetensors import safetensors
from peftc.methods import registry
from peftc.pages import card
from peftc.steps.compare import compare
from peftc.steps.export import export
from peftc.steps.show import show


class Point:
    """An entry point of another package."""

    name, value = "theirs", "other.package:theirs"

    @staticmethod
    def load() -> Any:
        return theirs


def theirs(model: Any, example: Any, folder: Path, *, level: int = 3) -> Exported:
    written = safetensors(model, example, folder)
    written.runtime, written.about = "theirs 1.0", {}
    return written


@pytest.fixture(scope="module")
def exported(small_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "outsiders", lambda kind: {"theirs": Point()})
        export(small_vit, format="theirs", rounds=5, output_dir=folder)
    return folder


def test_the_card_of_another_packages_format_says_whose_it_is(exported: Path) -> None:
    text = card.text_of(card.subject_of(exported), "me/theirs", {}, None)
    assert "`theirs`, is that of another package, which theirs 1.0 ran" in text
    (exported / "result.json").rename(exported / "gone")
    assert "is that of another package." in card.text_of(card.subject_of(exported), "me/theirs", {}, None)
    (exported / "gone").rename(exported / "result.json")


def test_other_commands_take_another_packages_format(exported: Path, small_vit: Path) -> None:
    found = compare([small_vit, exported])
    assert found.data["models"][-1]["stages"][-1] == "export theirs"
    with pytest.raises(ArtifactError):
        show(exported)
