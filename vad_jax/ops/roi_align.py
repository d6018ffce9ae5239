"""RoIAlign and RoIPool as interpolation matmuls.

Bilinear sampling and the mean over the samples of a bin are both separable, so one box is two small matrices,
``[S, H]`` and ``[S, W]``, applied to the rows and columns of the map. That is exact, needs no gather and runs on
matrix units. No gradient flows to boxes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vad_jax.batch import Array


@jax.named_scope("roi_align")
def roi_align(
  features: Array,
  boxes: Array,
  *,
  scale: float,
  output_size: tuple[int, int] = (7, 7),
  sampling_ratio: int = 2,
  aligned: bool = True,
) -> Array:
  """RoIAlign (Mask R-CNN's), by default aligned: with the half-pixel shift of Detectron2's ``ROIAlignV2``.

  Samples more than one cell outside the map count as zero; those up to one cell outside take the border's value.

  Args:
    features: ``[B, H, W, C]``.
    boxes: ``[B, N, 4]`` xyxy in input pixels; may leave the map.
    scale: map cells per input pixel.
    output_size: ``(S, S')``, bins down and across.
    sampling_ratio: samples a bin and axis. 0 adapts them to the box, as Detectron2 does: the cells of a bin, rounded
      up; boxes more than twice the map's size get fewer.
    aligned: False is the original form, without the shift and with boxes of at least one cell.

  Returns:
    ``[B, N, S, S', C]``.
  """
  boxes = jax.lax.stop_gradient(boxes) * scale - (0.5 if aligned else 0)
  low, high = boxes[..., :2], boxes[..., 2:]
  if not aligned:
    high = jnp.maximum(high, low + 1)
  height, width = features.shape[1:3]
  across = _axis_weights(low[..., 0], high[..., 0], width, output_size[1], sampling_ratio)
  down = _axis_weights(low[..., 1], high[..., 1], height, output_size[0], sampling_ratio)
  return _sample(features, down, across)


@jax.named_scope("roi_align")
def crop_and_resize(features: Array, boxes: Array, output_size: tuple[int, int]) -> Array:
  """Bilinear samples of boxes on a grid from corner to corner, as TensorFlow's ``tf.image.crop_and_resize``.

  Args:
    features: ``[B, H, W, C]``.
    boxes: ``[B, N, 4]`` xyxy; 0 is the centre of the map's first cell, 1 that of its last. May leave the map, where
      samples are zero, or be mirrored.
    output_size: ``(S, S')``, samples down and across.

  Returns:
    ``[B, N, S, S', C]``.
  """
  boxes = jax.lax.stop_gradient(boxes)
  height, width = features.shape[1:3]
  across = _grid_weights(boxes[..., 0], boxes[..., 2], width, output_size[1])
  down = _grid_weights(boxes[..., 1], boxes[..., 3], height, output_size[0])
  return _sample(features, down, across)


def roi_pool(features: Array, boxes: Array, output_size: tuple[int, int] = (7, 7)) -> Array:
  """RoIPool of TensorFlow's detectors: ``crop_and_resize`` to twice the size, then the largest of 2 x 2 samples.

  Args:
    features: ``[B, H, W, C]``.
    boxes: see ``crop_and_resize``.
    output_size: ``(S, S')``, bins down and across.

  Returns:
    ``[B, N, S, S', C]``.
  """
  down, across = output_size
  samples = crop_and_resize(features, boxes, (2 * down, 2 * across))
  return samples.reshape(*boxes.shape[:2], down, 2, across, 2, -1).max((3, 5))


def pyramid_roi_align(
  pyramid: Sequence[Array],
  boxes: Array,
  *,
  strides: Sequence[float],
  canonical_size: float = 224.0,
  output_size: tuple[int, int] = (7, 7),
) -> tuple[Array, Array]:
  """RoIAlign from the pyramid level that fits each box (FPN, Lin et al., CVPR 2017, eq. 1).

  Args:
    pyramid: levels ``[B, H_l, W_l, C]``, finest first.
    boxes: ``[B, N, 4]`` xyxy in input pixels.
    strides: input pixels per cell of each level.
    canonical_size: side of the box that belongs to the third level, in pixels.
    output_size: ``(S, S')``, bins down and across.

  Returns:
    Features ``[B, N, S, S', C]`` and the index ``[B, N]`` of the level each box was taken from.
  """
  levels = box_levels(boxes, len(pyramid), canonical_size)
  pooled = 0.0
  for index, (features, stride) in enumerate(zip(pyramid, strides, strict=True)):
    here = (levels == index)[..., None]
    # Boxes of other levels are moved off the map: their samples are then exact zeros.
    moved = jnp.where(here, boxes, -1e6)
    pooled += roi_align(features, moved, scale=1 / stride, output_size=output_size)
  return jnp.asarray(pooled), levels


def box_levels(boxes: Array, num_levels: int, canonical_size: float = 224.0) -> Array:
  """Pyramid level of each box: ``[...]`` int32, 0 the finest; a box of ``canonical_size`` belongs to level 2."""
  size = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
  level = jnp.floor(2 + jnp.log2(jnp.sqrt(size) / canonical_size + 1e-8))
  return jnp.clip(jnp.nan_to_num(level, nan=0.0), 0, num_levels - 1).astype(jnp.int32)


def _sample(features: Array, down: Array, across: Array) -> Array:
  """Applies weights ``[B, N, S, H]`` and ``[B, N, S', W]`` to a map ``[B, H, W, C]``: ``[B, N, S, S', C]``."""
  columns = jnp.einsum("bnxw,bhwc->bnhxc", across.astype(features.dtype), features)
  return jnp.einsum("bnyh,bnhxc->bnyxc", down.astype(features.dtype), columns)


def _axis_weights(low: Array, high: Array, size: int, bins: int, samples: int) -> Array:
  """Weight ``[B, N, S, size]`` of each cell of an axis in each bin of boxes from ``low`` to ``high`` (cells)."""
  bin_size = ((high - low) / bins)[..., None, None]
  most = samples or -(-2 * size // bins)
  count = samples or jnp.where(bin_size > 0, jnp.minimum(jnp.ceil(bin_size), most), 0)  # NaN gives 0, too
  sample, total = jnp.arange(most), jnp.maximum(count, 1)
  at = low[..., None, None] + bin_size * (jnp.arange(bins)[:, None] + (sample + 0.5) / total)  # [B, N, S, samples]
  weights = _tents(at, (at >= -1) & (at <= size) & (sample < count), size)
  return weights.sum(-2) / total


def _grid_weights(low: Array, high: Array, size: int, samples: int) -> Array:
  """Weight ``[B, N, S, size]`` of each cell of an axis in samples from ``low`` to ``high`` (0 first, 1 last cell)."""
  position = np.linspace(0, 1, samples, dtype=low.dtype) if samples > 1 else np.full(1, 0.5, low.dtype)
  # In this order boxes that end on the map's border have their last samples on it; rounding never moves them out.
  at = (low[..., None] + position * (high - low)[..., None]) * (size - 1)
  return _tents(at, (at >= 0) & (at <= size - 1), size)


def _tents(at: Array, inside: Array, size: int) -> Array:
  """Bilinear weight ``[..., size]`` of each cell of an axis at positions ``[...]`` in cells; zero where not inside."""
  at = jnp.clip(at, 0, size - 1)[..., None]
  return jnp.where(inside[..., None], jnp.maximum(0, 1 - jnp.abs(at - jnp.arange(size, dtype=at.dtype))), 0)
