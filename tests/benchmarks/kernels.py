"""What SNELL and SNELLA keep for the backward pass, what a step costs, and how to find a threshold.

    export OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=65536
    python tests/benchmarks/kernels.py saved
    python tests/benchmarks/kernels.py step [--model vit_tiny_patch16_224] [--batch 8] [--rounds 9] [--methods lora ...]
    python tests/benchmarks/kernels.py threshold

`saved` is the table of section A.1.5 of the papers notes: a ViT of width 384 and depth 4, batch 8. `kept` is the same
kernel left to autograd, `dense` a low-rank change that is multiplied out first. `step` is forward, backward, AdamW and
what the method does after it, on random weights; methods take turns, ratios are paired with `lora`. The peak of the
working memory is over what the model and the optimizer hold; without the second variable holes in the heap count, too.
Times are CPU times. All linear modules of the blocks are adapted, the head and the class token learn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.measure.costs import working_memory
from peftc.methods.adapter.lora import lora
from peftc.methods.adapter.snell import after_step, snell
from peftc.methods.adapter.snella import snella
from peftc.nn.adapted import Adapted, adapted_modules
from peftc.nn.kernels import threshold_of

RANK = 8
CPU = torch.device("cpu")


class Kept(nn.Module):
    """A change that autograd keeps: of a kernel, or of a low-rank product."""

    def __init__(self, update: Any, kernel: str, sparse: bool) -> None:
        super().__init__()
        self.update, self.kernel, self.sparse = update, kernel, sparse

    def forward(self, base: Any, x: Tensor) -> Tensor:
        if self.kernel == "product":
            change = self.update.scale * self.update.up @ self.update.down
        else:
            change = torch.cat([self._of(part) for part in self.update.parts])
        return F.linear(x, base.weight + change, base.bias)

    def _of(self, part: Any) -> Tensor:
        distances = torch.cdist(part.rows, part.columns)
        values = 0.1 * (distances[0] - distances[1])
        if self.kernel == "mix":
            values = values + part.mix[0] * torch.softmax(values / part.mix[1], 0) + part.mix[2]
        size = values.detach().abs()
        return values * torch.where(size > part.threshold, size, 0) if self.sparse else values


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "lora": lambda base: lora(base, rank=RANK),
    "lora again": lambda base: lora(base, rank=RANK),
    "snell, sparsity 0": lambda base: snell(base, rank=RANK, sparsity=0.0),
    "snell": lambda base: snell(base, rank=RANK),
    "snell, fused qkv": lambda base: snell(base, rank=RANK, split=1),
    "snell, threshold_every=10": lambda base: snell(base, rank=RANK, threshold_every=10),
    "snella": lambda base: snella(base, rank=RANK),
    "dense low-rank product": lambda base: Kept(lora(base, rank=RANK), "product", False),
    "snell, sparsity 0, kept": lambda base: Kept(snell(base, rank=RANK, sparsity=0.0), "piecewise", False),
    "snell, kept": lambda base: Kept(snell(base, rank=RANK), "piecewise", True),
    "snella, kept": lambda base: Kept(snella(base, rank=RANK), "mix", True),
}


def adapted(model: nn.Module, method: str) -> nn.Module:
    """Freeze a ViT and adapt the linear modules of its blocks."""
    model.requires_grad_(False)
    for name, module in list(model.blocks.named_modules()):  # type: ignore[operator,union-attr]
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), leaf, Adapted(module, METHODS[method](module)))  # type: ignore[operator,union-attr]
    for each in (model.cls_token, *model.head.parameters()):  # type: ignore[union-attr]
        each.requires_grad_()  # type: ignore[union-attr]
    return model.eval()


def saved() -> None:
    sizes: dict[str, Any] = {"embed_dim": 384, "depth": 4, "num_heads": 6, "patch_size": 16, "img_size": 128}
    for method in METHODS:
        torch.manual_seed(0)
        model = adapted(timm.models.VisionTransformer(num_classes=10, **sizes), method)
        own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(torch.randn(8, 3, 128, 128)).sum()
        loss.backward()
        dense = sum(each.base.weight.nbytes for each in adapted_modules(model).values())
        print(f"{method:26s} {sum(kept.values()) / 1e6:8.1f} MB, dense weights {dense / 1e6:.1f} MB")


def stepping(architecture: str, batch: int, method: str) -> tuple[Callable[[], None], int]:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=10)
    model = model.eval() if method == "full" else adapted(model, method)
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    updates: dict[str, nn.Module] = {name: each.update for name, each in adapted_modules(model).items()}
    x, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch) % 10
    done = 0

    def step() -> None:
        nonlocal done
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        done += 1
        after_step(updates, done, 1000, 100)
        optimizer.zero_grad()

    return step, sum(each.numel() for each in learning)


def steps(architecture: str, batch: int, rounds: int, methods: list[str]) -> None:
    calls = {method: stepping(architecture, batch, method) for method in methods}
    peaks = {method: working_memory(call, CPU) for method, (call, _) in calls.items()}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method, (call, _) in calls.items():
            start = time.process_time()
            call()
            times[method].append(time.process_time() - start)
    for method, (_, trainables) in calls.items():
        ratios = [mine / theirs for mine, theirs in zip(times[method], times["lora"], strict=True)]
        print(
            f"{method:26s} {trainables:10,d} trainables, {1e3 * statistics.median(times[method]):7.0f} ms, "
            f"{statistics.median(ratios):.3f} of lora ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"peak {(peaks[method] or 0) / 1e6:6.0f} MB"
        )


def thresholds() -> None:
    import numpy as np

    for shape in ((192, 192), (768, 192), (768, 768), (768, 3072)):
        values = torch.randn(shape).abs()
        flat, place = values.flatten(), int(0.9 * values.numel())
        ways: dict[str, Callable[[], Any]] = {
            "here": lambda values=values, place=place: threshold_of(values.clone(), place),
            "quantile": lambda flat=flat: flat.quantile(0.9),
            "kthvalue": lambda flat=flat, place=place: flat.kthvalue(place),
            "topk": lambda flat=flat, place=place: flat.topk(flat.numel() - place),
            "sort": lambda flat=flat: flat.sort(),
            "numpy, two places": lambda flat=flat, place=place: np.partition(flat.numpy(), (place - 1, place)),
        }
        figures = []
        for name, way in ways.items():
            found = []
            for _ in range(9):
                start = time.process_time()
                way()
                found.append(time.process_time() - start)
            figures.append(f"{name} {1e3 * statistics.median(found):.2f}")
        print(f"{shape}, ms: {', '.join(figures)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("saved", "step", "threshold"))
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "full"], help="`lora` first")
    asked = parser.parse_args()
    if asked.what == "saved":
        saved()
    elif asked.what == "threshold":
        thresholds()
    else:
        steps(asked.model, asked.batch, asked.rounds, asked.methods)
