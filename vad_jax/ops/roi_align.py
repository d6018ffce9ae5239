"""RoIAlign as interpolation matmuls.

Bilinear sampling and the mean over the samples of a bin are both separable, so one box is two small matrices,
``[S, H]`` and ``[S, W]``, applied to the rows and columns of the map. That is exact, needs no gather and runs on
matrix units.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vad_jax.batch import Array


@jax.named_scope("roi_align")
def roi_align(
  features: Array,
  boxes: Array,
  *,
  scale: float,
  output_size: tuple[int, int] = (7, 7),
  sampling_ratio: int = 2,
) -> Array:
  """Aligned RoIAlign (Mask R-CNN's, with the half-pixel shift of Detectron2's ``ROIAlignV2``).

  Samples more than one cell outside the map count as zero; those up to one cell outside take the border's value. No
  gradient flows to the boxes.

  Args:
    features: ``[B, H, W, C]``.
    boxes: ``[B, N, 4]`` xyxy in input pixels; may leave the map.
    scale: map cells per input pixel.
    output_size: ``(S, S')``, bins down and across.
    sampling_ratio: samples a bin and axis.

  Returns:
    ``[B, N, S, S', C]``.
  """
  boxes = jax.lax.stop_gradient(boxes) * scale - 0.5
  height, width = features.shape[1:3]
  across = _axis_weights(boxes[..., 0], boxes[..., 2], width, output_size[1], sampling_ratio).astype(features.dtype)
  down = _axis_weights(boxes[..., 1], boxes[..., 3], height, output_size[0], sampling_ratio).astype(features.dtype)
  columns = jnp.einsum("bnxw,bhwc->bnhxc", across, features)
  return jnp.einsum("bnyh,bnhxc->bnyxc", down, columns)


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


def _axis_weights(low: Array, high: Array, size: int, bins: int, samples: int) -> Array:
  """Weight ``[B, N, S, size]`` of each cell of an axis in each bin of boxes from ``low`` to ``high`` (cells)."""
  position = (jnp.arange(bins * samples, dtype=low.dtype) + 0.5) / (bins * samples)
  at = low[..., None] + position * (high - low)[..., None]  # [B, N, S * samples]
  inside = (at >= -1) & (at <= size)
  at = jnp.clip(at, 0, size - 1)[..., None]
  tent = jnp.maximum(0, 1 - jnp.abs(at - jnp.arange(size, dtype=low.dtype)))
  tent = jnp.where(inside[..., None], tent, 0)
  return tent.reshape(*low.shape, bins, samples, size).mean(-2)
