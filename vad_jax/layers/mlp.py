"""The feed-forward part of a transformer."""

import jax
import jax.numpy as jnp
from flax import nnx

from vad_jax.batch import Array


class Mlp(nnx.Module):
  """Linear, exact (erf) GELU, Linear."""

  def __init__(self, dim: int, hidden: int, *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    self.fc1 = nnx.Linear(dim, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = nnx.Linear(hidden, dim, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """``[..., C]`` to ``[..., C]``."""
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
