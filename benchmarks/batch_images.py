"""What a batch job reads: seeded images with the damaged ones of any real folder, a network."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64  # pixels that the network takes
# Of 2,000: 21 that cannot be read, and others that can but look as if they could not.
DAMAGED = {"truncated": 10, "empty": 3, "text": 3, "garbage": 5}
STRANGE = {
    "cmyk": 20,
    "grey": 20,
    "upright": 20,
    "huge": 5,
    "alpha": 10,
    "deep": 3,
    "tiny": 3,
    "gif": 3,
}


def natural(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise of several scales, which JPEG compresses about as it does photographs."""
    found = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 90), (12, 50), (40, 28), (120, 14)):
        shape = (max(2, cells * height // width), cells, 3)
        small = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        found += (large - 128) * strength / 128
    found += rng.normal(0, 4, found.shape)
    return Image.fromarray(np.clip(found + 128, 0, 255).astype(np.uint8))


def encoded(kind: str, image: Image.Image, rng: np.random.Generator) -> tuple[str, bytes]:
    """A file's suffix and what is in it."""
    file, options, suffix = io.BytesIO(), {"format": "JPEG", "quality": 90}, ".jpg"
    if kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "grey":
        image = image.convert("L")
    elif kind == "upright":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    elif kind == "huge":
        image = image.resize((6000, 4000))
    elif kind == "tiny":
        image = image.resize((1, 1))
    elif kind in ("alpha", "deep"):
        options, suffix = {"format": "PNG"}, ".png"
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        image = image.convert("RGBA") if kind == "alpha" else Image.fromarray(grey)
    elif kind == "gif":
        image, options, suffix = image.convert("P"), {"format": "GIF"}, ".gif"
    image.save(file, **options)
    data = file.getvalue()
    damaged = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "garbage": b"\xff\xd8" + rng.bytes(20_000),
    }
    return suffix, damaged.get(kind, data)


def generate(folder: Path, count: int, seed: int = 0) -> dict[str, str]:
    """Write ``count`` images; the kind of each by its path in the folder."""
    rng, order = np.random.default_rng(seed), list(range(count))
    random.Random(seed).shuffle(order)
    pool = [natural(rng, 320, 240) for _ in range(60)]
    pool += [natural(rng, 240, 320) for _ in range(20)]
    kinds = [kind for kind, n in {**DAMAGED, **STRANGE}.items() for _ in range(n)]
    special = dict(zip(order, kinds, strict=False))
    found = {}
    for i in range(count):
        image = pool[i % len(pool)]
        if i not in special:  # another crop each, so that contents differ
            image = image.crop((i % 17, i % 13, image.width - i % 11, image.height - i % 7))
        suffix, data = encoded(special.get(i, "plain"), image, rng)
        path = folder / f"{i // 500:03d}" / f"image_{i:06d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found[path.relative_to(folder).as_posix()] = special.get(i, "plain")
    return found


def write_run(folder: Path) -> None:
    """What training leaves: ResNet-18 on images of 64 pixels, random weights whose norms matter."""
    import torch

    import fastres
    from fastres.bench.accuracy import calibrate_

    torch.manual_seed(0)
    network = fastres.create_model("resnet18", num_classes=10).eval()
    calibrate_(network)
    folder.mkdir()
    fastres.save_checkpoint(network.state_dict(), folder / "best.safetensors")
    config = {"model": "resnet18", "classes": list(map(str, range(10)))}
    config |= {"options": {"resize": SIDE}}
    config |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (folder / "config.json").write_text(json.dumps(config))
