"""Samples of several maps against a plain formula, against PyTorch, and their gradients against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_files, seeded
from vad_jax.ops.deformable import sample_levels

SHAPES = [(3, 5, 6), (2, 1, 3), (1, 1, 1)]


def plain(values, shapes, locations, weights):
  """The sum over all cells of all maps, each weighted by how near it is on every axis."""
  total, start = 0, 0
  for shape, location, weight in zip(shapes, locations, weights, strict=True):
    nearness = 1
    for axis, size in enumerate(shape):
      distance = jnp.abs(location[:, 2 - axis, ..., None] * size - 0.5 - jnp.arange(size))
      nearness = nearness * jnp.expand_dims(jnp.maximum(0, 1 - distance), [d - 3 for d in range(3) if d != axis])
    cells = values[:, :, start : start + np.prod(shape)].reshape(*values.shape[:2], *shape, -1)
    total += jnp.einsum("phbq,phbqtyx,bhtyxd->bhqd", weight, nearness, cells)
    start += np.prod(shape)
  return total


def inputs(dtype=np.float64, points=2, spread=0.4):
  rng = np.random.default_rng(0)
  values = rng.normal(size=(2, 4, sum(map(np.prod, SHAPES)), 5))
  locations = 0.5 + spread * rng.normal(size=(3, points, 3, 4, 2, 7))
  return [jnp.asarray(x, dtype) for x in (values, locations, rng.random((3, points, 4, 2, 7)))]


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_equals_the_plain_formula_and_so_do_gradients(monkeypatch, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  with jax.enable_x64(True):
    values, locations, weights = inputs()
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 7, 5)))
    ours, theirs = (
      jax.vjp(lambda *a, f=f: f(a[0], SHAPES, *a[1:]), values, locations, weights) for f in (sample_levels, plain)
    )
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-13)
    for name, a, b in zip(("values", "locations", "weights"), ours[1](cotangent), theirs[1](cotangent), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-12, err_msg=name)


def test_gradients_are_differences():
  with jax.enable_x64(True):
    arrays = inputs()

    def loss(*arrays):
      return (sample_levels(arrays[0], SHAPES, *arrays[1:]) ** 2).sum()

    rng, step = np.random.default_rng(2), 1e-6
    for index, gradient in enumerate(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)):
      direction = rng.normal(size=gradient.shape)
      before, after = (
        loss(*(x + move * direction if i == index else x for i, x in enumerate(arrays))) for move in (-step, step)
      )
      slope = (after - before) / (2 * step)
      np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, err_msg=str(index))


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_pytorch(monkeypatch, dtype, backend):
  """Places inside, on borders, half a cell outside and far outside."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  recorded = golden_files.load("class_query/msdeform3d")["op"]
  with jax.enable_x64(dtype == np.float64):
    values = jnp.asarray(seeded.seeded(**recorded["value"]), dtype).transpose(0, 2, 1, 3)
    locations = jnp.asarray(recorded["loc_full"], dtype).transpose(3, 4, 5, 2, 0, 1)
    weights = jax.nn.softmax(jnp.asarray(seeded.seeded(recorded["weight"]["key"], recorded["weight"]["shape"])))
    weights = weights.astype(dtype).reshape(2, 7, 4, 3, 3).transpose(3, 4, 2, 0, 1)
    out = sample_levels(values, recorded["shapes_thw"], locations, weights)
  assert out.dtype == dtype
  # The recorded weights are a softmax in float32, too.
  np.testing.assert_allclose(out.transpose(0, 2, 1, 3).reshape(2, 7, 16), recorded["output"], atol=5e-7)


def sample_line(places, values):
  """Samples of one map, a line of cells along x."""
  locations = jnp.stack([places, jnp.full_like(places, 0.5), jnp.full_like(places, 0.5)])[None, None, :, None, None]
  ones = jnp.ones((1, 1, 1, 1, len(places)))
  return sample_levels(values[None, None, :, None], [(1, 1, len(values))], locations, ones)[0, 0, :, 0]


def test_by_hand():
  places = jnp.array([0.125, 0.25, 0.5, 0.875, 0.0, -0.125, 1.0, 1.125, -50, 1e9, np.inf])
  found = sample_line(places, jnp.array([2.0, 4.0, 8.0, 16.0]))
  np.testing.assert_allclose(found, [2, 3, 6, 16, 1, 0, 8, 0, 0, 0, 0], atol=1e-6)


def test_on_a_cell_the_next_one_gives_the_slope():
  values = jnp.array([2.0, 4.0, 8.0, 16.0])
  slope = jax.grad(lambda places: sample_line(places, values).sum())(jnp.array([0.125, 0.375, 0.625, 0.875, -0.125]))
  np.testing.assert_allclose(slope, 4 * np.array([2, 4, 8, -16, 2]), rtol=1e-6)


def test_a_place_that_is_not_a_number_is_seen():
  found = sample_line(jnp.array([0.5, np.nan]), jnp.ones(4))
  assert np.isnan(found).tolist() == [False, True]


def test_values_in_half_precision():
  exact = inputs(np.float32)
  half = [exact[0].astype(jnp.bfloat16), *exact[1:]]
  gradients = []
  for values, locations, weights in (exact, half):
    out, backward = jax.vjp(lambda *a: sample_levels(a[0], SHAPES, *a[1:]), values, locations, weights)
    assert out.dtype == values.dtype
    gradients.append((out, *backward(jnp.ones_like(out))))
  assert [x.dtype for x in gradients[1][1:]] == [x.dtype for x in half]
  for a, b in zip(*gradients, strict=True):
    np.testing.assert_allclose(a, b.astype(np.float32), atol=0.02 * np.abs(a).max())


def test_nothing_of_the_number_of_samples_is_stored():
  shapes = [(4, 16, 16), (4, 8, 8)]
  cells, heads, points, queries, dim = 4 * 256 + 4 * 64, 4, 8, 1280, 16
  sizes = (1, heads, cells, dim), (2, points, 3, heads, 1, queries), (2, points, heads, 1, queries)
  arrays = [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]
  samples = 4 * 2 * points * heads * queries * 8 * dim  # bytes of all cells that are looked up
  forward = jax.jit(lambda v, l, w: sample_levels(v, shapes, l, w))
  backward = jax.jit(jax.grad(lambda v, l, w: sample_levels(v, shapes, l, w).sum(), (0, 1, 2)))
  for function, most in ((forward, 1 / 16), (backward, 1 / 4)):  # of 16 turns; the backward pass stores those of one
    memory = function.lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < most * samples


def test_a_tpu_looks_up_one_row_for_a_sample(monkeypatch):
  def look_ups(backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    text = str(jax.make_jaxpr(lambda v, l, w: sample_levels(v, SHAPES, l, w))(*inputs(np.float32)))
    return text.count("= gather[")

  assert (look_ups("tpu"), look_ups("cpu")) == (1, 8)


def test_maps_that_do_not_fit_are_refused():
  values, locations, weights = inputs(np.float32)
  for shapes in (SHAPES[:2], [*SHAPES[:2], (1, 1, 2)], [SHAPES[0]] * 3):
    with pytest.raises(ValueError, match="do not hold 97 cells on 3 levels"):
      sample_levels(values, shapes, locations, weights)
