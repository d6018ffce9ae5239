"""Random streams: the numbers are Flax's, and tracing them takes no time."""

import jax
import numpy as np
import pytest
from flax import nnx

from vad_jax.rngs import make_rngs


@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_are_those_of_flax(compiled):
  def draw(make):
    rngs = make(3, dropout=4)
    return [rngs.params(), rngs.params(), rngs.dropout(), rngs.other(), rngs.params(), rngs.dropout()]

  found, expected = (
    jax.jit(draw, static_argnums=0)(make) if compiled else draw(make) for make in (make_rngs, nnx.Rngs)
  )
  for key, wanted in zip(found, expected, strict=True):
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(wanted))


def test_numbers_go_on_through_recomputed_parts():
  def drop_twice(make, x):
    rngs = make(dropout=4)
    dropout = nnx.Dropout(0.5)
    recomputed = nnx.remat(lambda dropout, x, rngs: dropout(x, rngs=rngs))
    return recomputed(dropout, recomputed(dropout, dropout(x, rngs=rngs), rngs), rngs)

  x = np.ones((64, 64), np.float32)
  found, expected = (jax.jit(lambda x, make=make: drop_twice(make, x))(x) for make in (make_rngs, nnx.Rngs))
  assert 0 < np.count_nonzero(expected) < 1024
  np.testing.assert_array_equal(found, expected)


def test_nobody_asks_tracers_for_their_sharding(monkeypatch):
  """The answer takes JAX a look at all that was traced before."""
  asked = []
  monkeypatch.setattr(jax.core.Tracer, "sharding", property(lambda self: asked.append(self)))
  jax.eval_shape(lambda: [nnx.Rngs(0).params() for _ in range(3)])
  assert asked  # as long as Flax does so, we do it in our way
  asked.clear()
  nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=make_rngs(0)))
  assert not asked
