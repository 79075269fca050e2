"""The automatic mask generator written plainly: loops, one mask at a time, torch for interpolation.

It shares the network and the image's path to it with what it is compared to, and nothing after that.
"""

import dataclasses
import math
from collections import Counter, deque
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from osprey_jax.sam.predictor import Sam

FOREGROUND, PADDING = 1, -1
DEFAULTS: dict[str, Any] = {
    "points_per_side": 32,
    "points_per_batch": 64,
    "pred_iou_thresh": 0.88,
    "stability_score_thresh": 0.95,
    "stability_score_offset": 1.0,
    "box_nms_thresh": 0.7,
    "crop_n_layers": 0,
    "crop_nms_thresh": 0.7,
    "crop_overlap_ratio": 512 / 1500,
    "crop_n_points_downscale_factor": 1,
    "min_mask_region_area": 0,
}


@dataclasses.dataclass
class Mask:
    """A candidate, and its mask in the whole image."""

    iou: np.float32
    stability: float
    box: list[float]
    point: list[float]
    crop_box: list[int]
    mask: np.ndarray
    doubts: int
    """Pixels so close to a threshold that rounding decides."""


def everything(
    sam: Sam, image: np.ndarray, *, max_height: int | None = None, **options: Any
) -> tuple[list[dict[str, Any]], list[int], Counter]:
    """Records as the original's, each's `Mask.doubts`, and how many candidates steps kept and dropped."""
    o, tally = {**DEFAULTS, **options}, Counter()
    height, width = image.shape[:2]
    scale = 1.0 if max_height is None else min(1.0, max_height / height)
    masks: list[Mask] = []
    boxes, layers = generate_crop_boxes(height, width, o["crop_n_layers"], o["crop_overlap_ratio"])
    for crop_box, layer in zip(boxes, layers, strict=True):
        masks += process_crop(sam, image, crop_box, layer, scale, o, tally)
    if len(boxes) > 1:
        scores = [np.float32(1) / np.float32(area(mask.crop_box)) for mask in masks]
        keep = nms([mask.box for mask in masks], scores, o["crop_nms_thresh"])
        count(tally, "crop nms", len(keep), len(masks))
        masks = [masks[i] for i in keep]
    for mask in masks:
        mask.box = mask_to_box(mask.mask)
    if o["min_mask_region_area"] > 0:
        masks = without_small_regions(masks, o, tally)
    return [record(mask) for mask in masks], [mask.doubts for mask in masks], tally


def process_crop(
    sam: Sam, image: np.ndarray, crop_box: list[int], layer: int, scale: float, o: dict, tally: Counter
) -> list[Mask]:
    x0, y0, x1, y1 = crop_box
    h, w = y1 - y0, x1 - x0
    embedding = sam.encode(image[y0:y1, x0:x1].copy())
    points = grid(int(o["points_per_side"] / o["crop_n_points_downscale_factor"] ** layer))
    points = [[x * w, y * h] for x, y in points]
    judged_size = max(1, math.floor(h * scale + 0.5)), max(1, math.floor(w * scale + 0.5))
    in_h, in_w = embedding.where.resized
    batch = min(o["points_per_batch"], o["points_per_side"] ** 2)
    found: list[Mask] = []
    for start in range(0, len(points), batch):
        some = points[start : start + batch]
        places = np.zeros((batch, 2, 2), np.float32)
        for i, (x, y) in enumerate(some):
            places[i, 0] = x * (in_w / w), y * (in_h / h)
        kinds = np.array([[FOREGROUND, PADDING]] * batch, np.int32)
        logits, ious = (np.asarray(a) for a in sam.decode(embedding, places, kinds, multimask=True))
        for i, (x, y) in enumerate(some):
            for low_res, iou in zip(logits[i], ious[i], strict=True):
                passed = o["pred_iou_thresh"] <= 0 or bool(iou > np.float32(o["pred_iou_thresh"]))
                count(tally, "iou", int(passed), 1)
                if not passed:
                    continue
                judged = upscale(sam, low_res, (in_h, in_w), judged_size)
                offset = o["stability_score_offset"]
                high, low = int((judged > offset).sum()), int((judged > -offset).sum())
                stability = np.float32(high) / np.float32(low) if low else np.float32("nan")
                stable = bool(stability >= np.float32(o["stability_score_thresh"]))
                count(tally, "stability", int(stable), 1)
                if not stable:
                    continue
                a, b, c, d = mask_to_box(judged > 0)
                box = [a + x0 * scale, b + y0 * scale, c + x0 * scale, d + y0 * scale]
                whole = [0, 0, image.shape[1] * scale, image.shape[0] * scale]
                near = near_crop_edge(box, [side * scale for side in crop_box], whole)
                count(tally, "edge", int(not near), 1)
                if near:
                    continue
                mask = np.zeros(image.shape[:2], bool)
                final = upscale(sam, low_res, (in_h, in_w), (h, w))
                mask[y0:y1, x0:x1] = final > 0
                rounding = 1e-6 * np.abs(low_res).max()
                close = [np.abs(judged - at) < rounding for at in (-offset, 0, offset)]
                doubts = int(np.sum(close)) + int((np.abs(final) < rounding).sum())
                found.append(Mask(iou, float(stability), box, [x + x0, y + y0], crop_box, mask, doubts))
    keep = nms([mask.box for mask in found], [mask.iou for mask in found], o["box_nms_thresh"])
    count(tally, "nms", len(keep), len(found))
    return [found[i] for i in keep]


def count(tally: Counter, step: str, kept: int, total: int) -> None:
    tally[f"{step} kept"] += kept
    tally[f"{step} dropped"] += total - kept


def generate_crop_boxes(h: int, w: int, layers: int, ratio: float) -> tuple[list[list[int]], list[int]]:
    boxes, numbers = [[0, 0, w, h]], [0]
    for i in range(layers):
        n = 2 ** (i + 1)
        overlap = int(ratio * min(h, w) * (2 / n))
        crop_w = math.ceil((overlap * (n - 1) + w) / n)
        crop_h = math.ceil((overlap * (n - 1) + h) / n)
        for across in range(n):
            for down in range(n):
                x0, y0 = int((crop_w - overlap) * across), int((crop_h - overlap) * down)
                boxes.append([x0, y0, min(x0 + crop_w, w), min(y0 + crop_h, h)])
                numbers.append(i + 1)
    return boxes, numbers


def grid(n: int) -> list[list[float]]:
    offset = 1 / (2 * n)
    places = np.linspace(offset, 1 - offset, n)
    return [[float(x), float(y)] for y in places for x in places]


def upscale(sam: Sam, logits: np.ndarray, inside: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    side = sam.config.encoder.image_size
    x = torch.from_numpy(np.array(logits))[None, None]
    x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    x = x[..., : inside[0], : inside[1]]
    return F.interpolate(x, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def mask_to_box(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())] if len(xs) else [0, 0, 0, 0]


def near_crop_edge(box: list[float], crop_box: list[float], image_box: list[float]) -> bool:
    near = [abs(a - b) <= 20 for a, b in zip(box, crop_box, strict=True)]
    outer = [abs(a - b) <= 20 for a, b in zip(box, image_box, strict=True)]
    return any(a and not b for a, b in zip(near, outer, strict=True))


def area(box: list) -> Any:
    return (box[2] - box[0]) * (box[3] - box[1])


def nms(boxes: list[list[float]], scores: list[Any], threshold: float) -> list[int]:
    """The indices that stay, from the highest score to the lowest."""
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    f32 = [[np.float32(side) for side in box] for box in boxes]
    keep: list[int] = []
    for i in order:
        if all(not overlap(f32[i], f32[j]) > threshold for j in keep):
            keep.append(i)
    return keep


def overlap(a: list, b: list) -> float:
    w = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0))
    h = max(min(a[3], b[3]) - max(a[1], b[1]), np.float32(0))
    union = area(a) + area(b) - w * h
    return float(w * h / union) if union else math.nan


def without_small_regions(masks: list[Mask], o: dict, tally: Counter) -> list[Mask]:
    smaller, scores = o["min_mask_region_area"], []
    for mask in masks:
        filled, holes = remove_small_regions(mask.mask, smaller, "holes")
        mask.mask, islands = remove_small_regions(filled, smaller, "islands")
        mask.box = mask_to_box(mask.mask)
        scores.append(0.0 if holes or islands else 1.0)
    threshold = max(o["box_nms_thresh"], o["crop_nms_thresh"])
    keep = nms([mask.box for mask in masks], scores, threshold)
    count(tally, "unchanged", sum(score == 1 for score in scores), len(scores))
    count(tally, "region nms", len(keep), len(masks))
    return [masks[i] for i in keep]


def remove_small_regions(mask: np.ndarray, smaller: int, mode: str) -> tuple[np.ndarray, bool]:
    regions = components(~mask if mode == "holes" else mask)
    small = [region for region in regions if len(region) < smaller]
    if not small:
        return mask, False
    if mode == "holes":
        return mask | draw(small, mask.shape), True
    large = [region for region in regions if len(region) >= smaller]
    return draw(large or [max(regions, key=len)], mask.shape), True


def components(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Pixels that touch, also at corners: a flood from each that hasn't been reached, in reading order."""
    waiting, found = mask.copy(), []
    for start in zip(*np.nonzero(mask), strict=True):
        if not waiting[start]:
            continue
        waiting[start] = False
        flood, region = deque([start]), []
        while flood:
            y, x = flood.popleft()
            region.append((y, x))
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if all(0 <= p < side for p, side in zip(near, mask.shape, strict=True)) and waiting[near]:
                    waiting[near] = False
                    flood.append(near)
        found.append(region)
    return found


def draw(regions: list, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for region in regions:
        mask[tuple(np.transpose(region))] = True
    return mask


def record(mask: Mask) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.mask.astype(np.uint8)))
    x0, y0, x1, y1 = mask.box
    a, b, c, d = mask.crop_box
    return {
        "segmentation": {"size": list(mask.mask.shape), "counts": rle["counts"].decode()},
        "area": int(mask.mask.sum()),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "predicted_iou": float(mask.iou),
        "point_coords": [mask.point],
        "stability_score": mask.stability,
        "crop_box": [a, b, c - a, d - b],
    }
