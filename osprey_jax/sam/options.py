"""What the automatic mask generator can be told, with the original's names and defaults."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Raises ValueError that names the one that is wrong."""

    points_per_side: int = 32
    """Points along each side of the grid over the whole image."""
    points_per_batch: int = 64
    """Points that are decoded at a time: for speed and memory only."""
    pred_iou_thresh: float = 0.88
    """Masks stay that expect a higher IoU of themselves; with 0, all do."""
    stability_score_thresh: float = 0.95
    """Masks stay that are at least so stable: see `stability_score_offset`."""
    stability_score_offset: float = 1.0
    """Stability is the IoU of the masks at thresholds so much above and below the usual one."""
    box_nms_thresh: float = 0.7
    """A mask goes whose box has a higher IoU with that of a better one."""
    crop_n_layers: int = 0
    """Layers of crops that are searched after the whole image: of 4, 16, 64 … crops."""
    crop_nms_thresh: float = 0.7
    """As `box_nms_thresh`, between crops, of which smaller ones are better."""
    crop_overlap_ratio: float = 512 / 1500
    """How far the crops of the first layer overlap, as a part of the image's shorter side."""
    crop_n_points_downscale_factor: int = 1
    """Each layer has so many times fewer points along a side than the one before."""
    min_mask_region_area: int = 0
    """Holes and islands of fewer pixels are removed."""

    def __post_init__(self) -> None:
        for name, low in (
            ("points_per_side", 1),
            ("points_per_batch", 1),
            ("crop_n_layers", 0),
            ("crop_n_points_downscale_factor", 1),
            ("min_mask_region_area", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_nms_thresh"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
        if not 0 <= self.stability_score_offset < math.inf:
            raise ValueError(
                f"stability_score_offset must be at least 0, got {self.stability_score_offset!r}"
            )
        if not 0 <= self.crop_overlap_ratio < 1:
            raise ValueError(f"crop_overlap_ratio must be from 0 to below 1, got {self.crop_overlap_ratio!r}")
        if self.points_on_side(self.crop_n_layers) < 1:
            raise ValueError(
                f"crop_n_points_downscale_factor ({self.crop_n_points_downscale_factor}) leaves no point of "
                f"points_per_side ({self.points_per_side}) in layer {self.crop_n_layers}"
            )

    def points_on_side(self, layer: int) -> int:
        """Points along each side of the grid over a crop of a layer; layer 0 is the whole image."""
        return int(self.points_per_side / self.crop_n_points_downscale_factor**layer)

    @property
    def points(self) -> int:
        """Points of all crops together."""
        return sum(4**layer * self.points_on_side(layer) ** 2 for layer in range(self.crop_n_layers + 1))
