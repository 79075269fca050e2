"""Small files in the format of `data_pipelines.sources.custom`."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 6, 8
"""Of every image and mask."""

CUT_OFF = {"polygon": [100, 100, 120, 100, 120, 120]}
"""Wholly outside."""


def picture() -> Image.Image:
    values = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
    return Image.fromarray(values)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def write_images(folder: Path) -> None:
    """One of each kind that can be read, one that is cut short, and a mask of the upper left pixel."""
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "a.jpg").write_bytes(encoded(picture()))
    (folder / "cmyk.jpg").write_bytes(encoded(picture().convert("CMYK")))
    (folder / "turned.jpg").write_bytes(encoded(picture(), exif=turned))
    deep = (np.arange(HEIGHT * WIDTH, dtype=np.uint16) * 1000).reshape(HEIGHT, WIDTH)
    (folder / "deep.png").write_bytes(encoded(Image.fromarray(deep), "PNG"))
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    (folder / "cut.jpg").write_bytes(encoded(Image.fromarray(noise), quality=95)[:-40])
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[0, 0] = 255
    (folder / "mask.png").write_bytes(encoded(Image.fromarray(mask), "PNG"))


def says(*texts: str) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def sample(*texts: str, image: Any = "a.jpg", regions: Any = ({"box": [0, 0, 2, 2]},), **more: Any) -> dict:
    """A good sample but for what is asked for."""
    said = says(*(texts or ("What is <region1>?", "A thing.")))
    return {"image": image, "regions": regions, "conversations": said, **more}


def write_lines(path: Path, lines: Sequence[dict | str | bytes]) -> Path:
    """Objects become JSON; texts and bytes are written as they are."""
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join(t + b"\n" if isinstance(t, bytes) else t.encode() + b"\n" for t in texts))
    return path
