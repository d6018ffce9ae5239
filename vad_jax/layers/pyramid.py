"""Necks that make four maps of one width from what a video backbone gives.

Both are those of the class-query detector (Lee et al., "Classification Matters", ECCV 2024, official code).
"""

import itertools
from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers.conv3d import Conv3D, max_pool

_SCALES = (4, 2, 1, 0.5)  # of the sides of a level's map, against those of the tokens


class TokenPyramid(nnx.Module):
  """Tokens of a plain ViT at four scales in space (Li et al., "Exploring Plain Vision Transformer Backbones", 2022)."""

  def __init__(self, channels: int, dim: int, *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    self.levels = nnx.List([PyramidLevel(channels, dim, scale, dtype=dtype, rngs=rngs) for scale in _SCALES])

  def __call__(self, tokens: Array) -> list[Array]:
    """``[B, t, h, w, C]`` to maps ``[B, t, h', w', D]`` of sides 4h, 2h, h and h/2."""
    return [level(tokens) for level in self.levels]


class PyramidLevel(nnx.Module):
  """Enlarges or halves tokens, then mixes channels, then neighbours in space and time."""

  def __init__(self, channels: int, dim: int, scale: float, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    doublings = {4: 2, 2: 1, 1: 0, 0.5: 0}[scale]
    widths = [channels // 2**step for step in range(doublings + 1)]
    self.halved, channels = scale < 1, widths[-1]
    self.enlarge = nnx.List([Doubling(*pair, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(widths)])
    self.enlarged_norm = nnx.LayerNorm(widths[1], epsilon=1e-6, dtype=dtype, rngs=rngs) if doublings > 1 else None
    self.lateral = nnx.Linear(channels, dim, use_bias=False, dtype=dtype, rngs=rngs)
    self.norm = nnx.LayerNorm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.output = Conv3D(dim, dim, (3, 3, 3), dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """``[B, t, h, w, C]`` to ``[B, t, h', w', D]``."""
    for step, double in enumerate(self.enlarge):
      if step and self.enlarged_norm is not None:
        x = jax.nn.gelu(self.enlarged_norm(x), approximate=False)
      x = double(x)
    if self.halved:
      x = max_pool(x, (1, 2, 2), (1, 2, 2), [(0, 0)] * 3)
    return self.output(self.norm(self.lateral(x)))


class Doubling(nnx.Module):
  """Transposed convolution whose stride is its window of 2 x 2 cells: each cell becomes four."""

  def __init__(self, channels: int, features: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    init = nnx.initializers.variance_scaling(
      1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2, batch_axis=(0, 1)
    )
    self.kernel = nnx.Param(init(rngs.params(), (2, 2, features, channels)))
    self.bias = nnx.Param(jnp.zeros(features))
    self.dtype = dtype

  def __call__(self, x: Array) -> Array:
    """``[B, t, h, w, C]`` to ``[B, t, 2h, 2w, features]``."""
    kernel, bias = self.kernel[...], self.bias[...]
    dtype = self.dtype or jnp.result_type(x, kernel)
    x = jnp.einsum("bthwc,yxfc->bthywxf", x.astype(dtype), kernel.astype(dtype)) + bias.astype(dtype)
    return einops.rearrange(x, "b t h y w x f -> b t (h y) (w x) f")


class MapPyramid(nnx.Module):
  """The last three maps of a convolutional network, and one of half the last one's sides."""

  def __init__(self, channels: Sequence[int], dim: int, *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    self.lateral = nnx.List([nnx.Linear(width, dim, dtype=dtype, rngs=rngs) for width in channels])
    around = [(1, 1)] * 3
    self.halve = Conv3D(
      channels[-1], dim, (3, 3, 3), stride=(1, 2, 2), padding=around, use_bias=True, dtype=dtype, rngs=rngs
    )
    groups = min(32, dim // 2)
    self.norms = nnx.List(
      [nnx.GroupNorm(dim, num_groups=groups, epsilon=1e-5, dtype=dtype, rngs=rngs) for _ in range(len(channels) + 1)]
    )

  def __call__(self, maps: Sequence[Array]) -> list[Array]:
    """Maps ``[B, t, h, w, C]`` to as many and one more, ``[B, t, h, w, D]``."""
    levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)] + [self.halve(maps[-1])]
    return [norm(x) for norm, x in zip(self.norms, levels, strict=True)]
