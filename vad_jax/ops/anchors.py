"""Anchors of a region proposal network (Faster R-CNN, Ren et al., NeurIPS 2015)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from vad_jax.batch import Array


def anchor_boxes(
  grid: tuple[int, int],
  *,
  stride: float = 16.0,
  base: float = 256.0,
  scales: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
  ratios: Sequence[float] = (0.5, 1.0, 2.0),
) -> Array:
  """Anchors of every cell of a map, as TensorFlow's object detection API lays them out.

  Cell ``(i, j)`` has its anchors around pixel ``(stride * j, stride * i)``: those of the first ratio at all scales,
  then those of the next ratio.

  Args:
    grid: ``(h, w)`` of the map.
    stride: pixels per cell.
    base: side of the square anchor of scale 1, in pixels.
    scales: factors of the side.
    ratios: width over height; the area stays the same.

  Returns:
    ``[h * w * A, 4]`` float32 xyxy in pixels, cells row by row; they may leave the image.
  """
  ratio, scale = np.meshgrid(ratios, scales, indexing="ij")
  size = base * np.stack([scale * np.sqrt(ratio), scale / np.sqrt(ratio)], -1).reshape(-1, 2)  # [A, 2] width, height
  row, column = np.meshgrid(*(stride * np.arange(n) for n in grid), indexing="ij")
  center = np.stack([column, row], -1).reshape(-1, 1, 2)
  return jnp.asarray(np.concatenate([center - size / 2, center + size / 2], -1).reshape(-1, 4), jnp.float32)
