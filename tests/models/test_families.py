"""The table of families says what is known of a model, by the name of its class."""

import pytest

from peftc.models import families


@pytest.mark.parametrize(
    ("architecture", "begins"),
    [("XLMRobertaModel", True), ("ElectraForSequenceClassification", True), ("LlamaForCausalLM", False)],
)
def test_a_text_begins_with_a_class_token_in_some_families(architecture: str, begins: bool) -> None:
    assert any(row.class_token for row in families.of(architecture)) == begins


def test_rows_are_of_one_library() -> None:
    assert {row.library for row in families.of("swin_tiny", "timm")} == {"timm"}
    assert "attn.proj" in families.skips("timm", "swin_tiny")
    assert "attn.proj" not in families.skips("transformers", "SwinForImageClassification")


def test_what_rows_say_is_gathered_once_each() -> None:
    assert set(families.known("retrieval")) == {"CLIPModel", "SiglipModel", "BlipForImageTextRetrieval"}
    for what in ("counts", "stages", "positions", "image_parts", "matching"):
        found = families.known(what)
        assert found and len(set(found)) == len(found)


def test_one_of_several_patterns_is_enough() -> None:
    assert families.matches("blocks.0.mlp.fc1", "head", "*.fc1")
    assert not families.matches("blocks.0.mlp.fc1", "head")
    assert not families.matches("blocks.0.mlp.fc1")
