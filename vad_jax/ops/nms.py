"""Non-maximum suppression, greedy and class-agnostic: on the host, and in a compiled program.

Both keep the same boxes. One that is empty, or whose coordinates or score are NaN or infinite, is never kept.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vad_jax.batch import Array
from vad_jax.ops.boxes import iou


def nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
  """Keeps the best of the boxes that overlap.

  Args:
    boxes: ``[n, 4]`` xyxy.
    scores: ``[n]``.
    iou_threshold: boxes that overlap a better one by more than this are dropped.

  Returns:
    ``[k]`` indices of the kept boxes, best score first (equal scores in input order).
  """
  kept: list[int] = []
  left = np.argsort(-scores, kind="stable")
  left = left[_usable(boxes, scores)[left]]
  while left.size:
    best, left = left[0], left[1:]
    kept.append(int(best))
    left = left[iou(boxes[best], boxes[left]) <= iou_threshold]
  return np.array(kept, np.int64)


def batched_nms(boxes: Array, scores: Array, *, iou_threshold: float, count: int) -> tuple[Array, Array]:
  """The first boxes that ``nms`` keeps of each image, in static shapes.

  Every turn takes the best box that is left and drops those that overlap it: ``count`` turns over ``N`` boxes, nothing
  of ``N x N``.

  Args:
    boxes: ``[..., N, 4]`` xyxy.
    scores: ``[..., N]``; minus infinity marks padding.
    iou_threshold: boxes that overlap a better one by more than this are dropped.
    count: ``R``, how many to keep at most.

  Returns:
    Indices ``[..., R]`` int32 of the kept boxes, best score first (equal scores in input order), and ``[..., R]`` bool,
    False for slots that are left over; their index is 0. No gradient flows.
  """
  boxes, scores = jax.lax.stop_gradient((jnp.asarray(boxes), jnp.asarray(scores)))
  left = jnp.where(_usable(boxes, scores), scores, -jnp.inf)

  def keep_best(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
    best = jnp.argmax(left, -1, keepdims=True).astype(jnp.int32)
    valid = jnp.take_along_axis(left, best, -1) > -jnp.inf
    overlap = iou(jnp.take_along_axis(boxes, best[..., None], -2), boxes)
    left = jnp.where((overlap > iou_threshold) | (jnp.arange(left.shape[-1]) == best), -jnp.inf, left)
    return left, (jnp.where(valid, best, 0)[..., 0], valid[..., 0])

  _, (kept, valid) = jax.lax.scan(keep_best, left, length=count)
  return jnp.moveaxis(kept, 0, -1), jnp.moveaxis(valid, 0, -1)


def _usable(boxes: Array, scores: Array) -> Array:
  """Mask ``[...]`` of boxes that are not empty and have only finite numbers."""
  finite = (abs(boxes) < np.inf).all(-1) & (abs(scores) < np.inf)
  return finite & (boxes[..., 2:] > boxes[..., :2]).all(-1)
