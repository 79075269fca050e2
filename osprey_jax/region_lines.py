"""A region and what was answered about it as a line of JSON (NumPy)."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from osprey_jax.prompt import REGION


def region_line(
    source: Mapping[str, Any],
    *,
    region: int | str,
    label: str | None,
    box: list[int],
    area: int,
    segmentation: Mapping[str, Any],
    question: str,
    answer: Mapping[str, Any],
) -> dict[str, Any]:
    """What is said of a region, its keys in their order: those of `source` first, those of `answer` last."""
    return {
        **source,
        "region": region,
        **({} if label is None else {"label": label}),
        "box": box,
        "area": area,
        "segmentation": segmentation,
        "question": question.replace(REGION, "<region>"),
        **answer,
    }


def encode(line: Mapping[str, Any]) -> bytes:
    """The line in UTF-8; what that can't encode is escaped as in JSON."""
    return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def mask_box(mask: np.ndarray) -> list[int]:
    """x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask."""
    if not mask.any():
        return [0, 0, 0, 0]
    (ys,), (xs,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
    return [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]
