"""Random streams that cost no time to trace (leaf)."""

from typing import Any

import jax
from flax import nnx


def make_rngs(*default: Any, **streams: Any) -> nnx.Rngs:
  """`nnx.Rngs` with the same numbers, quick to trace.

  Flax asks of a traced count, at each draw, whether it has a sharding. JAX answers no with an error that tells where
  the count comes from, and looks through all that was traced so far to find out: most of the time that it takes to
  build a large model without its numbers.

  Args:
    *default: seed or key of the default stream.
    **streams: the same of streams by name.
  """
  rngs = nnx.Rngs(*default, **streams)
  for name, stream in list(vars(rngs).items()):
    if isinstance(stream, nnx.RngStream):
      setattr(rngs, name, _Stream(stream.key[...], tag=stream.tag))
  return rngs


class _Stream(nnx.RngStream):
  def __call__(self) -> jax.Array:
    key = jax.random.fold_in(self.key[...], self.count[...])
    self.count.set_value(self.count[...] + 1)  # as a whole: a part is what Flax compares shardings for
    return key
