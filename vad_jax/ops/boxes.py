"""Box geometry. Every function takes numpy or JAX arrays of any leading shape; the last axis holds four numbers."""

import math
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from vad_jax.batch import Array


def _namespace(x: Array) -> ModuleType:
  return jnp if isinstance(x, jax.Array) else np


def cxcywh_to_xyxy(boxes: Array) -> Array:
  """Centre and size to corners."""
  center, size = boxes[..., :2], boxes[..., 2:]
  return _namespace(boxes).concatenate([center - size / 2, center + size / 2], -1)


def xyxy_to_cxcywh(boxes: Array) -> Array:
  """Corners to centre and size."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return _namespace(boxes).concatenate([(low + high) / 2, high - low], -1)


def area(boxes: Array) -> Array:
  """Signed area of xyxy boxes: ``[...]``."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou_and_union(a: Array, b: Array) -> tuple[Array, Array]:
  """Intersection over union, and the union, of xyxy boxes whose leading shapes broadcast. 0 where both are empty."""
  xp = _namespace(a)
  overlap = xp.clip(xp.minimum(a[..., 2:], b[..., 2:]) - xp.maximum(a[..., :2], b[..., :2]), 0, None)
  intersection = overlap[..., 0] * overlap[..., 1]
  union = area(a) + area(b) - intersection
  return xp.where(union > 0, intersection / xp.where(union > 0, union, 1), 0), union


def iou(a: Array, b: Array) -> Array:
  """Intersection over union of xyxy boxes whose leading shapes broadcast."""
  return iou_and_union(a, b)[0]


def generalized_iou(a: Array, b: Array) -> Array:
  """Generalised IoU in [-1, 1] (Rezatofighi et al., CVPR 2019) of xyxy boxes whose leading shapes broadcast.

  Scaling an axis of both boxes changes nothing, so pixels and normalised boxes give the same value.
  """
  xp = _namespace(a)
  overlap, union = iou_and_union(a, b)
  hull = xp.maximum(a[..., 2:], b[..., 2:]) - xp.minimum(a[..., :2], b[..., :2])
  hull_area = hull[..., 0] * hull[..., 1]
  return overlap - xp.where(hull_area > 0, (hull_area - union) / xp.where(hull_area > 0, hull_area, 1), 0)


def apply_deltas(boxes: Array, deltas: Array, *, weights: tuple[float, float, float, float]) -> Array:
  """Moves and scales xyxy boxes by what a network predicts (Faster R-CNN's coding, growth limited to 6250 times).

  Args:
    boxes: ``[..., 4]`` xyxy in any unit.
    deltas: ``[..., 4]`` shift of the centre in box sizes, and logarithm of the growth; each times its weight.
    weights: of the two shifts and the two growths.
  """
  xp = _namespace(boxes)
  deltas = deltas.astype(boxes.dtype) / xp.asarray(weights, boxes.dtype)
  start = xyxy_to_cxcywh(boxes)
  center = start[..., :2] + deltas[..., :2] * start[..., 2:]
  size = start[..., 2:] * xp.exp(xp.minimum(deltas[..., 2:], math.log(100_000 / 16)))
  return cxcywh_to_xyxy(xp.concatenate([center, size], -1))


def box_deltas(boxes: Array, targets: Array, *, weights: tuple[float, float, float, float]) -> Array:
  """What ``apply_deltas`` turns boxes into targets with: what a network has to predict.

  Args:
    boxes: ``[..., 4]`` xyxy in any unit, not empty.
    targets: ``[..., 4]`` xyxy in the same unit; empty ones (padding) give large but finite numbers.
    weights: of the two shifts and the two growths.
  """
  xp = _namespace(targets)
  start, end = xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(targets)
  shift = (end[..., :2] - start[..., :2]) / start[..., 2:]
  growth = xp.log(xp.maximum(end[..., 2:] / start[..., 2:], 1e-8))
  return xp.concatenate([shift, growth], -1) * xp.asarray(weights, boxes.dtype)


def clip_boxes(boxes: Array, size: Array) -> Array:
  """Clips xyxy boxes to an image; those wholly outside become empty.

  Args:
    boxes: ``[..., 4]``.
    size: ``[..., 2]`` height and width in the unit of the boxes; leading shapes broadcast.
  """
  xp = _namespace(boxes)
  return xp.clip(boxes, 0, xp.asarray(size, boxes.dtype)[..., [1, 0, 1, 0]])


def extend_boxes(boxes: Array, extension: tuple[float, float], frame_size: Array) -> Array:
  """Grows xyxy pixel boxes by the given shares of width and height, then clips them to the frame."""
  xp = _namespace(boxes)
  margin = xp.asarray(extension, boxes.dtype) * (boxes[..., 2:] - boxes[..., :2] + 1) / 2
  grown = xp.concatenate([boxes[..., :2] - margin, boxes[..., 2:] + margin], -1)
  return xp.clip(grown, 0, frame_size[:, None] - 1)
