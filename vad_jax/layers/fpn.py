"""Feature pyramid network."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from vad_jax.batch import Array

# Detectron2's "c2_xavier": uniform with variance 1 / fan_in.
_KERNEL_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")


def upsample(x: Array, factor: int) -> Array:
  """Nearest-neighbour enlargement of ``[B, H, W, C]``."""
  return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


class FeaturePyramid(nnx.Module):
  """FPN (Lin et al., CVPR 2017) over maps of one stride, as plain ViTs give them (parameter-free rescaling).

  Level ``l`` has a quarter, half, one and two times the stride of its input. A 1x1 convolution and nearest-neighbour
  scaling commute, so the lateral convolutions run before the enlargement.
  """

  RESCALE = (4, 2, 1, -2)  # enlargement of each level's input; negative: every second row and column

  def __init__(self, in_dim: int, dim: int, *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    self.lateral = nnx.List(
      [nnx.Conv(in_dim, dim, (1, 1), kernel_init=_KERNEL_INIT, dtype=dtype, rngs=rngs) for _ in self.RESCALE]
    )
    self.output = nnx.List(
      [nnx.Conv(dim, dim, (3, 3), kernel_init=_KERNEL_INIT, dtype=dtype, rngs=rngs) for _ in self.RESCALE]
    )

  def __call__(self, maps: Sequence[Array]) -> list[Array]:
    """Builds the pyramid.

    Args:
      maps: four maps ``[B, h, w, C]`` of one size with even sides, the one for the finest level first.

    Returns:
      ``[B, 4h, 4w, D], [B, 2h, 2w, D], [B, h, w, D], [B, h/2, w/2, D]``.
    """
    levels: list[Array] = []
    above = None
    for features, lateral, output, scale in reversed(
      list(zip(maps, self.lateral, self.output, self.RESCALE, strict=True))
    ):
      features = lateral(features if scale > 0 else features[:, ::-scale, ::-scale])
      features = upsample(features, scale) if scale > 1 else features
      above = features if above is None else features + upsample(above, 2)
      levels.insert(0, output(above))
    return levels
