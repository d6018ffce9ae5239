"""Bipartite matching of predictions to annotated actors.

A loss never sees an assignment, only a mask ``[..., N, M]`` of static shape that says which prediction belongs to which
actor. Two solvers make that mask at the same total cost: ``device`` stays on the accelerator and keeps its sharding,
``scipy`` runs on the host that owns each shard.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from vad_jax.batch import Array

Method = Literal["device", "scipy"]


def match(costs: Array, valid: Array, method: Method = "device") -> Array:
  """Assigns every valid actor to one prediction of its image, or as many as there are, at the least total cost.

  NaN and infinite costs count as worse than any finite one; images without actors give an empty mask. No gradient
  flows.

  Args:
    costs: ``[..., B, N, M]``, of tubes ``[..., B, T, N, M]``.
    valid: ``[B, M]`` bool, of tubes ``[B, T, M]``, False for padded actors.
    method: solver.

  Returns:
    Bool mask of the shape of ``costs``; each row and each column holds at most one True.
  """
  costs = jax.lax.stop_gradient(costs).astype(jnp.float32)
  num_predictions, num_actors = costs.shape[-2:]
  if num_actors == 0 or num_predictions == 0:
    return jnp.zeros(costs.shape, bool)
  columns = jnp.broadcast_to(valid[..., None, :], costs.shape)
  if method not in _SOLVERS:
    raise ValueError(f"unknown matcher {method!r}: choose {' or '.join(_SOLVERS)}")
  return _on_every_shard(_SOLVERS[method], _prepare(costs, columns), costs.ndim - valid.ndim - 1) & columns


def _prepare(costs: Array, columns: Array) -> Array:
  """Makes costs finite and padded columns constant, so that they leave the assignment of the others alone."""
  finite = jnp.isfinite(costs) & columns
  low = jnp.where(finite, costs, jnp.inf).min((-2, -1), keepdims=True)
  high = jnp.where(finite, costs, -jnp.inf).max((-2, -1), keepdims=True)
  low, high = jnp.where(low <= high, low, 0), jnp.where(low <= high, high, 0)
  spread = high - low + 1
  # Shifting a whole image changes no assignment, and small numbers keep float32 exact enough.
  costs = jnp.where(finite, costs - low, spread * (min(costs.shape[-2:]) + 1))
  if costs.shape[-2] >= costs.shape[-1]:
    return jnp.where(columns, costs, 0)
  # Fewer predictions than slots: a padded actor must never win a prediction that a real one could have.
  return jnp.where(columns, costs, spread * (min(costs.shape[-2:]) + 2) ** 2)


def _on_every_shard(solve: Callable[[Array], Array], costs: Array, batch_axis: int) -> Array:
  """Solves the images where they are: nothing is gathered, within a host or across hosts."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
  if not axes or mesh.size == 1:
    return solve(costs)
  spec = jax.sharding.PartitionSpec(*([None] * batch_axis), axes)
  return jax.shard_map(solve, in_specs=spec, out_specs=spec, check_vma=False)(costs)


def _solve_on_device(costs: Array) -> Array:
  def solve(cost: Array) -> Array:
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(cost.shape, bool).at[rows, columns].set(True)

  return jax.vmap(solve)(costs.reshape(-1, *costs.shape[-2:])).reshape(costs.shape)


def _solve_on_host(costs: Array) -> Array:
  result = jax.ShapeDtypeStruct(costs.shape, np.bool_)
  return jax.pure_callback(_scipy_masks, result, costs, vmap_method="expand_dims")


def _scipy_masks(costs: np.ndarray) -> np.ndarray:
  """Solves ``[..., N, M]`` finite problems; runs on the host and must not call JAX."""
  costs = np.asarray(costs)
  masks = np.zeros(costs.shape, np.bool_)
  for index in np.ndindex(costs.shape[:-2]):
    masks[index][linear_sum_assignment(costs[index])] = True
  return masks


_SOLVERS: dict[str, Callable[[Array], Array]] = {"device": _solve_on_device, "scipy": _solve_on_host}
