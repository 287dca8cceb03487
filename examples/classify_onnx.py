"""Classify photographs with an ONNX export, by ONNX Runtime, Pillow and NumPy alone, without peftc, torch or timm.

    python classify_onnx.py EXPORT PHOTO [PHOTO ...]

`export.json` beside `model.onnx` says how a photograph becomes numbers and what the classes are called.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(photo: str, how: dict[str, Any]) -> np.ndarray:
    """Return (1, 3, height, width) numbers of a photograph: resized, cut out of the middle, and normalised."""
    image = Image.open(photo).convert("RGB")
    high, wide = how["input_size"][1:]
    # `crop_pct` is the share of the resized side that the model sees
    short = int(high / how["crop_pct"])
    scale = short / min(image.size)
    size = [short if side == min(image.size) else int(side * scale) for side in image.size]
    if how.get("crop_mode") == "squash":  # both sides are resized, whatever that does to the picture
        size = [int(wide / how["crop_pct"]), short]
    image = image.resize(size, getattr(Image.Resampling, how["interpolation"].upper()))
    left, top = round((image.width - wide) / 2), round((image.height - high) / 2)
    cut = np.asarray(image.crop((left, top, left + wide, top + high)), np.float32) / 255
    return ((cut - np.float32(how["mean"])) / np.float32(how["std"])).transpose(2, 0, 1)[None]


def main(folder: str, *photos: str) -> None:
    """Print the most likely class of each photograph, and how sure the model is."""
    import onnxruntime

    about = json.loads((Path(folder) / "export.json").read_text())["about"]
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    for photo in photos:
        logits = session.run(None, {session.get_inputs()[0].name: pixels(photo, about["preprocess"])})[0][0]
        shares = np.exp(logits - logits.max())
        best = int(logits.argmax())
        name = about["labels"][best] if about.get("labels") else best
        print(f"{photo}: {name} ({shares[best] / shares.sum():.3f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
