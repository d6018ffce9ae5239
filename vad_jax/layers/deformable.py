"""Deformable attention over several feature maps of a video: each token looks at a few places that it chooses.

Zhu et al., "Deformable DETR", ICLR 2021, with time as a third axis, as the encoder of Lee et al., "Classification
Matters", ECCV 2024. Parameters have the names of the official code.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.batch import Array
from vad_jax.ops.deformable import Shape, sample_levels

Normalizer = Literal["official", "paper"]
_XAVIER = nnx.initializers.xavier_uniform()
# Queries that a device works on at a time, so that what is computed of them stays in the caches of a CPU, and in 1 GiB
# of other devices.
_ON_CPU, _ELSEWHERE = 2**11, 2**15


class DeformableAttention(nnx.Module):
  """Attention of each token to ``points`` places of each map and head, around where the token is.

  Places and their weights come of linear layers, which start so that heads look in different directions.
  """

  def __init__(
    self,
    dim: int,
    heads: int,
    *,
    levels: int = 4,
    points: int = 8,
    normalizer: Normalizer = "official",
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the layer.

    Args:
      dim: ``D``.
      heads: attention heads; they divide ``D``.
      levels: maps.
      points: samples of a head in each map.
      normalizer: unit of offsets. "paper": cells of their own axis. "official": the released code divides offsets of
        x, y and t by the frames, columns and rows of the map, in this order, and released weights need that.
      dtype: computation type; None follows the parameters. Places and weights are float32 or more.
      rngs: source of the initial parameters.
    """
    self.heads, self.levels, self.points, self.dtype = heads, levels, points, dtype
    self.axes = (0, 2, 1) if normalizer == "official" else (2, 1, 0)  # of (t, h, w), whose sizes divide x, y and t
    samples = heads * levels * points
    zero = nnx.initializers.zeros_init()
    bias = np.broadcast_to(initial_offsets(heads, points)[:, None], (heads, levels, points, 3)).reshape(-1)
    self.sampling_offsets = nnx.Linear(
      dim, 3 * samples, kernel_init=zero, bias_init=lambda key, shape, dtype: jnp.asarray(bias, dtype), rngs=rngs
    )
    self.attention_weights = nnx.Linear(dim, samples, kernel_init=zero, rngs=rngs)
    self.value_proj = nnx.Linear(dim, dim, kernel_init=_XAVIER, dtype=dtype, rngs=rngs)
    self.output_proj = nnx.Linear(dim, dim, kernel_init=_XAVIER, dtype=dtype, rngs=rngs)

  def values(self, tokens: Array, mask: Array) -> Array:
    """What can be seen, ``[B, heads, S, D / heads]``.

    Args:
      tokens: ``[B, S, D]``, cells of all maps one after the other, each map in the order time, row, column.
      mask: ``[B, S]`` bool, False for padding, which looks like zeros.
    """
    values = jnp.where(mask[..., None], self.value_proj(tokens), 0)
    return values.reshape(*mask.shape, self.heads, -1).swapaxes(1, 2)

  def __call__(self, query: Array, values: Array, references: Array, shapes: Sequence[Shape]) -> Array:
    """Attends.

    Args:
      query: ``[B, Q, D]``.
      values: what ``values`` returned.
      references: ``[B, Q, levels, 3]`` where queries are: x, y, t in [0, 1] of each map.
      shapes: ``(t, h, w)`` of each map.

    Returns:
      ``[B, Q, D]``.
    """
    offsets, logits = self._project(query)
    units = np.array(shapes, np.float32)[:, self.axes]
    references = references.transpose(2, 3, 0, 1).astype(offsets.dtype)
    locations = references[:, None, :, None] + offsets / units[:, None, :, None, None, None]
    found = sample_levels(values, shapes, locations, jax.nn.softmax(logits, (0, 1)))
    return self.output_proj(found.swapaxes(1, 2).reshape(query.shape))

  def _project(self, query: Array) -> tuple[Array, Array]:
    """Offsets ``[levels, points, 3, heads, B, Q]`` and logits ``[levels, points, heads, B, Q]``, float32 or more.

    With queries last, as ``sample_levels`` has them inside, nothing is moved, and the softmax is over leading axes.
    """
    exact = jnp.promote_types(query.dtype, jnp.float32)
    grid = (-1, self.heads, self.levels, self.points)

    def joined(name: str) -> Array:
      offsets, logits = (getattr(linear, name)[...] for linear in (self.sampling_offsets, self.attention_weights))
      both = jnp.concatenate([offsets.reshape(*grid, 3), logits.reshape(*grid, 1)], -1)
      return both.transpose(2, 3, 4, 1, 0)

    kernel, bias = joined("kernel"), joined("bias")
    if self.dtype is not None:
      query, kernel = query.astype(self.dtype), kernel.astype(self.dtype)
    out = jnp.einsum("lpchd,bqd->lpchbq", kernel, query, preferred_element_type=exact) + bias[..., None]
    return out[:, :, :3], out[:, :, 3]


def initial_offsets(heads: int, points: int) -> np.ndarray:
  """Where heads look before training, ``[heads, points, 3]`` in x, y and t, further with each point.

  Half of the heads look around in the frame, the others in the same directions and ahead in time.
  """
  half = -(-heads // 2)
  angle = 2 * np.pi * (np.arange(heads) % half) / half
  ahead = np.arange(heads) < half
  direction = np.stack([np.cos(angle), np.sin(angle), ahead], -1)
  direction /= np.abs(direction).max(-1, keepdims=True)
  return direction[:, None] * np.arange(1, points + 1)[:, None]


class EncoderLayer(nnx.Module):
  """Deformable attention, then a feed-forward part with ReLU, with a LayerNorm (epsilon 1e-5) behind each."""

  def __init__(
    self,
    dim: int,
    heads: int,
    hidden: int,
    *,
    levels: int,
    points: int,
    normalizer: Normalizer,
    dropout: float,
    remat: bool,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    self.self_attn = DeformableAttention(
      dim, heads, levels=levels, points=points, normalizer=normalizer, dtype=dtype, rngs=rngs
    )
    self.norm1, self.norm2 = (nnx.LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs) for _ in range(2))
    self.linear1 = nnx.Linear(dim, hidden, kernel_init=_XAVIER, dtype=dtype, rngs=rngs)
    self.linear2 = nnx.Linear(hidden, dim, kernel_init=_XAVIER, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)
    self.remat = remat

  def __call__(
    self,
    queries: tuple[Array, Array, Array],
    tokens: Array,
    mask: Array,
    shapes: Sequence[Shape],
    rngs: nnx.Rngs | None = None,
  ) -> Array:
    """Runs the layer, for some queries after the other where they are many.

    Args:
      queries: tokens that look, ``[B, Q, D]``, their positions ``[B, Q, D]`` and references ``[B, Q, levels, 3]``.
      tokens: what they look at, ``[B, S, D]``.
      mask: ``[B, S]`` bool, False for padding.
      shapes: ``(t, h, w)`` of each map.
      rngs: stream ``dropout``; needed in training.

    Returns:
      ``[B, Q, D]``.
    """
    batch, count, dim = queries[0].shape
    most = _ON_CPU if jax.default_backend() == "cpu" else _ELSEWHERE
    turns = -(-batch * count // (most * max(jax.sharding.get_abstract_mesh().size, 1)))
    size = -(-count // turns)
    values = self.self_attn.values(tokens, mask)

    def turn(inputs: tuple[tuple[Array, Array, Array], Array | None]) -> Array:
      (x, positions, references), key = inputs
      rngs = None if key is None else nnx.Rngs(dropout=key)
      drop = lambda x: self.dropout(x, rngs=rngs)  # noqa: E731
      x = self.norm1(x + drop(self.self_attn(x + positions, values, references, shapes)))
      return self.norm2(x + drop(self.linear2(drop(jax.nn.relu(self.linear1(x))))))

    def split(x: Array) -> Array:
      x = jnp.pad(x, [(0, 0), (0, turns * size - count)] + [(0, 0)] * (x.ndim - 2))
      return jnp.moveaxis(x.reshape(batch, turns, size, *x.shape[2:]), 1, 0)

    keys = None if rngs is None else jax.random.split(rngs.dropout(), turns)
    turn = jax.checkpoint(turn) if self.remat else turn
    with jax.named_scope(f"{turns * size}_of_{tokens.shape[1]}_queries"):  # tells vad_jax.describe what is saved
      out = jax.lax.map(turn, (tuple(map(split, queries)), keys))
    return jnp.moveaxis(out, 0, 1).reshape(batch, turns * size, dim)[:, :count]


class Encoder(nnx.Module):
  """Layers of deformable attention in which all cells of several maps look at each other."""

  def __init__(
    self,
    dim: int,
    heads: int,
    hidden: int,
    layers: int,
    *,
    levels: int = 4,
    points: int = 8,
    normalizer: Normalizer = "official",
    dropout: float = 0.1,
    remat: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the encoder.

    Args:
      dim: ``D``, a multiple of ``heads``.
      heads: attention heads.
      hidden: channels inside feed-forward parts.
      layers: number of layers.
      levels: maps.
      points: samples of a head in each map.
      normalizer: unit of offsets, see ``DeformableAttention``.
      dropout: rate.
      remat: recompute layers in the backward pass instead of storing their activations.
      dtype: computation type; None follows the parameters. Places and attention weights are float32 or more.
      rngs: source of the initial parameters.
    """
    options: dict[str, Any] = {"levels": levels, "points": points, "normalizer": normalizer, "dropout": dropout}
    options |= {"remat": remat, "dtype": dtype, "rngs": rngs}
    self.layers = nnx.List([EncoderLayer(dim, heads, hidden, **options) for _ in range(layers)])

  def __call__(
    self,
    maps: Sequence[Array],
    positions: Sequence[Array],
    masks: Sequence[Array],
    rngs: nnx.Rngs | None = None,
    frames: Sequence[Sequence[int]] | None = None,
  ) -> list[Array]:
    """Runs the encoder.

    Args:
      maps: ``[B, t, h, w, D]`` each.
      positions: of their cells, of the same shapes.
      masks: ``[B, h, w]`` bool each, False for padding.
      rngs: stream ``dropout``; needed in training.
      frames: indices of the frames of each map that are wanted; None wants all. The last layer is run for these alone,
        which changes nothing in them.

    Returns:
      Maps like those given, of the wanted frames.
    """
    shapes = [x.shape[1:4] for x in maps]

    def flat(parts: Sequence[Array]) -> Array:
      return jnp.concatenate([part.reshape(len(part), -1, *part.shape[4:]) for part in parts], 1)

    def split(x: Array, shapes: Sequence[Shape]) -> list[Array]:
      parts = jnp.split(x, np.cumsum([np.prod(shape) for shape in shapes])[:-1], 1)
      return [part.reshape(len(x), *shape, *x.shape[2:]) for part, shape in zip(parts, shapes, strict=True)]

    mask = flat([jnp.repeat(mask[:, None], t, 1) for mask, (t, _, _) in zip(masks, shapes, strict=True)])
    x, places = flat(maps), (flat(positions), reference_points(shapes, masks))
    *first, last = self.layers
    for layer in first:
      x = layer((x, *places), x, mask, shapes, rngs)
    if frames is None:
      return split(last((x, *places), x, mask, shapes, rngs), shapes)
    wanted = [np.array(indices) for indices in frames]
    pick = lambda part: flat([level[:, i] for level, i in zip(split(part, shapes), wanted, strict=True)])  # noqa: E731
    found = last((pick(x), *map(pick, places)), x, mask, shapes, rngs)
    return split(found, [(len(i), h, w) for i, (_, h, w) in zip(wanted, shapes, strict=True)])


def reference_points(shapes: Sequence[Shape], masks: Sequence[Array]) -> Array:
  """Where the cells of all maps are in each of the maps.

  What is not padding has the same places in all maps, however their sizes were rounded.

  Args:
    shapes: ``(t, h, w)`` of each map.
    masks: ``[B, h, w]`` bool each, False for padding at the right and bottom.

  Returns:
    ``[B, S, levels, 3]`` float32: x, y and t, in [0, 1] of each map for cells that are not padding.
  """
  own, shares = [], []
  for (t, h, w), mask in zip(shapes, masks, strict=True):
    visible = jnp.stack([mask[:, 0].sum(1), mask[:, :, 0].sum(1), jnp.full(len(mask), t)], -1)  # [B, 3]
    cell = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in (t, h, w)), indexing="ij")[::-1], -1)
    visible = jnp.maximum(visible, 1).astype(jnp.float32)
    own.append(cell.reshape(-1, 3).astype(np.float32) / visible[:, None])
    shares.append(visible / np.array([w, h, t], np.float32))
  return jnp.concatenate(own, 1)[:, :, None] * jnp.stack(shares, 1)[:, None]
