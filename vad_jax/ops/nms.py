"""Non-maximum suppression on the host, for systems or videos where one person gets several boxes."""

import numpy as np

from vad_jax.ops.boxes import iou


def nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
  """Keeps the best of the boxes that overlap; greedy and class-agnostic.

  Args:
    boxes: ``[n, 4]`` xyxy.
    scores: ``[n]``.
    iou_threshold: boxes that overlap a better one by more than this are dropped.

  Returns:
    ``[k]`` indices of the kept boxes, best score first (equal scores in input order).
  """
  kept: list[int] = []
  left = np.argsort(-scores, kind="stable")
  while left.size:
    best, left = left[0], left[1:]
    kept.append(int(best))
    left = left[iou(boxes[best], boxes[left]) <= iou_threshold]
  return np.array(kept, np.int64)
