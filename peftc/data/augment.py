"""Random changes to images that are learnt from: timm's crops, flips and policies, mixup and cutmix.

What happens to an image follows from a seed of its own, and how two are mixed from one of their step: a step that is
made again, or by other processes, draws the same.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from peftc.data.dataset import Dataset
from peftc.data.images import MODES, fetched, normalised, with_mode
from peftc.errors import UsageError
from peftc.options import Augment

SMALLEST_CROP = 0.35  # of the area; timm's 0.08 is for training from scratch


class Seeds(NamedTuple):
    """What the random numbers of some samples of a step follow from."""

    samples: Sequence[int]  # one for each
    step: int  # one for all, in whichever processes and parts they are


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

    def read(self, indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Return (batch, channels, height, width) of some samples, each changed by a seed."""
        if self.transform is None:
            return self.plain(indices).inputs  # type: ignore[no-any-return]
        images, made = fetched(lambda index: self.data[index][0], indices), []
        for seed in seeds:  # an image is gone when the next is changed: large ones are decoded only now
            with _drawn(seed):
                changed = self.transform(with_mode(next(images), self.mode, self.data.name))
            made.append(self.normalise(torch.as_tensor(changed)))
        return default_collate(made)  # type: ignore[no-any-return]

    def mixed(self, inputs: Tensor, targets: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return images mixed in pairs, and the shares of each class in them (batch, classes).

        A pair are two that lie half of the samples apart. That they do in a step as a whole too, of which processes and
        parts take every second, or every nth.
        """
        if not (self.augment.mixup or self.augment.cutmix):
            return inputs, targets
        from timm.data import Mixup

        if len(inputs) % 2:
            what = f"`--mixup` and `--cutmix` mix images in pairs, and a part of a step has {len(inputs)}"
            raise UsageError(what, hint="choose `--batch-size` and `--accumulate` so that every part is even")
        mix = Mixup(self.augment.mixup, self.augment.cutmix, label_smoothing=0.0, num_classes=classes)
        half = len(inputs) // 2
        order = [*range(half), *reversed(range(half, len(inputs)))]  # to timm the first and the last are a pair
        with _drawn(seed), torch.device("cpu"):
            inputs, shares = mix(inputs[order], targets[order])
        return inputs[order], shares[order]


@contextmanager
def _drawn(seed: int) -> Iterator[None]:
    """Let all that is drawn on the CPU follow from a seed for a while, whichever library draws it."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
