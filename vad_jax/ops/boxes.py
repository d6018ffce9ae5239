"""Box geometry. Every function takes numpy or JAX arrays of any leading shape; the last axis holds four numbers."""

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
