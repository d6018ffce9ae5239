"""Trilinear samples of several feature maps of a video, at places that the network chooses, and their weighted sum.

This is what deformable attention spends its time with: 33,320 queries with 8 heads and 32 samples of 8 cells each look
up 68 million rows. So nothing of that number is ever stored. A loop over the samples of a query adds one to the sum,
and where its cells are and what they weigh is worked out inside the same fused loop, which reads contiguous channels of
cells that lie close together for queries that do. It needs no memory but the sum. On a CPU, XLA makes vector
instructions of it, and on a GPU neighbouring threads read neighbouring channels. `benchmarks/deformable.py` compares
with the formula written down plainly.

A TPU looks up one row after the other, whole tiles of memory each time, and narrow rows lie across tiles. There, a row
of the table holds a cell and the seven behind it: a sample is one row of whole tiles instead of eight parts of many.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vad_jax.batch import Array

Shape = tuple[int, int, int]


@jax.named_scope("sample_levels")
def sample_levels(values: Array, shapes: Sequence[Shape], locations: Array, weights: Array) -> Array:
  """Weighted sum of samples of several maps.

  Cell ``i`` of ``n`` on an axis has its centre at ``(i + 0.5) / n``; beyond the outermost centres values fall off
  linearly to zero within one cell (PyTorch's ``grid_sample`` with ``align_corners=False`` and padding with zeros).

  Gradients with respect to values, locations and weights are those of this function. The CUDA kernel that was released
  with "Classification Matters" (Lee et al., ECCV 2024) has others in its backward pass: there, factors of the weights
  of cells are added instead of multiplied, and four of the eight cells are mixed up.

  Axes have the order that is fast. Samples lead, since each is one turn of a loop. Queries come last, since arithmetic
  on places is vectorised over them.

  Args:
    values: ``[B, heads, S, d]``, cells of all maps one after the other, each map in the order time, row, column.
    shapes: ``(t, h, w)`` of each map.
    locations: ``[levels, points, 3, heads, B, Q]`` x, y, t in [0, 1] of each map, float32 or more; may lie outside.
    weights: ``[levels, points, heads, B, Q]``.

  Returns:
    ``[B, heads, Q, d]`` of the values' type, summed up in float32 or more.

  Raises:
    ValueError: the values or locations are not those of such maps.
  """
  batch, heads, cells, dim = values.shape
  levels, points = locations.shape[:2]
  if cells != sum(t * h * w for t, h, w in shapes) or levels != len(shapes):
    raise ValueError(f"maps {list(shapes)} do not hold {cells} cells on {levels} levels")
  maps = tuple((t, h, w) for t, h, w in shapes)
  table = _with_neighbours(values, maps) if jax.default_backend() == "tpu" else values
  samples = (x.reshape(levels * points, *x.shape[2:]) for x in (locations, weights))
  out: Array = _sample(maps, dim, table.reshape(batch, heads * cells, -1), *samples)
  return out.astype(values.dtype)


def _with_neighbours(values: Array, shapes: tuple[Shape, ...]) -> Array:
  """Puts the seven cells behind each one of a map beside it, so that one row holds what a sample needs.

  Args:
    values: ``[B, heads, S, d]``.
    shapes: ``(t, h, w)`` of each map.

  Returns:
    ``[B, heads, S, 8 * d]``; behind the end of an axis there are zeros.
  """
  dim = values.shape[-1]
  kernel = jnp.eye(8 * dim, dtype=values.dtype).reshape(2, 2, 2, dim, 8 * dim)

  def join(cells: Array, shape: Shape) -> Array:
    joined = jax.lax.conv_general_dilated(
      cells.reshape(-1, *shape, dim),
      kernel,
      window_strides=(1, 1, 1),
      padding=[(0, 1)] * 3,
      dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
      precision="highest",  # copies stay exact
    )
    return joined.reshape(*cells.shape[:3], 8 * dim)

  maps = jnp.split(values, np.cumsum([t * h * w for t, h, w in shapes])[:-1], 2)
  return jnp.concatenate([join(cells, shape) for cells, shape in zip(maps, shapes, strict=True)], 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sample(shapes: tuple[Shape, ...], dim: int, table: Array, locations: Array, weights: Array) -> Array:
  """Sums up samples.

  Args:
    shapes: ``(t, h, w)`` of each map.
    dim: ``d``.
    table: ``[B, heads * S, d]`` cells, or ``[B, heads * S, 8 * d]`` with their neighbours.
    locations: ``[samples, 3, heads, B, Q]``.
    weights: ``[samples, heads, B, Q]``.

  Returns:
    ``[B, heads, Q, d]``.
  """
  _, heads, batch, queries = weights.shape
  cells = table.shape[-1] // dim  # of a row

  def turn(total: Array, sample: tuple[Array, ...]) -> tuple[Array, None]:
    def of_clip(table: Array, location: Array, weight: Array) -> Array:
      rows, factors, _ = _corners(location, *sample[2:])
      return sum(
        _spread([weight * factor for factor in factors[first : first + cells]], dim) * _look_up(table, rows[first])
        for first in range(0, 8, cells)
      )

    return total + jax.vmap(of_clip, (0, 2, 1))(table, *sample[:2]), None

  start = jnp.zeros((batch, heads, queries, table.shape[-1]), jnp.result_type(table, locations, weights))
  total, _ = jax.lax.scan(turn, start, (locations, weights, *_levels(shapes, locations)))
  return total.reshape(batch, heads, queries, cells, dim).sum(3)


def _sample_forward(shapes: tuple[Shape, ...], dim: int, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
  return _sample(shapes, dim, *arrays), arrays


def _sample_backward(
  shapes: tuple[Shape, ...], dim: int, arrays: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array]:
  table, locations, weights = arrays
  cells = table.shape[-1] // dim

  def turn(total: Array, sample: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
    def of_clip(total: Array, table: Array, gradient: Array, location: Array, weight: Array) -> tuple[Array, ...]:
      rows, factors, slopes = _corners(location, *sample[2:])
      rows = jnp.stack(rows[::cells], -1)
      found = _look_up(table, rows).reshape(*gradient.shape[:2], 8, dim)
      seen = jnp.moveaxis(jnp.einsum("hqkd,hqd->hqk", found, gradient), -1, 0)
      spread = weight[..., None, None] * jnp.stack(factors, -1)[..., None] * gradient[:, :, None]
      spread = spread.reshape(*rows.shape, cells * dim)
      total = total.at[rows].add(spread, mode="promise_in_bounds", wrap_negative_indices=False)
      # Sums of eight terms: XLA's reductions over a short last axis are slow.
      along, interpolated = (
        jnp.asarray(sum(a * b for a, b in zip(seen, parts, strict=True))) for parts in (slopes, factors)
      )
      return total, (weight * along).astype(location.dtype), interpolated.astype(weight.dtype)

    total, *gradients = jax.vmap(of_clip, (0, 0, 0, 2, 1), (0, 2, 1))(total, table, gradient, *sample[:2])
    return total, tuple(gradients)

  start = jnp.zeros(table.shape, gradient.dtype)
  scanned = (locations, weights, *_levels(shapes, locations))
  total, gradients = jax.lax.scan(turn, start, scanned)
  return total.astype(table.dtype), *gradients


_sample.defvjp(_sample_forward, _sample_backward)


def _spread(factors: Sequence[Array], dim: int) -> Array:
  """Each factor for ``dim`` neighbouring channels of a last axis."""
  return jnp.repeat(jnp.stack(factors, -1), dim, -1)


def _levels(shapes: tuple[Shape, ...], locations: Array) -> tuple[Array, Array]:
  """Of the map of each sample ``(t, h, w)``, and the row ``[samples, heads, 1]`` at which it begins for each head."""
  heads, points = locations.shape[2], len(locations) // len(shapes)
  *starts, cells = np.cumsum([0, *(t * h * w for t, h, w in shapes)])
  rows = np.array(starts)[:, None] + cells * np.arange(heads)
  sizes, rows = (np.repeat(x, points, 0).astype(np.int32) for x in (np.array(shapes), rows))
  return jnp.asarray(sizes), jnp.asarray(rows[..., None])


def _corners(location: Array, size: Array, start: Array) -> tuple[list[Array], list[Array], list[Array]]:
  """The eight cells around places: rows, factors of the interpolation, and these differentiated by x, y and t.

  Args:
    location: ``[3, heads, Q]``.
    size: ``[3]`` of the map, ``t, h, w``.
    start: ``[heads, 1]`` row of the map's first cell.

  Returns:
    Eight arrays ``[heads, Q]`` each, and eight ``[3, heads, Q]``.
  """
  t, h, w = size
  x, y, z = (_neighbours(place, length) for place, length in zip(location, (w, h, t), strict=True))
  rows, factors, slopes = [], [], []
  for (frame, in_time, over_time), (row, down, over_down), (column, across, over_across) in itertools.product(z, y, x):
    rows.append(start + (frame * h + row) * w + column)
    factors.append(in_time * (down * across))
    slopes.append(jnp.stack([over_across * down * in_time, across * over_down * in_time, across * down * over_time]))
  return rows, factors, slopes


def _neighbours(place: Array, size: Array) -> list[tuple[Array, Array, Array]]:
  """The two cells beside places of an axis in [0, 1]: index, weight, and the weight differentiated by the place."""
  position = place * size.astype(place.dtype) - 0.5
  first = jnp.clip(jnp.floor(position), 0, jnp.maximum(size - 2, 0))
  cells = []
  for step in range(2):
    distance = position - first - step
    exists = step < size
    weight = jnp.where(exists, jnp.maximum(0, 1 - jnp.abs(distance)), 0)
    # On a cell's centre the side of larger coordinates counts, so that a step of descent never finds a zero there.
    slope = jnp.where(distance < 0, size, -size).astype(place.dtype)
    slope = jnp.where(exists & (distance >= -1) & (distance < 1), slope, 0)
    cells.append((first.astype(jnp.int32) + jnp.minimum(step, size - 1), weight, slope))
  return cells


def _look_up(table: Array, rows: Array) -> Array:
  return table.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)
