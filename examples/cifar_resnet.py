"""CIFAR ResNets with parameter-free shortcuts: a network of your own, which peftc knows nothing about.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385, section 4.2. Run peftc in the folder
of this file, or put that folder on PYTHONPATH:

    peftc decompose python:cifar_resnet:CifarResNet --arch-set depth=20 --weights resnet20.th --ratio 0.5 -o small
    peftc evaluate small --allow-code --data photos/
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut that subsamples and pads channels with zeros where shapes differ."""

    def __init__(self, in_: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.pad = stride, (out - in_) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in, h, w) to (n, out, h / stride, w / stride)."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(shortcut + y)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, then one linear layer; ``depth`` is 20, 32, 44, 56 or 110."""

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, h, w) to logits (n, 10)."""
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def _stage(in_: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*[Block(out if i else in_, out, 1 if i else stride) for i in range(blocks)])
