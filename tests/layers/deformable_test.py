"""Deformable attention and its encoder against the official implementation, and what must not change a result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden_files, seeded
from vad_jax.layers import deformable
from vad_jax.layers.deformable import DeformableAttention, Encoder, initial_offsets, reference_points
from vad_jax.sharding import make_mesh

SHAPES = [(4, 4, 6), (4, 2, 3), (2, 1, 2)]
DIM = 16


def set_parameters(module: nnx.Module, dtype=np.float32, gains=()):
  """Seeded values in the official names, which are ours but for kernels."""
  for path, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
    *names, last = map(str, path)
    transposed = parameter[...].shape[::-1]
    name = ".".join([*names, {"kernel": "weight", "scale": "weight"}.get(last, last)])
    value = seeded.fill(name, list(transposed)).T * dict(gains).get(name, 1)
    parameter.set_value(jnp.asarray(value, dtype))


def make_encoder(**options):
  encoder = Encoder(DIM, 4, 32, 2, levels=3, points=2, rngs=nnx.Rngs(0), **options)
  set_parameters(encoder)
  return encoder


def make_inputs(batch=2, visible=None):
  rng = np.random.default_rng(0)
  maps, positions = ([jnp.asarray(rng.normal(size=(batch, *s, DIM)), jnp.float32) for s in SHAPES] for _ in range(2))
  masks = [np.zeros((batch, h, w), bool) for _, h, w in SHAPES]
  for mask, (h, w) in zip(masks, visible or [shape[1:] for shape in SHAPES], strict=True):
    mask[:, :h, :w] = True
  return maps, positions, [jnp.asarray(mask) for mask in masks]


def compiled(encoder, **options):
  """The encoder without dropout as a compiled function of its inputs."""
  graph, state = nnx.split(nnx.view(encoder, deterministic=True))
  return functools.partial(jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs, **options)), state)


def assert_close(found, expected, atol=2e-5):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_official_module(dtype):
  recorded = golden_files.load("class_query/msdeform3d")["module"]
  shapes = recorded["shapes_thw"]
  with jax.enable_x64(dtype == np.float64):
    layer = DeformableAttention(
      recorded["d_model"], recorded["heads"], levels=len(shapes), points=recorded["points"], rngs=nnx.Rngs(0)
    )
    set_parameters(layer, dtype, [("sampling_offsets.weight", 2)])
    query, tokens = (jnp.asarray(seeded.seeded(**recorded[name]), dtype) for name in ("query", "input"))
    references = reference_points(shapes, [jnp.ones((2, h, w), bool) for _, h, w in shapes])
    golden_files.assert_tap(references, recorded["reference_points_xyt"], 1e-6, "references")
    every_fifth = np.broadcast_to(np.arange(tokens.shape[1]) % 5 == 0, tokens.shape[:2])
    for name, mask in (("output", every_fifth < 1), ("output_with_every_5th_value_masked", ~every_fifth)):
      mask = np.ones_like(mask) if name == "output" else mask
      out = layer(query, layer.values(tokens, jnp.asarray(mask)), references, shapes)
      assert out.dtype == dtype
      golden_files.assert_tap(out, recorded[name], 2e-5, name)


def test_heads_start_in_the_official_directions():
  recorded = golden_files.load("class_query/msdeform3d")["initial_offset_bias"]
  np.testing.assert_allclose(initial_offsets(8, 8), recorded["value"], atol=1e-6)
  layer = DeformableAttention(64, 8, levels=4, points=8, rngs=nnx.Rngs(0))
  bias = layer.sampling_offsets.bias[...].reshape(8, 4, 8, 3)
  np.testing.assert_allclose(bias, np.broadcast_to(initial_offsets(8, 8)[:, None], bias.shape), atol=1e-6)
  assert not layer.sampling_offsets.kernel[...].any() and not layer.attention_weights.kernel[...].any()


@pytest.mark.parametrize("normalizer", ["official", "paper"])
def test_unit_of_offsets(normalizer):
  """What is seen one unit further on each axis, in a map that holds where its cells are."""
  shape = t, h, w = 8, 12, 20
  layer = DeformableAttention(3, 1, levels=1, points=1, normalizer=normalizer, rngs=nnx.Rngs(0))
  for linear in (layer.value_proj, layer.output_proj):
    linear.kernel.set_value(jnp.eye(3))
  layer.sampling_offsets.bias.set_value(jnp.ones(3))
  cells = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(1, -1, 3).astype(np.float32)
  values = layer.values(jnp.asarray(cells), jnp.ones(cells.shape[:2], bool))
  references = reference_points([shape], [jnp.ones((1, h, w), bool)])
  query = 3 * h * w + 5 * w + 6
  out = layer(jnp.zeros((1, 1, 3)), values, references[:, [query]], [shape])
  step = (t / h, h / w, w / t) if normalizer == "official" else (1, 1, 1)
  np.testing.assert_allclose(out[0, 0], np.array([3, 5, 6]) + step, rtol=1e-5)


def test_references_are_those_of_what_is_visible():
  mask = np.zeros((2, 4, 6), bool)
  mask[0, :3, :4], mask[1] = True, True
  half = np.zeros((2, 2, 3), bool)
  half[0, :2, :2], half[1] = True, True
  references = reference_points([(2, 4, 6), (1, 2, 3)], [jnp.asarray(mask), jnp.asarray(half)])
  assert references.shape == (2, 48 + 6, 2, 3) and references.dtype == jnp.float32
  cell = 24 + 6 + 2  # second frame, second row, third column
  np.testing.assert_allclose(references[0, cell], [[2.5 / 6, 1.5 / 4, 0.75], [2.5 / 4 * 2 / 3, 1.5 / 3, 0.75]])
  np.testing.assert_allclose(references[1, cell], [[2.5 / 6, 1.5 / 4, 0.75]] * 2)
  assert np.isfinite(reference_points([(1, 2, 2)], [jnp.zeros((1, 2, 2), bool)])).all()


def test_padding_changes_nothing():
  encoder = compiled(make_encoder())
  maps, positions, masks = make_inputs(visible=[(4, 4), (2, 2), (1, 1)])
  noise = [jnp.where(mask[:, None, ..., None], x, 1e3) for x, mask in zip(maps, masks, strict=True)]
  visible = [jnp.broadcast_to(mask[:, None, ..., None], x.shape) for x, mask in zip(maps, masks, strict=True)]
  seen = [np.asarray(x)[m] for x, m in zip(encoder(maps, positions, masks), visible, strict=True)]
  assert_close([np.asarray(x)[m] for x, m in zip(encoder(noise, positions, masks), visible, strict=True)], seen)
  other = [x.at[1].multiply(-3) for x in maps]
  alone = encoder(other, positions, masks)
  assert_close([x[:1] for x in alone], [x[:1] for x in encoder(maps, positions, masks)])


def test_some_frames_are_those_of_all():
  inputs, frames = make_inputs(), ((1, 3), (0,), (1,))
  everything, some = (compiled(make_encoder(), frames=wanted)(*inputs) for wanted in (None, frames))
  assert_close(some, [x[:, list(i)] for x, i in zip(everything, frames, strict=True)])


def value_and_gradient(encoder):
  """A compiled function of the inputs; gradients reach parameters and maps."""
  run = compiled(encoder)

  def loss(state, *inputs):
    return sum((x**2).mean() for x in run.func(state, *inputs))

  return functools.partial(jax.jit(jax.value_and_grad(loss, (0, 1))), *run.args)


@pytest.mark.parametrize("remat", [False, True])
def test_turns_and_recomputing_change_nothing(monkeypatch, remat):
  inputs = make_inputs()
  expected = value_and_gradient(make_encoder())(*inputs)
  monkeypatch.setattr(deformable, "_ON_CPU", 50)  # five turns, of which the last is not full
  found = value_and_gradient(make_encoder(remat=remat))(*inputs)
  assert_close(found, expected)
  for name, gradient in nnx.to_flat_state(expected[1][0]):
    assert np.abs(gradient[...]).max() > 0, name


def test_dropout_differs_between_calls_and_turns(monkeypatch):
  monkeypatch.setattr(deformable, "_ON_CPU", 48)  # turns of less than 24 tokens of each of two clips
  encoder, (maps, positions, masks) = make_encoder(dropout=0.5, remat=True), make_inputs()
  for layer in encoder.layers:  # tokens do not see each other
    layer.self_attn.output_proj.kernel.set_value(jnp.zeros((DIM, DIM)))
  graph, state = nnx.split(encoder)

  @jax.jit
  def run(key):
    alike = [jnp.ones_like(x) for x in maps]
    return nnx.merge(graph, state)(alike, positions, masks, nnx.Rngs(dropout=key))[0].reshape(2, 96, DIM)

  first, second = run(jax.random.key(0)), run(jax.random.key(1))
  assert not np.allclose(first, second)
  for size in range(15, 25):
    assert not np.allclose(first[:, :size], first[:, size : 2 * size])


def test_bfloat16_stays_close():
  inputs = make_inputs()
  exact, half = (compiled(make_encoder(dtype=dtype))(*inputs) for dtype in (None, jnp.bfloat16))
  assert half[0].dtype == jnp.bfloat16
  assert_close([x.astype(np.float32) for x in half], exact, 0.3)
  assert np.mean([np.abs(a - b).mean() for a, b in zip(exact, half, strict=True)]) < 0.03


def test_devices_share_a_batch():
  run, inputs = value_and_gradient(make_encoder()), make_inputs(batch=8)
  shared = jax.device_put(inputs, jax.NamedSharding(make_mesh({"data": 8}), jax.P("data")))
  assert "all-gather" not in run.func.lower(*run.args, *shared).compile().as_text()
  assert_close(run(*shared), run(*inputs))
