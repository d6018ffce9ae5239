"""MViTv2 against PySlowFast's code, on seeded weights in its names and shapes."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden_files, seeded
from vad_jax import convert
from vad_jax.backbones import mvit
from vad_jax.layers import attention
from vad_jax.ops.roi_align import roi_align
from vad_jax.rngs import make_rngs

FLOAT32, FLOAT64 = 2e-4, 1e-6  # of the tap's standard deviation
RELEASED = {**mvit.VARIANTS["mvitv2_s"], "trained_size": (16, 224, 224)}


@pytest.fixture(scope="module")
def compiled_blocks():
  """Compiles each kind of block once for all tests instead of a dozen equal ones in every model."""
  plain = mvit.Block.__call__
  mvit.Block.__call__ = nnx.jit(plain, static_argnums=2)
  yield
  mvit.Block.__call__ = plain


@functools.cache
def parts(**arguments) -> tuple[nnx.GraphDef, nnx.State]:
  """A model without values, in parts."""
  return nnx.split(nnx.eval_shape(lambda: mvit.MViT(**arguments, rngs=make_rngs(0))))


def loaded(weights: dict[str, np.ndarray], **arguments) -> tuple[mvit.MViT, convert.LoadReport]:
  """A model with published weights."""
  shapes = {name: value.shape for name, value in weights.items()}
  model = nnx.merge(*parts(**mvit.reference_arguments(shapes), **arguments))
  return model, convert.load_reference(model, weights)


def weights_of(recorded: dict) -> dict[str, np.ndarray]:
  return {name: seeded.fill(name, shape) for name, shape in recorded["manifest"].items()}


def clip_of(recorded: dict) -> np.ndarray:
  (clip,) = recorded["inputs"]
  return seeded.seeded(clip["key"], clip["shape"]).transpose(0, 2, 3, 4, 1)


def official_taps(recorded: dict, dtype: jnp.dtype, **arguments) -> dict[str, jax.Array]:
  """Runs our network, and what the official one has behind it, from its weights."""
  weights = weights_of(recorded)
  model, report = loaded(weights, **arguments)
  assert report.named("skipped") == ["head.projection.weight", "head.projection.bias"]
  graphdef, state = nnx.split(model)
  model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))
  (first, _), *outputs = model.layers(jnp.asarray(clip_of(recorded), dtype))
  taps = {"patch_embed": first[:, 1:], "tokens_in": first}
  taps |= {f"block{index:02d}": x for index, (x, _) in enumerate(outputs)}
  x, grid = outputs[-1]
  taps["norm"] = normed = model.norm(x)
  features = normed[:, 1:].reshape(1, *grid, -1)

  def classify(x):
    return x @ weights["head.projection.weight"].T.astype(dtype) + weights["head.projection.bias"]

  if "boxes" in recorded:
    pooled = features.mean(1)
    boxes = jnp.asarray(recorded["boxes"], dtype)[None, :, 1:]
    # The official sampling ratio is 1 for boxes of at most 7 cells.
    regions = roi_align(pooled, boxes, scale=1 / 32, sampling_ratio=1)[0]
    taps |= {"feature_map_NCTHW": einops.rearrange(features, "b t h w c -> b c t h w")}
    taps |= {"tpool": pooled.transpose(0, 3, 1, 2), "roi7x7": regions.transpose(0, 3, 1, 2)}
    taps["roi_max"] = regions.max((1, 2))
    taps["logits"] = classify(taps["roi_max"])
    return taps | {"probs": jax.nn.sigmoid(taps["logits"])}
  halves = [features[:, :4].mean(1), features[:, 4:].mean(1)]
  chosen = {"sel_centre_t4": [features[:, 4]], "sel_T_mean": [features.mean(1)]}
  chosen |= {"sel_2C": [features[:, 3], features[:, 4]], "sel_2T": halves}
  taps |= {name: jnp.concatenate(parts, 1).reshape(1, -1, x.shape[-1]) for name, parts in chosen.items()}
  taps["logits"] = classify(normed[:, 0])
  return taps | {"probs": jax.nn.softmax(taps["logits"])}


def check(taps: dict, recorded: dict, limit: float) -> None:
  for name, tap in recorded["taps"].items():
    golden_files.assert_tap(taps[name], tap, limit, name)


@pytest.mark.parametrize(
  "name", ["tiny_8x64", "s_16x224", "s_16x224_detector", "s_16x256_interpolated", "s_16x256_no_last_pool"]
)
def test_equals_official_code(name: str, compiled_blocks) -> None:
  recorded = golden_files.load(f"mvit/{name}")
  check(official_taps(recorded, jnp.float32, last_pool="no_last_pool" not in name), recorded, FLOAT32)


def test_equals_official_code_in_float64() -> None:
  """Only here a LayerNorm's epsilon shows."""
  recorded = golden_files.load("mvit/tiny_8x64")
  with jax.enable_x64(True):
    check(official_taps(recorded, jnp.float64), recorded, FLOAT64)


def test_both_layouts_of_published_weights_are_the_same_network() -> None:
  names, weights = golden_files.load("mvit/torchvision_names"), weights_of(golden_files.load("mvit/s_16x224"))
  renamed = {theirs: weights[name].reshape(names["manifest"][theirs]) for name, theirs in names["map"].items()}
  assert renamed.keys() == names["manifest"].keys() and len(renamed) == 397
  (ours, report), (other, other_report) = loaded(weights), loaded(renamed)
  assert (report.source, other_report.source) == ("mvit", "mvit_torchvision")
  values = (nnx.to_pure_dict(nnx.state(model)) for model in (ours, other))
  jax.tree.map(np.testing.assert_array_equal, *values)


def test_reference_arguments() -> None:
  manifest = golden_files.load("mvit/s_16x224")["manifest"]
  assert mvit.reference_arguments(manifest) == RELEASED


@pytest.mark.parametrize(
  ("size", "last_pool", "grid"),
  [
    ((16, 256, 256), True, (8, 8, 8)),
    ((8, 224, 224), False, (4, 14, 14)),
    ((16, 320, 256), False, (8, 20, 16)),
    ((7, 200, 248), True, (4, 7, 8)),  # divides nowhere
  ],
)
def test_other_sizes_of_video(size, last_pool, grid) -> None:
  graphdef, state = parts(**RELEASED, last_pool=last_pool)
  video = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  out = jax.eval_shape(lambda state, video: nnx.merge(graphdef, state)(video), state, video)
  assert out.shape == (2, *grid, 768)


def test_relative_rows_by_definition() -> None:
  """Distances count in steps of the finer side; tables of other lengths are stretched."""
  rows = mvit.relative_rows(15, 8, 4)
  for q in range(8):
    for k in range(4):
      np.testing.assert_array_equal(rows[q, k], np.eye(15)[q - 2 * k + 6])
  np.testing.assert_allclose(mvit.relative_rows(7, 5, 5).sum(-1), 1)
  np.testing.assert_array_equal(mvit.relative_rows(13, 7, 7)[0, 0], np.eye(13)[6])


MINI = {"width": 16, "depths": (1, 1), "heads": 2, "trained_size": (4, 32, 32)}
VIDEO = np.random.default_rng(0).normal(size=(2, 6, 32, 40, 3)).astype(np.float32)


def random_state(state: nnx.State) -> nnx.State:
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), state)


def test_recomputing_blocks_and_turns_of_heads_change_nothing(monkeypatch) -> None:
  def gradients(limit: int, *, remat: bool):
    monkeypatch.setattr(attention, "MOST_WEIGHTS", limit)
    graphdef, state = parts(**MINI, drop_path=0.5, remat=remat)

    def loss(state):
      out = nnx.merge(graphdef, state)(VIDEO, nnx.Rngs(dropout=1))
      return (out * jnp.arange(out.size).reshape(out.shape)).mean()

    return nnx.to_pure_dict(jax.jit(jax.grad(loss))(random_state(state)))

  plain, other = gradients(2**26, remat=False), gradients(1, remat=True)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest), plain, other)


def test_half_precision() -> None:
  def run(dtype: jnp.dtype | None):
    graphdef, state = parts(**MINI, dtype=dtype)
    return jax.jit(lambda state: nnx.merge(graphdef, state)(VIDEO))(random_state(state))

  exact, rough = run(None), run(jnp.bfloat16)
  assert rough.dtype == jnp.bfloat16
  assert np.abs(exact - rough.astype(jnp.float32)).mean() < 0.02 * exact.std()
