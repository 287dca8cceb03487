"""Random changes to images that are learnt from: timm's crops, flips and policies, mixup and cutmix.

All of it is drawn from torch's random state, so that a step that is made again draws the same.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.data.dataset import Dataset
from peftc.data.images import MODES, normalised, with_mode
from peftc.errors import UsageError
from peftc.options import Augment

SMALLEST_CROP = 0.35  # of the area; timm's 0.08 is for training from scratch


class Augmented:
    """Images of a data set, changed at random each time they are read; mixing alone takes tensors as well.

    ``size`` is a side in pixels instead of the model's; ``plain`` reads what is mixed and not changed otherwise.
    """

    def __init__(
        self, data: Dataset, preprocess: Mapping[str, Any], size: int | None, augment: Augment, plain: Any
    ) -> None:
        self.data, self.augment, self.plain = data, augment, plain
        self.transform = None
        if augment.policy is None:
            return
        sides = list(preprocess.get("input_size") or []) or None
        if data.kind != "image" or sides is None:
            raise UsageError("`--augment` changes images of a known size", hint="leave it out, or use `--mixup`")
        self.mode = MODES[sides[0]]
        self.normalise = normalised(preprocess, sides[0])
        from timm.data import create_transform

        policy, pixels = augment.policy, (size, size) if size else tuple(sides[1:])
        how = {"auto_augment": None if policy == "crop" else policy, "hflip": 0.5, "scale": (SMALLEST_CROP, 1.0)}
        how |= {"color_jitter": None, "interpolation": preprocess.get("interpolation") or "bilinear"}
        try:
            self.transform = create_transform(pixels, is_training=True, normalize=False, **how)
        except (AssertionError, ValueError, KeyError) as error:
            why = str(error) or "it is no policy of timm's"
            hint = "as `crop`, `rand-m9-mstd0.5-inc1`, `augmix-m5-w3` or `original`"
            raise UsageError(f"unknown value `{policy}` for `--augment`", why=why, hint=hint) from None

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return (batch, channels, height, width) of some samples."""
        if self.transform is None:
            return self.plain(indices).inputs  # type: ignore[no-any-return]
        with ThreadPoolExecutor() as pool:  # decoding is the slow part, and has nothing random
            images = list(pool.map(lambda index: self.data[index][0], indices))[::-1]
        with _drawn():  # an image is gone when the next is changed: large ones are decoded only now
            made = [self.transform(with_mode(images.pop(), self.mode, self.data.name)) for _ in indices]
        return torch.stack([self.normalise(torch.as_tensor(each).float() / 255) for each in made])

    def mixed(self, inputs: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return images mixed in pairs, and the shares of each class in them (batch, classes)."""
        if not (self.augment.mixup or self.augment.cutmix):
            return inputs, targets
        from timm.data import Mixup

        if len(inputs) % 2:
            what = f"`--mixup` and `--cutmix` mix images in pairs, and a part of a step has {len(inputs)}"
            raise UsageError(what, hint="choose `--batch-size` and `--accumulate` so that every part is even")
        mix = Mixup(self.augment.mixup, self.augment.cutmix, label_smoothing=0.0, num_classes=classes)
        with _drawn(), torch.device("cpu"):
            return mix(inputs.clone(), targets)  # type: ignore[no-any-return]


@contextmanager
def _drawn() -> Iterator[None]:
    """Let what draws from Python's and numpy's random state draw from torch's for a while."""
    seed = int(torch.randint(2**31, ()))
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
