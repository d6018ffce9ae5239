"""Multiscale vision transformer with pooling attention: MViTv2 (Li et al., CVPR 2022), in its form for video.

``[B, T, H, W, 3]`` becomes tokens ``[B, T/2, H/4, W/4, C]``; each stage but the first halves height and width and
doubles the width and the heads. Queries, keys and values are pooled by depthwise convolutions, keys and values down to
the grid of the last stage; positions are relative only, learnt by axis. A class token goes along.

Every parameter fits PySlowFast's, whose code this follows. Any size of video will do: tables of relative positions
belong to the size of training, and are stretched to others.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers.attention import by_heads
from vad_jax.layers.conv3d import convolve_depthwise
from vad_jax.layers.drop_path import DropPath
from vad_jax.layers.mlp import Mlp
from vad_jax.layers.position import linear_matrix

Grid = tuple[int, int, int]

# Positions start as in the official code; kernels do not, since its 0.02 everywhere starves narrow networks of signal.
NORMAL, LECUN = nnx.initializers.normal(0.02), nnx.initializers.lecun_normal()

VARIANTS: dict[str, dict[str, Any]] = {
  "mvitv2_s": {"width": 96, "depths": (1, 2, 11, 2), "heads": 1},
  "tiny": {"width": 24, "depths": (1, 2, 1), "heads": 1},
}


class MViT(nnx.Module):
  """Patch embedding, class token, blocks and a final norm.

  Attributes:
    width: channels of the last stage.
    norm: the final LayerNorm.
  """

  def __init__(
    self,
    *,
    width: int,
    depths: Sequence[int],
    heads: int,
    trained_size: tuple[int, int, int] = (16, 224, 224),
    last_pool: bool = True,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      width: channels of the first stage.
      depths: number of blocks of each stage.
      heads: attention heads of the first stage.
      trained_size: frames, height and width of the video that the tables of relative positions are for.
      last_pool: False keeps the last stage at the resolution of the one before; parameters stay the same.
      drop_path: rate of the last block; it grows linearly from 0.
      remat: recompute blocks in the backward pass instead of storing their activations.
      dtype: computation type; None follows the parameters.
      rngs: source of the initial parameters.
    """
    self.remat = remat
    self.patch_embed = PatchEmbed(width, dtype=dtype, rngs=rngs)
    self.class_token = nnx.Param(NORMAL(rngs.params(), (width,)))
    grid = self.patch_embed.grid(trained_size)
    rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
    last = len(depths) - 1
    self.blocks = nnx.List([])
    for stage, index in ((stage, index) for stage, depth in enumerate(depths) for index in range(depth)):
      step = 2 if stage > 0 and index == 0 else 1  # both the growth of the width and the stride
      kv_stride = 2 ** (last - stage)
      self.blocks.append(
        Block(
          width,
          step * width,
          step * heads,
          q_stride=step if last_pool or stage < last else 1,
          kv_stride=kv_stride,
          tables=table_lengths(grid, step, kv_stride),
          drop_path=next(rates),
          dtype=dtype,
          rngs=rngs,
        )
      )
      width, heads, grid = step * width, step * heads, pooled(grid, step)
    self.width = width
    self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)

  def layers(self, video: Array, rngs: nnx.Rngs | None = None) -> Iterator[tuple[Array, Grid]]:
    """Tokens ``[B, 1 + t * h * w, C]``, the class token first, and their grid: those that enter, then each block's."""
    patches = self.patch_embed(video)
    batch, *grid, width = patches.shape
    class_token = jnp.broadcast_to(self.class_token[...].astype(patches.dtype), (batch, 1, width))
    x, grid = jnp.concatenate([class_token, patches.reshape(batch, -1, width)], axis=1), tuple(grid)
    yield x, grid
    run = nnx.remat(Block.__call__, static_argnums=2) if self.remat else Block.__call__
    for block in self.blocks:
      x, grid = run(block, x, grid, rngs), pooled(grid, block.q_stride)
      yield x, grid

  def __call__(self, video: Array, rngs: nnx.Rngs | None = None) -> Array:
    """Normalised video ``[B, T, H, W, 3]`` to normed tokens of the last stage ``[B, t, h, w, C]``."""
    *_, (x, grid) = self.layers(video, rngs)
    return self.norm(x[:, 1:]).reshape(len(x), *grid, -1)


class PatchEmbed(nnx.Module):
  """Overlapping patches of 3 x 7 x 7 every 2 x 4 x 4, by a 3-D convolution."""

  STRIDE = (2, 4, 4)

  def __init__(self, width: int, *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    self.dtype = dtype
    self.kernel = nnx.Param(LECUN(rngs.params(), (3, 7, 7, 3, width)))
    self.bias = nnx.Param(jnp.zeros(width))

  def grid(self, size: Sequence[int]) -> Grid:
    """Tokens ``(t, h, w)`` of a video of ``(T, H, W)``."""
    t, h, w = (-(-n // stride) for n, stride in zip(size, self.STRIDE, strict=True))
    return t, h, w

  def __call__(self, video: Array) -> Array:
    """``[B, T, H, W, 3]`` to ``[B, t, h, w, C]``."""
    # One 2-D convolution over three frames at a time: XLA's 3-D convolutions are many times slower on CPUs.
    kernel, bias = self.kernel[...], self.bias[...]
    dtype = self.dtype or jnp.result_type(video, kernel)
    frames = list(windows(video.astype(dtype), (3, 1, 1), (self.STRIDE[0], 1, 1)))
    x = jnp.concatenate(frames, axis=-1)
    x = jax.lax.conv_general_dilated(
      x.reshape(-1, *x.shape[2:]),
      einops.rearrange(kernel, "t h w i o -> h w (t i) o").astype(dtype),
      self.STRIDE[1:],
      ((3, 3), (3, 3)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x.reshape(*frames[0].shape[:2], *x.shape[1:]) + bias.astype(dtype)


class Block(nnx.Module):
  """Pre-norm block: pooling attention, then MLP; the width changes in the attention."""

  def __init__(
    self,
    dim: int,
    width: int,
    heads: int,
    *,
    q_stride: int,
    kv_stride: int,
    tables: Grid,
    drop_path: float,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    self.q_stride = q_stride
    self.norm1 = nnx.LayerNorm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.attn = PoolingAttention(
      dim, width, heads, q_stride=q_stride, kv_stride=kv_stride, tables=tables, dtype=dtype, rngs=rngs
    )
    self.proj = nnx.Linear(dim, width, dtype=dtype, rngs=rngs) if width != dim else None
    self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.mlp = Mlp(width, 4 * width, dtype=dtype, rngs=rngs)
    self.drop_path = DropPath(drop_path)

  def __call__(self, x: Array, grid: Grid, rngs: nnx.Rngs | None = None) -> Array:
    """``[B, 1 + t * h * w, C]``, the class token first, to the same of the pooled grid."""
    normed = self.norm1(x)
    skip = x if self.proj is None else self.proj(normed)
    if self.q_stride > 1:
      skip = on_grid(lambda patches: max_pool(patches, self.q_stride), skip, grid)
    x = skip + self.drop_path(self.attn(normed, grid), rngs)
    return x + self.drop_path(self.mlp(self.norm2(x)), rngs)


class PoolingAttention(nnx.Module):
  """Multi-head attention among pooled tokens, with relative positions by axis; adds its queries to the result."""

  def __init__(
    self,
    dim: int,
    width: int,
    heads: int,
    *,
    q_stride: int,
    kv_stride: int,
    tables: Grid,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    channels = width // heads
    self.heads = heads
    self.qkv = nnx.Linear(dim, 3 * width, dtype=dtype, rngs=rngs)
    self.pool_q = HeadPool(channels, heads, q_stride, dtype=dtype, rngs=rngs)
    self.pool_k = HeadPool(channels, heads, kv_stride, dtype=dtype, rngs=rngs)
    self.pool_v = HeadPool(channels, heads, kv_stride, dtype=dtype, rngs=rngs)
    self.rel_pos_t, self.rel_pos_h, self.rel_pos_w = (
      nnx.Param(NORMAL(rngs.params(), (length, channels))) for length in tables
    )
    self.proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array, grid: Grid) -> Array:
    """``[B, 1 + t * h * w, C]``, the class token first, to the same of the queries' grid."""
    query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
    query, key, value = self.pool_q(query, grid), self.pool_k(key, grid), self.pool_v(value, grid)
    q_grid, k_grid = pooled(grid, self.pool_q.stride), pooled(grid, self.pool_k.stride)
    out = by_heads(_attend, query, key, value, *self.position_logits(query, q_grid, k_grid))
    out = out + _after_class_token(query[:, 1:])
    return self.proj(out.reshape(*out.shape[:2], -1))

  def position_logits(self, query: Array, q_grid: Grid, k_grid: Grid) -> list[Array]:
    """What relative positions add to logits, for each axis ``[B, 1 + N, heads, length of the keys' axis]``."""
    batch, _, heads, channels = query.shape
    patches = query[:, 1:].reshape(batch, *q_grid, heads, channels)
    exact = jnp.promote_types(query.dtype, jnp.float32)
    terms = []
    for axis, table, q, k in zip("thw", (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w), q_grid, k_grid, strict=True):
      relative = jnp.einsum("qkr,rd->qkd", relative_rows(len(table), q, k), table[...]).astype(query.dtype)
      logits = jnp.einsum(f"bthwnd,{axis}kd->bthwnk", patches, relative, preferred_element_type=exact)
      terms.append(_after_class_token(logits.reshape(batch, -1, heads, k)))
    return terms


def _attend(query: Array, key: Array, value: Array, *position_logits: Array) -> Array:
  """Attention ``[B, N, heads, D]`` with logits of positions for all keys but the first."""
  exact = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=exact)
  t, h, w = (term.swapaxes(1, 2) for term in position_logits)
  positions = t[..., :, None, None] + h[..., None, :, None] + w[..., None, None, :]
  positions = positions.reshape(*positions.shape[:3], -1)
  logits += jnp.pad(positions, ((0, 0),) * 3 + ((1, 0),))
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(value.dtype), value)


def _after_class_token(x: Array) -> Array:
  """Puts zeros for the class token in front of ``[B, N, heads, D]``."""
  return jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))


class HeadPool(nnx.Module):
  """Depthwise 3 x 3 x 3 convolution that all heads share, and a norm over the channels of a head.

  The class token is not convolved, but normed.
  """

  def __init__(self, channels: int, heads: int, stride: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    self.heads, self.stride = heads, stride
    self.kernel = nnx.Param(LECUN(rngs.params(), (3, 3, 3, 1, channels)))
    self.norm = nnx.LayerNorm(channels, epsilon=1e-6, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array, grid: Grid) -> Array:
    """``[B, 1 + t * h * w, heads * D]``, the class token first, to ``[B, 1 + n, heads, D]``."""
    kernel, stride = jnp.tile(self.kernel[...], self.heads), (1, self.stride, self.stride)
    x = on_grid(lambda patches: convolve_depthwise(patches, kernel, stride), x, grid)
    return self.norm(x.reshape(*x.shape[:2], self.heads, -1))


def on_grid(function: Callable[[Array], Array], x: Array, grid: Grid) -> Array:
  """Applies a function of ``[B, t, h, w, C]`` to tokens, but not to the class token in front of them."""
  batch, _, width = x.shape
  patches = function(x[:, 1:].reshape(batch, *grid, width))
  return jnp.concatenate([x[:, :1], patches.reshape(batch, -1, width)], axis=1)


def pooled(grid: Grid, stride: int) -> Grid:
  """The grid after pooling height and width."""
  t, h, w = grid
  return t, -(-h // stride), -(-w // stride)


def windows(x: Array, size: Grid, strides: Grid, fill: float = 0.0) -> Iterator[Array]:
  """What sliding windows see, one place of all windows after the other, so that no window is copied.

  Args:
    x: ``[B, T, H, W, C]``.
    size: of a window, odd.
    strides: steps between windows, the first of which is centred on the first element.
    fill: value outside of ``x``.

  Yields:
    ``[B, ceil(T / stride), ceil(H / stride), ceil(W / stride), C]`` for each place in a window, in row-major order.
  """
  padded = jnp.pad(x, ((0, 0), *((n // 2, n // 2) for n in size), (0, 0)), constant_values=fill)
  for place in itertools.product(*map(range, size)):
    end = (start + length for start, length in zip(place, x.shape[1:4], strict=True))
    yield jax.lax.slice(padded, (0, *place, 0), (len(x), *end, x.shape[-1]), (1, *strides, 1))


def max_pool(x: Array, stride: int) -> Array:
  """Maximum over 3 x 3 windows of each frame of ``[B, T, H, W, C]``."""
  return functools.reduce(jnp.maximum, windows(x, (1, 3, 3), (1, stride, stride), -jnp.inf))


def table_lengths(grid: Grid, q_stride: int, kv_stride: int) -> Grid:
  """Rows of the tables of relative positions of a block that takes this grid: one for each distance along an axis."""
  t, h, w = grid
  h, w = (max(n // q_stride, n // kv_stride) for n in (h, w))
  return 2 * t - 1, 2 * h - 1, 2 * w - 1


@functools.cache
def relative_rows(length: int, queries: int, keys: int) -> np.ndarray:
  """Which rows of a table of relative positions hold for each query and key along an axis.

  Distances are in steps of the finer one of the two. A table for other distances is resized first.

  Args:
    length: rows of the table.
    queries: length of the axis of the queries.
    keys: length of the axis of the keys.

  Returns:
    ``[queries, keys, length]`` weights of the rows.
  """
  # In single precision and cut off as in the official code: with odd ratios of lengths, rounding chooses the row.
  q_step, k_step = np.float32(max(keys / queries, 1)), np.float32(max(queries / keys, 1))
  distance = np.arange(queries, dtype=np.float32)[:, None] * q_step - np.arange(keys, dtype=np.float32) * k_step
  row = (distance + np.float32((keys - 1) * max(queries / keys, 1))).astype(int)
  return linear_matrix(length, 2 * max(queries, keys) - 1)[row]


# --- Published weights ----------------------------------------------------------------------------------------------

# (our path, published name) as regular expressions, see vad_jax.convert. PySlowFast:
REFERENCE_NAMES = (
  (r"class_token", "cls_token"),
  (r"patch_embed\.(.*)", r"patch_embed.proj.\1"),
  (r"(blocks\.\d+\.attn)\.pool_([qkv])\.norm\.(.*)", r"\1.norm_\2.\3"),
  (r"(blocks\..*)", r"\1"),
  (r"(norm\..*)", r"\1"),
)
# torchvision, the same tensors:
TORCHVISION_NAMES = (
  (r"class_token", "pos_encoding.class_token"),
  (r"patch_embed\.(.*)", r"conv_proj.\1"),
  (r"(blocks\.\d+\.attn\.pool_[qkv])\.norm\.(.*)", r"\1.norm_act.0.\2"),
  (r"(blocks\.\d+\.attn\.pool_[qkv])\.(weight)", r"\1.pool.\2"),
  (r"(blocks\.\d+\.attn)\.proj\.(.*)", r"\1.project.0.\2"),
  (r"(blocks\.\d+)\.proj\.(.*)", r"\1.project.\2"),
  (r"(blocks\.\d+\.mlp)\.fc1\.(.*)", r"\1.0.\2"),
  (r"(blocks\.\d+\.mlp)\.fc2\.(.*)", r"\1.3.\2"),
  (r"(blocks\..*|norm\..*)", r"\1"),
)


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for published weights, from the shapes of their tensors in either layout."""
  starts = sorted(int(m[1]) for name in shapes if (m := re.fullmatch(r"blocks\.(\d+)\.proj(?:ect)?\.weight", name)))
  depth = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name)))
  width = shapes["blocks.0.norm1.weight"][0]
  tables = [shapes[f"blocks.0.attn.rel_pos_{axis}"] for axis in "thw"]
  return {
    "width": width,
    "depths": tuple(np.diff([0, *starts, depth]).tolist()),
    "heads": width // tables[0][1],
    "trained_size": tuple((rows + 1) // 2 * step for (rows, _), step in zip(tables, PatchEmbed.STRIDE, strict=True)),
  }


def resize_table(name: str, table: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
  """A table of relative positions for another size of video, as published code makes it; None if this is none."""
  if not name.startswith("rel_pos_") or table.shape[1:] != tuple(shape[1:]):
    return None
  return linear_matrix(len(table), shape[0]) @ table
