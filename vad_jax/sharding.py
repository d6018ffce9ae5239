"""Where arrays live: one mesh for any number of devices, shardings inferred by size, batches spread out.

The mesh always has the axes ``("data", "fsdp")``. A batch is split over both; parameters and optimizer state
are replicated, or split over ``fsdp`` where they are large. Models know nothing of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
STRATEGIES = ("replicate", "fsdp")
MIN_FSDP_SIZE = 2**16  # elements; splitting smaller arrays costs more in latency than it saves in memory


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """Lays devices out on the axes ``("data", "fsdp")``.

  Args:
    shape: size of each axis; one of them may be -1 and takes what is left, an axis not named has size 1.
    devices: by default all devices of all processes.

  Raises:
    ValueError: an axis is unknown, or the sizes do not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if unknown := set(shape) - set(AXES):
    raise ValueError(f"mesh has no axis {sorted(unknown)[0]!r}: choose from {', '.join(AXES)}")
  sizes = [shape.get(axis, 1) for axis in AXES]
  if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
    raise ValueError(f"mesh {dict(shape)}: sizes are positive, and at most one is -1 (what is left)")
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(len(devices) // -int(np.prod(sizes)), 1)
  if np.prod(sizes) != len(devices):
    raise ValueError(f"mesh {dict(shape)} does not fit {len(devices)} devices: the product of its sizes must be that")
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def infer_sharding(tree: Any, mesh: Mesh, strategy: str = "replicate") -> Any:
  """Chooses a sharding for every leaf of a state, abstract or concrete.

  Args:
    tree: a pytree of arrays or ``jax.ShapeDtypeStruct``.
    mesh: what ``make_mesh`` returned.
    strategy: ``replicate`` puts a copy on every device; ``fsdp`` splits the largest divisible axis of each
      large leaf.

  Raises:
    ValueError: the strategy is unknown.
  """
  if strategy not in STRATEGIES:
    raise ValueError(f"unknown sharding {strategy!r}: choose one of {', '.join(STRATEGIES)}")
  parts = mesh.shape["fsdp"]

  def choose(leaf: Any) -> NamedSharding:
    divisible = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
    if strategy == "replicate" or parts == 1 or leaf.size < MIN_FSDP_SIZE or not divisible:
      return NamedSharding(mesh, P())
    largest = max(divisible, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, P(*(None,) * largest, "fsdp"))

  return jax.tree.map(choose, tree)


def local_batch_size(batch_size: int, mesh: Mesh) -> int:
  """Examples that this process has to load for a global batch.

  Raises:
    ValueError: the batch cannot be split evenly over the devices.
  """
  if batch_size % mesh.size:
    raise ValueError(
      f"batch size {batch_size} cannot be split over {mesh.size} devices: "
      f"take {max(batch_size // mesh.size, 1) * mesh.size}, or another multiple of {mesh.size}"
    )
  return batch_size // jax.process_count()


def to_global(batch: Any, mesh: Mesh) -> Any:
  """Puts this process's rows of a batch on its devices, as its part of arrays split over all devices."""
  sharding = NamedSharding(mesh, P(AXES))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
