"""Hiera against its official code, on seeded weights in its names and shapes."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden_files, seeded
from vad_jax import convert
from vad_jax.backbones import hiera
from vad_jax.rngs import make_rngs

FLOAT32, FLOAT64 = 2e-4, 1e-6  # of the tap's standard deviation


@functools.cache
def parts(**arguments) -> tuple[nnx.GraphDef, nnx.State]:
  """A model without values, in parts."""
  return nnx.split(nnx.eval_shape(lambda: hiera.Hiera(**arguments, rngs=make_rngs(0))))


def unrolled(x: jax.Array, poolings: int) -> jax.Array:
  """Tokens ``[B, t, h, w, C]`` in the official order: parts that a pooling takes the maximum of come one by one."""
  x = x[:, None]
  for _ in range(poolings):
    x = einops.rearrange(x, "b part t (h i) (w j) c -> b (part i j) t h w c", i=2, j=2)
  return x.reshape(len(x), -1, x.shape[-1])


def official_taps(recorded: dict, dtype: jnp.dtype, **arguments) -> dict[str, jax.Array]:
  """Runs our network, and after it the official classifier, which we do not have, from its weights."""
  weights = {name: seeded.fill(name, shape) for name, shape in recorded["manifest"].items()}
  for override in recorded["fill_overrides"]:
    for name in (name for name in weights if name.endswith(override["endswith"])):
      weights[name] = np.float32(override["std"]) * seeded.seeded(name, weights[name].shape)
  arguments |= hiera.reference_arguments(recorded["manifest"])
  model = nnx.merge(*parts(**arguments))
  report = convert.load_reference(model, weights)
  assert report.named("skipped") == ["head.projection.weight", "head.projection.bias"]
  graphdef, state = nnx.split(model)
  (clip,) = recorded["inputs"]
  video = jnp.asarray(seeded.seeded(clip["key"], clip["shape"]).transpose(0, 2, 3, 4, 1), dtype)

  @jax.jit
  def run(state, video):
    model = nnx.merge(graphdef, state)
    patches, (first, *blocks) = model.patch_embed(video), model.layers(video)
    ends = [blocks[end - 1] for end in np.cumsum(arguments["depths"])]
    taps = {name: x.reshape(1, -1, x.shape[-1]) for name, x in (("patch_embed", patches), ("tokens_in", first))}
    taps["unrolled"] = unrolled(first, 3)
    for index, x in enumerate(blocks):
      taps[f"block{index:02d}_raw_order"] = unrolled(x, 3 - (first.shape[2] // x.shape[2]).bit_length() + 1)
    taps |= {f"stage{stage}_rerolled": x for stage, x in enumerate(ends)}
    return taps | {"final_tokens_norm": model.norm(ends[-1]), "mean_then_norm": model.norm(ends[-1].mean((1, 2, 3)))}

  taps = run(jax.tree.map(lambda x: x.astype(dtype), state), video)
  head = weights["head.projection.weight"].T.astype(dtype)
  taps["logits"] = taps["mean_then_norm"] @ head + weights["head.projection.bias"]
  return taps | {"probs": jax.nn.softmax(taps["logits"])}


def check(taps: dict, recorded: dict, limit: float) -> None:
  for name, tap in recorded["taps"].items():
    golden_files.assert_tap(taps[name], tap, limit, name)


@pytest.mark.parametrize("name", ["t_16x128", "t_16x128_no_last_pool", "b_16x224"])
def test_equals_official_code(name: str) -> None:
  recorded = golden_files.load(f"hiera/{name}")
  check(official_taps(recorded, jnp.float32, last_pool="no_last_pool" not in name), recorded, FLOAT32)


@pytest.mark.parametrize("name", ["t_16x128", "t_16x128_no_last_pool"])
def test_equals_official_code_in_float64(name: str) -> None:
  """Only here a LayerNorm's epsilon shows."""
  recorded = golden_files.load(f"hiera/{name}")
  with jax.enable_x64(True):
    check(official_taps(recorded, jnp.float64, last_pool="no_last_pool" not in name), recorded, FLOAT64)


def test_published_names_and_shapes_of_hiera_l() -> None:
  recorded = golden_files.load("hiera/l_manifest")
  arguments = hiera.reference_arguments(recorded["manifest"])
  assert arguments == {**hiera.VARIANTS["large"], "trained_size": (16, 224, 224)}
  expected = {name: shape for name, shape in recorded["manifest"].items() if not name.startswith("head.")}
  sizes = {}
  for path, variable in nnx.to_flat_state(parts(**arguments)[1]):
    (name,) = convert.published_names(path, convert.SOURCES["hiera"])
    sizes[name] = variable.size
  assert sizes == {name: np.prod(shape) for name, shape in expected.items()}
  assert sum(sizes.values()) == recorded["params"] - 400 * (1152 + 1)  # the classifier


def test_weights_before_fine_tuning_name_the_norm_otherwise() -> None:
  kind = convert.SOURCES["hiera_pretrained"]
  assert convert.published_names(("norm", "scale"), kind) == ("encoder_norm.weight",)
  assert convert.published_names(("blocks", 3, "norm1", "bias"), kind) == ("blocks.3.norm1.bias",)


def test_other_widths_do_not_tell_their_heads() -> None:
  with pytest.raises(ValueError, match="no published Hiera has 100 channels"):
    hiera.reference_arguments({"patch_embed.proj.weight": (100, 3, 3, 7, 7)})


MINI = {"width": 16, "depths": (1, 1, 1, 1), "heads": 2, "trained_size": (8, 64, 64)}


@pytest.mark.parametrize(
  ("size", "last_pool", "grid"),
  [((16, 256, 256), True, (8, 8, 8)), ((8, 224, 224), False, (4, 14, 14)), ((15, 320, 256), False, (8, 20, 16))],
)
def test_other_sizes_of_video(size, last_pool, grid) -> None:
  graphdef, state = parts(**hiera.VARIANTS["tiny"], last_pool=last_pool)
  video = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  out = jax.eval_shape(lambda state, video: nnx.merge(graphdef, state)(video), state, video)
  assert out.shape == (2, *grid, 768)


def test_videos_without_whole_mask_units_are_refused() -> None:
  with pytest.raises(ValueError, match="height and width must be multiples of 32"):
    next(nnx.merge(*parts(**MINI)).layers(np.zeros((1, 8, 64, 80, 3))))


def random_state(state: nnx.State) -> nnx.State:
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), state)


def test_positions_of_other_grids() -> None:
  graphdef, state = parts(**MINI)
  model = nnx.merge(graphdef, random_state(state))
  space, time = (np.asarray(table) for table in (model.pos_embed_spatial, model.pos_embed_temporal))
  trained = model.positions((4, 16, 16))
  np.testing.assert_allclose(trained, time[:, None, None] + space.reshape(16, 16, -1), rtol=1e-6)
  larger = model.positions((8, 32, 24))
  assert larger.shape == (8, 32, 24, 16)
  np.testing.assert_allclose(larger.mean((0, 1, 2)), trained.mean((0, 1, 2)), atol=0.02)
  np.testing.assert_allclose(
    larger[0] - larger[3], np.broadcast_to(time[0] - (time[1] * 3 + time[2]) / 4, (32, 24, 16)), atol=1e-6
  )


def test_recomputing_blocks_changes_nothing() -> None:
  video = np.random.default_rng(0).normal(size=(2, 4, 64, 96, 3)).astype(np.float32)

  def gradients(*, remat: bool):
    graphdef, state = parts(**MINI, drop_path=0.5, remat=remat)

    def loss(state):
      out = nnx.merge(graphdef, state)(video, nnx.Rngs(dropout=1))
      return (out * jnp.arange(out.size).reshape(out.shape)).mean()

    return nnx.to_pure_dict(jax.jit(jax.grad(loss))(random_state(state)))

  plain, other = gradients(remat=False), gradients(remat=True)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest), plain, other)


def test_half_precision() -> None:
  video = np.random.default_rng(0).normal(size=(1, 4, 64, 64, 3)).astype(np.float32)

  def run(dtype: jnp.dtype | None):
    graphdef, state = parts(**MINI, dtype=dtype)
    return jax.jit(lambda state: nnx.merge(graphdef, state)(video))(random_state(state))

  exact, rough = run(None), run(jnp.bfloat16)
  assert rough.dtype == jnp.bfloat16
  assert np.abs(exact - rough.astype(jnp.float32)).mean() < 0.02 * exact.std()
