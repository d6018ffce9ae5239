"""Stochastic depth."""

import jax.numpy as jnp
from flax import nnx

from vad_jax.batch import Array


class DropPath(nnx.Module):
  """Drops a residual branch of whole examples with probability ``rate`` (Huang et al., ECCV 2016)."""

  def __init__(self, rate: float):
    self.rate = rate
    self.deterministic = False

  def set_view(self, deterministic: bool | None = None, **_: object) -> None:
    """Switches the layer for ``nnx.view``.

    Args:
      deterministic: keep every path.
    """
    if deterministic is not None:
      self.deterministic = deterministic

  def __call__(self, x: Array, rngs: nnx.Rngs | None) -> Array:
    """Returns ``x`` of any shape ``[B, ...]`` with the rows of dropped examples set to zero, the others scaled up."""
    if self.deterministic or not self.rate:
      return x
    if rngs is None:
      raise ValueError("training with drop path needs rngs; for inference take nnx.view(model, deterministic=True)")
    keep = rngs.dropout.bernoulli(1 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - self.rate), 0)
