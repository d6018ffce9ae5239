"""Hiera for video (Ryali et al., ICML 2023): a hierarchical transformer of plain parts.

``[B, T, H, W, 3]`` becomes tokens ``[B, T/2, H/4, W/4, C]``; each stage but the first halves height and width by a
maximum and doubles the width and the heads. The first two stages attend inside mask units (windows of a frame that
begin as 8 x 8 tokens and shrink with the grid), the others among all tokens. There is no class token.

Parameters are those of the official code, which keeps tokens in an order that makes mask units strided and pooling a
maximum over leading parts; here they stay in the video's order, and the results are the same. The first block of a
stage still attends as the stage before, as there.

The official tables of positions have the size of training. For other sizes of video, which are our addition, the one
for space is resized bicubically and the one for time linearly.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.backbones.mvit import NORMAL, PatchEmbed
from vad_jax.batch import Array
from vad_jax.layers.attention import attend
from vad_jax.layers.drop_path import DropPath
from vad_jax.layers.mlp import Mlp
from vad_jax.layers.position import bicubic_matrix, linear_matrix

MASK_UNIT = 8  # tokens a side before the first pooling
MASK_UNIT_STAGES = 2  # that attend inside mask units

VARIANTS: dict[str, dict[str, Any]] = {
  "tiny": {"width": 96, "depths": (1, 2, 7, 2), "heads": 1},
  "base": {"width": 96, "depths": (2, 3, 16, 3), "heads": 1},
  "base_plus": {"width": 112, "depths": (2, 3, 16, 3), "heads": 2},
  "large": {"width": 144, "depths": (2, 6, 36, 4), "heads": 2},
  "huge": {"width": 256, "depths": (2, 6, 36, 4), "heads": 4},
}


class Hiera(nnx.Module):
  """Patch embedding, positions, blocks and a final norm.

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
      trained_size: frames, height and width of the video that the tables of positions are for.
      last_pool: False keeps the last stage at the resolution of the one before; parameters stay the same.
      drop_path: rate of the last block; it grows linearly from 0.
      remat: recompute blocks in the backward pass instead of storing their activations.
      dtype: computation type; None follows the parameters.
      rngs: source of the initial parameters.
    """
    self.remat = remat
    self.patch_embed = PatchEmbed(width, dtype=dtype, rngs=rngs)
    self.trained_grid = t, h, w = self.patch_embed.grid(trained_size)
    self.pos_embed_spatial = nnx.Param(NORMAL(rngs.params(), (h * w, width)))
    self.pos_embed_temporal = nnx.Param(NORMAL(rngs.params(), (t, width)))
    rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
    last = len(depths) - 1
    self.blocks = nnx.List([])
    for stage, index in ((stage, index) for stage, depth in enumerate(depths) for index in range(depth)):
      first = stage > 0 and index == 0
      attends_as = stage - first
      growth = 2 if first else 1
      self.blocks.append(
        Block(
          width,
          growth * width,
          growth * heads,
          pool=first and (last_pool or stage < last),
          window=MASK_UNIT >> attends_as if attends_as < MASK_UNIT_STAGES else None,
          drop_path=next(rates),
          dtype=dtype,
          rngs=rngs,
        )
      )
      width, heads = growth * width, growth * heads
    self.width = width
    self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)

  def positions(self, grid: Sequence[int]) -> Array:
    """Positions ``[t, h, w, C]`` of a grid."""
    times, rows, columns = self.trained_grid
    t, h, w = grid
    space = self.pos_embed_spatial[...].reshape(rows, columns, -1)
    time = self.pos_embed_temporal[...]
    if (h, w) != (rows, columns):
      space = jnp.einsum("yh,xw,hwc->yxc", bicubic_matrix(rows, h), bicubic_matrix(columns, w), space)
    if t != times:
      time = linear_matrix(times, t) @ time
    return time[:, None, None] + space

  def layers(self, video: Array, rngs: nnx.Rngs | None = None) -> Iterator[Array]:
    """Tokens ``[B, t, h, w, C]``: those that enter the blocks, then those of each block.

    Raises:
      ValueError: height or width of the video are not whole mask units.
    """
    side = MASK_UNIT * self.patch_embed.STRIDE[1]
    if video.shape[2] % side or video.shape[3] % side:
      raise ValueError(f"video {video.shape[1:4]}: its height and width must be multiples of {side}")
    x = self.patch_embed(video)
    x = x + self.positions(x.shape[1:4]).astype(x.dtype)
    yield x
    run = nnx.remat(Block.__call__) if self.remat else Block.__call__
    for block in self.blocks:
      x = run(block, x, rngs)
      yield x

  def __call__(self, video: Array, rngs: nnx.Rngs | None = None) -> Array:
    """Normalised video ``[B, T, H, W, 3]`` to normed tokens of the last stage ``[B, t, h, w, C]``."""
    *_, x = self.layers(video, rngs)
    return self.norm(x)


class Block(nnx.Module):
  """Pre-norm block: attention, then MLP; the width changes in the attention, and there the grid is pooled."""

  def __init__(
    self,
    dim: int,
    width: int,
    heads: int,
    *,
    pool: bool,
    window: int | None,
    drop_path: float,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    """Builds the block.

    Args:
      dim: channels that come in.
      width: channels that go out.
      heads: attention heads.
      pool: halve height and width.
      window: side in tokens of the windows that attention stays in; None for attention among all tokens.
      drop_path: rate.
      dtype: computation type; None follows the parameters.
      rngs: source of the initial parameters.
    """
    self.pool = pool
    self.norm1 = nnx.LayerNorm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.attn = WindowAttention(dim, width, heads, pool=pool, window=window, dtype=dtype, rngs=rngs)
    self.proj = nnx.Linear(dim, width, dtype=dtype, rngs=rngs) if width != dim else None
    self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.mlp = Mlp(width, 4 * width, dtype=dtype, rngs=rngs)
    self.drop_path = DropPath(drop_path)

  def __call__(self, x: Array, rngs: nnx.Rngs | None = None) -> Array:
    """``[B, t, h, w, C]`` to the same, or half of height and width."""
    normed = self.norm1(x)
    skip = x if self.proj is None else self.proj(normed)
    skip = max_pool(skip) if self.pool else skip
    x = skip + self.drop_path(self.attn(normed), rngs)
    return x + self.drop_path(self.mlp(self.norm2(x)), rngs)


class WindowAttention(nnx.Module):
  """Multi-head attention inside windows of each frame or among all tokens, whose queries may be pooled."""

  def __init__(
    self,
    dim: int,
    width: int,
    heads: int,
    *,
    pool: bool,
    window: int | None,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    self.heads, self.pool, self.window = heads, pool, window
    self.qkv = nnx.Linear(dim, 3 * width, dtype=dtype, rngs=rngs)
    self.proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """``[B, t, h, w, C]`` to the same, or half of height and width."""
    _, t, h, w, _ = x.shape
    sides = {"t": 1, "h": self.window, "w": self.window} if self.window else {"t": t, "h": h, "w": w}
    windows = "b (n t) (i h) (j w) (part heads d) -> part (b n i j) t h w heads d"
    query, key, value = einops.rearrange(self.qkv(x), windows, part=3, heads=self.heads, **sides)
    if self.pool:
      query, h, w = max_pool(query), h // 2, w // 2
    sides |= dict(zip("thw", query.shape[1:4], strict=True))
    out = attend(*(einops.rearrange(part, "n t h w heads d -> n (t h w) heads d") for part in (query, key, value)))
    grid = "(b n i j) (t h w) heads d -> b (n t) (i h) (j w) (heads d)"
    out = einops.rearrange(out, grid, n=t // sides["t"], i=h // sides["h"], j=w // sides["w"], **sides)
    return self.proj(out)


def max_pool(x: Array) -> Array:
  """Maximum over 2 x 2 places of ``[B, t, h, w, ...]``."""
  return einops.reduce(x, "b t (h i) (w j) ... -> b t h w ...", "max", i=2, j=2)


# --- Published weights ----------------------------------------------------------------------------------------------

# (our path, published name) as regular expressions, see vad_jax.convert.
REFERENCE_NAMES = (
  (r"patch_embed\.(.*)", r"patch_embed.proj.\1"),
  (r"((?:pos_embed_|blocks\.|norm\.).*)", r"\1"),
)
# The same before fine-tuning.
PRETRAINED_NAMES = ((r"norm\.(.*)", r"encoder_norm.\1"), *REFERENCE_NAMES)


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for published weights, from the shapes of their tensors.

  Raises:
    ValueError: shapes do not tell the number of heads, and no published network has this width.
  """
  width = shapes["patch_embed.proj.weight"][0]
  heads = {variant["width"]: variant["heads"] for variant in VARIANTS.values()}
  if width not in heads:
    raise ValueError(f"no published Hiera has {width} channels, only {sorted(heads)}: the number of heads is unknown")
  starts = sorted(int(m[1]) for name in shapes if (m := re.fullmatch(r"blocks\.(\d+)\.proj\.weight", name)))
  depth = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name)))
  times, places = (shapes[f"pos_embed_{axis}"][-2] for axis in ("temporal", "spatial"))
  side = 4 * round(places**0.5)
  return {
    "width": width,
    "depths": tuple(np.diff([0, *starts, depth]).tolist()),
    "heads": heads[width],
    "trained_size": (2 * times, side, side),
  }


def resize_table(name: str, table: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
  """A table of positions for another size of video, where frames are square; None if this is none."""
  table = table.reshape(-1, table.shape[-1])
  length, width = shape if len(shape) == 2 else (0, 0)
  if table.shape[1] != width:
    return None
  if name == "pos_embed_temporal":
    return linear_matrix(len(table), length) @ table
  old, new = math.isqrt(len(table)), math.isqrt(length)
  if name != "pos_embed_spatial" or (old**2, new**2) != (len(table), length):
    return None
  resize = bicubic_matrix(old, new)
  return np.einsum("yh,xw,hwc->yxc", resize, resize, table.reshape(old, old, -1)).reshape(shape)
