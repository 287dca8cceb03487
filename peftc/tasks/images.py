"""Images with classes, as a model reads them."""

from collections.abc import Sequence

import torch

from peftc.data.dataset import Dataset
from peftc.data.images import reader
from peftc.errors import DataError, UsageError, reason_of
from peftc.models import inputs
from peftc.models.model import Model
from peftc.models.place import moved, place_of
from peftc.options import Reading
from peftc.tasks.classes import need_classes
from peftc.tasks.task import Batch, Encoded


def encode_images(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return images, or tensors as they are, with their classes."""
    need_classes(data, "image-classification")
    labels = data.labels or []
    is_fixed = model.config.get("pretrained_cfg", {}).get("fixed_input_size", False)
    is_free = (model.config.get("model_args") or {}).get("dynamic_img_size")
    refuse_size(model, settings.image_size, is_fixed=is_fixed and not is_free)
    pixels = reader(data, model.preprocess, settings.image_size)

    def batch(indices: Sequence[int]) -> Batch:
        return Batch(pixels(indices), torch.tensor([labels[data.rows[index]] for index in indices]))

    runs = not model.module.training and place_of(model.module).type != "meta"
    if runs and (data.kind == "tensor" or settings.image_size is not None):  # not as the model itself asks for
        sample = pixels([0])
        try:
            with torch.no_grad():
                inputs.forward(model, moved(model, sample))
        except inputs.DOES_NOT_RUN as error:
            if "memory" in str(error):
                raise
            why = f"it does not run on one of shape {list(sample.shape[1:])}: {reason_of(error)}"
            hint = _built_for(model, settings.image_size)
            raise DataError(f"`{model.name}` does not take the samples of `{data.name}`", why=why, hint=hint) from error
    return Encoded(len(data), batch, key=f"{sorted(model.preprocess.items(), key=str)} {settings.image_size}")


def refuse_size(model: Model, image_size: int | None, *, is_fixed: bool) -> None:
    """Refuse a size of images that a model does not read (UsageError, DataError: with the size that it reads)."""
    if image_size is None:
        return
    if image_size < 1:
        raise UsageError(f"`--image-size` is {image_size}", why="images have at least one pixel")
    size = model.preprocess.get("input_size")
    if size and is_fixed and list(size[1:]) != [image_size] * 2:
        why = f"`--image-size` asks for {image_size}"
        hint = _built_for(model, image_size)
        raise DataError(f"`{model.name}` reads images of {size[1]} x {size[2]} only", why=why, hint=hint)


def _built_for(model: Model, image_size: int | None) -> str | None:
    """Return how to build a model for images of a size; None where that cannot be, as what was made of it keeps its."""
    if image_size is None or model.library != "timm" or model.manifest is not None:
        return None
    return f"build it for that size: `--arch-set img_size={image_size}` in place of `--image-size`"
