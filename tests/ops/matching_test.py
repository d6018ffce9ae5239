"""Both matchers reach the least cost, on ordinary and on nasty input, sharded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from vad_jax.ops.matching import match

METHODS = ("device", "scipy")


def problems(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Costs ``[L, B, N, M]`` and valid actors ``[B, M]``."""
  shape = {"fewer predictions": (2, 3, 4, 7), "square": (2, 3, 6, 6)}.get(kind, (2, 3, 12, 5))
  costs = rng.normal(size=shape).astype(np.float32)
  if kind == "ties":
    costs = np.round(costs)
  if kind == "large":
    costs *= 1e6
  valid = rng.random((shape[1], shape[3])) < 0.7
  valid[0] = kind == "all valid"
  return costs, valid


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["random", "ties", "large", "square", "fewer predictions", "all valid"])
def test_cost_is_the_least(method, kind):
  rng = np.random.default_rng(0)
  for _ in range(5):
    costs, valid = problems(kind, rng)
    masks = np.asarray(match(jnp.asarray(costs), jnp.asarray(valid), method))
    assert masks.dtype == bool and masks.shape == costs.shape
    for layer in range(costs.shape[0]):
      for image in range(costs.shape[1]):
        mask, cost = masks[layer, image], costs[layer, image]
        columns = np.flatnonzero(valid[image])
        assert mask.sum(0).max() <= 1 and mask.sum(1).max() <= 1
        assert not mask[:, ~valid[image]].any()
        assert mask.sum() == min(cost.shape[0], len(columns))
        rows, best = linear_sum_assignment(cost[:, columns])
        np.testing.assert_allclose(cost[mask].sum(), cost[:, columns][rows, best].sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_not_finite_costs_are_worse_than_any_other(method):
  costs = np.random.default_rng(1).normal(size=(1, 6, 3)).astype(np.float32)
  costs[0, 2] = np.nan
  costs[0, :, 1] = np.inf
  costs[0, 4, 1] = 50.0
  costs[0, 0, 0] = -np.inf
  mask = np.asarray(match(jnp.asarray(costs), jnp.ones((1, 3), bool), method))[0]
  assert mask.sum() == 3 and mask[4, 1] and not mask[2].any() and not mask[0, 0]
  every = match(jnp.full((1, 4, 2), jnp.nan), jnp.ones((1, 2), bool), method)
  assert every.sum() == 2


@pytest.mark.parametrize("method", METHODS)
def test_images_without_actors(method):
  assert not match(jnp.ones((2, 4, 3)), jnp.zeros((2, 3), bool), method).any()
  assert match(jnp.ones((2, 4, 0)), jnp.zeros((2, 0), bool), method).shape == (2, 4, 0)


@pytest.mark.parametrize("frames", [(), (3,)], ids=["keyframes", "tubes"])
@pytest.mark.parametrize("method", METHODS)
def test_sharded_like_one_device(method, frames):
  mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  rng = np.random.default_rng(2)
  costs, valid = rng.normal(size=(3, 8, *frames, 10, 4)).astype(np.float32), rng.random((8, *frames, 4)) < 0.7
  expected = np.asarray(match(jnp.asarray(costs), jnp.asarray(valid), method))
  spec = PartitionSpec(None, ("data", "fsdp"))
  with jax.set_mesh(mesh):
    sharded = jax.device_put(costs, NamedSharding(mesh, spec))
    compiled = jax.jit(lambda c, v: match(c, v, method)).lower(
      sharded, jax.device_put(valid, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    )
    found = compiled.compile()(sharded, jax.device_put(valid, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))))
  np.testing.assert_array_equal(found, expected)
  assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), costs.ndim)
  assert "all-gather" not in compiled.compile().as_text()


def test_unknown_method_is_named():
  with pytest.raises(ValueError, match="'hungarian': choose device or scipy"):
    match(jnp.ones((1, 2, 2)), jnp.ones((1, 2), bool), "hungarian")  # type: ignore[arg-type]
