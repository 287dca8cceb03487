"""After ``import peftc.transformers`` the ``from_pretrained`` of transformers builds the factors of peftc's folders."""

from peftc.runtimes import quantizer

quantizer.register()
