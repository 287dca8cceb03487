"""After ``import peftc.timm`` timm's ``create_model`` builds the factors of `peftc export --format timm`."""

from peftc.runtimes import registry

registry.register()
