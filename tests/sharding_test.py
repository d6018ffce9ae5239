"""Meshes of 8 virtual devices and what lies where on them."""

import jax
import numpy as np
import pytest

from vad_jax import sharding


@pytest.mark.parametrize(
  "shape, expected",
  [
    ({"data": -1, "fsdp": 1}, (8, 1)),
    ({"fsdp": -1}, (1, 8)),
    ({"data": 4, "fsdp": -1}, (4, 2)),
    ({"data": 8}, (8, 1)),
  ],
)
def test_make_mesh(shape: dict[str, int], expected: tuple[int, int]) -> None:
  mesh = sharding.make_mesh(shape)
  assert mesh.axis_names == ("data", "fsdp")
  assert mesh.devices.shape == expected


@pytest.mark.parametrize(
  "shape, message",
  [
    ({"data": 3, "fsdp": -1}, "does not fit 8 devices"),
    ({"data": 4}, "does not fit 8 devices"),
    ({"data": 16, "fsdp": -1}, "does not fit 8 devices"),
    ({"data": -1, "fsdp": -1}, "at most one is -1"),
    ({"data": 0, "fsdp": -1}, "positive"),
    ({"model": 8}, "no axis 'model': choose from data, fsdp"),
  ],
)
def test_mesh_that_does_not_fit(shape: dict[str, int], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(shape)


def test_infer_sharding() -> None:
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  shapes = {"large": (256, 1024), "odd": (1026, 257), "small": (8, 8), "scalar": ()}
  tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
  specs = {name: tuple(s.spec) for name, s in sharding.infer_sharding(tree, mesh, "fsdp").items()}
  assert specs == {"large": (None, "fsdp"), "odd": (), "small": (), "scalar": ()}
  assert all(s.is_fully_replicated for s in sharding.infer_sharding(tree, mesh).values())
  with pytest.raises(ValueError, match="'fdsp': choose one of replicate, fsdp"):
    sharding.infer_sharding(tree, mesh, "fdsp")


def test_batch() -> None:
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  assert sharding.local_batch_size(24, mesh) == 24
  for size in (3, 12):
    with pytest.raises(ValueError, match=f"batch size {size} cannot be split over 8 devices: take 8"):
      sharding.local_batch_size(size, mesh)
  batch = sharding.to_global({"key": np.arange(16)}, mesh)
  assert [shard.data.tolist() for shard in batch["key"].addressable_shards] == [[2 * i, 2 * i + 1] for i in range(8)]
