"""Positions of tokens: fixed tables, the resize of tables to other grids, and boxes that the grid suggests."""

import functools

import jax.numpy as jnp
import numpy as np

from vad_jax.batch import Array


@functools.cache
def sincos_positions(length: int, dim: int) -> np.ndarray:
  """1-D sine-cosine table over the flattened token index, as in "Attention Is All You Need" and VideoMAE.

  Returns:
    ``[length, dim]`` float32: sine on even channels, cosine on odd ones (computed in float64).
  """
  angles = np.arange(length)[:, None] / 10000 ** (2 * (np.arange(dim) // 2) / dim)
  table = np.where(np.arange(dim) % 2 == 0, np.sin(angles), np.cos(angles))
  return table.astype(np.float32)


@functools.cache
def video_positions(dim: int, grid: tuple[int, int, int], trained_side: int) -> np.ndarray:
  """Positions for a ``(t, h, w)`` grid, from the table of ``(t, trained_side, trained_side)``.

  Each time slice is resized bicubically where the token count differs (EVAD's official code; a grid of another shape
  but the same count is left alone, as there).

  Returns:
    ``[t, h, w, dim]`` float32.
  """
  t, h, w = grid
  table = sincos_positions(t * trained_side**2, dim)
  if len(table) == t * h * w:
    return table.reshape(t, h, w, dim)
  table = table.reshape(t, trained_side, trained_side, dim)
  table = np.einsum("yh,thwc->tywc", bicubic_matrix(trained_side, h), table)
  return np.einsum("xw,tywc->tyxc", bicubic_matrix(trained_side, w), table).astype(np.float32)


def bicubic_matrix(source: int, target: int) -> np.ndarray:
  """Matrix ``[target, source]`` of PyTorch's bicubic resize: A = -0.75, half-pixel centres, clamped, not smoothed."""
  a = -0.75
  center = (np.arange(target) + 0.5) * source / target - 0.5
  first = np.floor(center).astype(int)
  matrix = np.zeros((target, source))
  for offset in range(-1, 3):
    distance = np.abs(center - (first + offset))
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    np.add.at(matrix, (np.arange(target), np.clip(first + offset, 0, source - 1)), np.where(distance <= 1, near, far))
  return matrix


def linear_matrix(source: int, target: int) -> np.ndarray:
  """Matrix ``[target, source]`` of PyTorch's linear resize: half-pixel centres, clamped, not smoothed."""
  center = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0)
  first = np.floor(center).astype(int)
  matrix = np.zeros((target, source))
  np.add.at(matrix, (np.arange(target), first), 1 - (center - first))
  np.add.at(matrix, (np.arange(target), np.minimum(first + 1, source - 1)), center - first)
  return matrix


def corner_matrix(source: int, target: int) -> np.ndarray:
  """Matrix ``[target, source]`` of linear interpolation from one outer edge to the other, with zeros outside.

  As PyTorch's ``grid_sample`` of coordinates from -1 to 1 does it (``align_corners=False``): the first and the last
  sample lie half a cell outside of the centres, and so have half of their value.
  """
  center = np.linspace(-1, 1, target) if target > 1 else np.full(1, -1.0)
  center = ((center + 1) * source - 1) / 2
  return np.maximum(1 - np.abs(center[:, None] - np.arange(source)), 0)


def grid_box_bias(h: int, w: int) -> np.ndarray:
  """What to add to the logits of boxes that the tokens of a grid predict, so that each begins at its own place.

  As in OWL-ViT's code: the centre is the far corner of the token, and both sides are one ``w``-th, also where the grid
  is not square.

  Returns:
    ``[h, w, 4]`` float32 logits of centre x, centre y, width and height in [0, 1].
  """
  x, y = np.meshgrid(np.arange(1, w + 1) / w, np.arange(1, h + 1) / h)
  box = np.stack([x, y, np.full_like(x, 1 / w), np.full_like(x, 1 / w)], axis=-1)
  epsilon = 1e-4
  return (np.log(box + epsilon) - np.log1p(epsilon - box)).astype(np.float32)


def volume_positions(mask: Array, frames: int, dim: int) -> Array:
  """3-D sine-cosine positions that count cells which are not padding, of DETR with time as a third axis.

  On each axis the cells count from just above 0 to one full turn. As in the released code of "Classification Matters",
  channel ``i`` of ``n`` has its own frequency ``10000 ** (-i / n)``, so the sine and cosine of a pair differ in it.

  Args:
    mask: ``[B, h, w]`` bool, False for padding, which all frames share.
    frames: ``t``.
    dim: channels, a multiple of 8: a quarter for time, then three eighths each for rows and columns.

  Returns:
    ``[B, t, h, w, dim]`` float32.
  """

  def encode(count: Array, total: Array | int, channels: int) -> Array:
    turn = (count / (total + 1e-6) * 2 * np.pi)[..., None]
    angle = turn / np.float32(10000) ** (np.arange(channels, dtype=np.float32) / channels)
    return jnp.where(np.arange(channels) % 2 == 0, jnp.sin(angle), jnp.cos(angle))

  if dim % 8:
    raise ValueError(f"3-D positions need a multiple of 8 channels, not {dim}")
  counted = mask.astype(jnp.float32)
  rows, columns = (encode(jnp.cumsum(counted, i), counted.sum(i, keepdims=True), 3 * dim // 8) for i in (1, 2))
  time = encode(jnp.arange(frames + 1, dtype=jnp.float32), frames, dim // 4)
  time = jnp.where(mask[:, None, :, :, None], time[1:, None, None], time[0])
  space = (jnp.broadcast_to(x[:, None], (*time.shape[:-1], x.shape[-1])) for x in (rows, columns))
  return jnp.concatenate([time, *space], -1)
