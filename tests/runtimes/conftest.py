"""What tests of other libraries share."""

from collections.abc import Iterator

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from peftc.runtimes import quantizer
from peftc.store import quantization


@pytest.fixture
def registered() -> Iterator[None]:
    """Do what `import peftc.transformers` does, and undo it: other tests look at a transformers that knows nothing."""
    quantizer.register()
    yield
    del AUTO_QUANTIZER_MAPPING[quantization.METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[quantization.METHOD]
