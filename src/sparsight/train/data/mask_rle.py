"""Masks as COCO writes them: run lengths, compressed, and back.

Letters in shapes: n number of masks, H W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Return masks as COCO's results have them.

    Args:
        masks: (n, H, W) bool, on any device.

    Returns:
        {"size": [H, W], "counts": str} each, ready for `json.dumps`.
    """
    from faster_coco_eval import mask as rle

    if not masks.numel():
        return []
    columns_first = np.asfortranarray(masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0))
    return [
        {"size": [int(side) for side in one["size"]], "counts": _text(one["counts"])}
        for one in rle.encode(columns_first)
    ]


def decode_masks(encoded: Sequence[dict[str, Any]], *, size: tuple[int, int]) -> Tensor:
    """Return run lengths as masks.

    Args:
        encoded: {"size", "counts"} each, of one size.
        size: that height and width, which is wanted if there is none.

    Returns:
        (n, H, W) bool.
    """
    from faster_coco_eval import mask as rle

    if not encoded:
        return torch.zeros(0, *size, dtype=torch.bool)
    decoded = rle.decode([dict(one) for one in encoded])
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1))).bool()


def compress_segmentation(segmentation: Any, *, size: tuple[int, int]) -> bytes:
    """Return an annotation's segmentation as the bytes of compressed run lengths.

    Args:
        segmentation: polygons, [[x, y, x, y, ...], ...]; or {"size", "counts"}, compressed or not.
        size: height and width of its image in pixels.

    Raises:
        ValueError: none of these, or of another size.
    """
    from faster_coco_eval import mask as rle

    height, width = size
    if isinstance(segmentation, dict) and {"size", "counts"} <= set(segmentation):
        if [int(side) for side in segmentation["size"]] != [height, width]:
            raise ValueError(
                f"its mask is {segmentation['size']}, its image {[height, width]} (height, width)"
            )
        if not isinstance(segmentation["counts"], list):
            return _bytes(segmentation["counts"])
        return _bytes(rle.frPyObjects(segmentation, height, width)["counts"])  # type: ignore[call-overload]
    if isinstance(segmentation, list) and all(_is_polygon(part) for part in segmentation):
        if not segmentation:  # the evaluator's code knows no mask of no polygon
            return _bytes(
                encode_masks(torch.zeros(1, height, width, dtype=torch.bool))[0]["counts"]
            )
        return _bytes(rle.merge(rle.frPyObjects(segmentation, height, width))["counts"])  # type: ignore[arg-type,call-overload]
    raise ValueError("its segmentation is neither polygons nor run lengths with their size")


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def _bytes(counts: str | bytes) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)


def _text(counts: str | bytes) -> str:
    return counts if isinstance(counts, str) else counts.decode("ascii")
