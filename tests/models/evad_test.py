"""EVAD's options, padding and gradients, at small size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import eight_devices
from vad_jax.models import build
from vad_jax.models.evad import EVAD, VARIANTS, Variant
from vad_jax.ops.matching import match
from vad_jax.rngs import make_rngs

CLASSES = 5
SMALL = Variant(32, 4, 2, (1, 2), (0, 1, 2, 3), 16, 2, 1, 4, 32, 32, 1, 8, 16, 6)


@pytest.fixture(autouse=True)
def small_variant(monkeypatch):
  monkeypatch.setitem(VARIANTS, "small", SMALL)


def make_batch(seed: int = 0, rows: int = 2, height: int = 64, width: int = 64, actors: int = 3) -> dict:
  rng = np.random.default_rng(seed)
  low = rng.uniform(0, 0.5, (rows, actors, 2))
  return dict(
    video=rng.integers(0, 256, (rows, 8, height, width, 3), np.uint8),
    video_size=np.tile(np.array([[height, width]], np.int32), (rows, 1)),
    boxes=np.concatenate([low, low + rng.uniform(0.2, 0.5, low.shape)], -1).astype(np.float32),
    labels=(rng.random((rows, actors, CLASSES)) < 0.4).astype(np.float32),
    box_mask=np.arange(actors) < rng.integers(1, actors + 1, (rows, 1)),
    key=np.arange(rows, dtype=np.int32),
  )


@functools.cache
def make_model(**options) -> EVAD:
  return build("evad", **{"variant": "small", "num_classes": CLASSES, "drop_path": 0.0, **options}, rngs=nnx.Rngs(0))


def loss_of(model: EVAD, batch: dict) -> tuple:
  out = model(batch)
  return model.loss(out, batch, match(model.costs(out, batch), batch["box_mask"]))


def run(batch: dict, rngs: nnx.Rngs | None = None, **options) -> dict:
  """What the network returns for a batch, compiled."""
  graph, params = nnx.split(make_model(**options))
  return jax.jit(lambda params, batch, rngs: nnx.merge(graph, params)(batch, rngs=rngs))(params, batch, rngs)


def loss_and_gradients(batch: dict, **options) -> tuple:
  """Loss, gradients by parameter, compiled."""
  graph, params = nnx.split(make_model(**options))
  value_and_grad = jax.value_and_grad(lambda params, batch: loss_of(nnx.merge(graph, params), batch)[0])
  return jax.jit(value_and_grad)(params, batch)


@pytest.mark.parametrize(
  "options",
  [
    dict(keep_rate=1.0),
    dict(keep_rate=0.9, prune_at=(0, 1, 2, 3, 4, 5, 6, 7)),
    dict(keep_rate=0.1),  # nothing but the keyframe is left
    dict(pruning="unified", keep_rate=0.5),
    dict(pruning="random", keep_rate=0.5),
    dict(decoder_tokens="all", pruning="unified", mask_padding=True),
    dict(decoder_depth=0),
    dict(decoder_depth=3, roi_extension=(0.0, 0.0)),
    dict(keyframe_weight=4.0, token_order="paper", num_queries=7),
    dict(mask_padding=True),
    dict(dtype="bfloat16"),
    dict(variant="quickstart"),
  ],
  ids=str,
)
def test_every_option_gives_a_finite_loss_and_valid_detections(options):
  model, batch = make_model(**options), make_batch()
  graph, params = nnx.split(model)

  @jax.jit
  def everything(params, batch):
    model = nnx.merge(graph, params)
    out = model(batch)
    mask = match(model.costs(out, batch), batch["box_mask"])
    return out["action_logits"], model.loss(out, batch, mask), model.detections(out, batch)

  logits, (loss, terms), found = everything(params, batch)
  assert np.isfinite(loss) and all(np.isfinite(term) for term in terms.values())
  queries = options.get("num_queries") or model.sizes.num_queries
  assert found.boxes.shape == (2, queries, 4) and found.action_score.shape == (2, queries, CLASSES)
  assert found.boxes.dtype == found.action_score.dtype == jnp.float32
  assert (found.boxes >= 0).all() and (found.boxes <= 1).all()
  depth = options.get("decoder_depth", model.sizes.decoder_depth)
  assert len(logits) == max(depth, 1)


def test_number_of_kept_tokens():
  out = run(make_batch(), keep_rate=0.6, prune_at=(1, 3))
  total, key = 4 * 16, 16
  first = math.ceil(0.6 * total)
  second = math.ceil(0.6 * first)
  assert [tokens.shape[1] for tokens in out["block_tokens"]] == [total, first, first, second]
  assert [kept.shape[1] for kept in out["kept"]] == [first - key, second - key]
  for before, after in zip(out["kept"][:-1], out["kept"][1:], strict=True):
    for image in range(2):
      assert set(after[image].tolist()) < set(before[image].tolist())


@pytest.mark.parametrize("options", [{}, {"pruning": "unified", "decoder_tokens": "all"}, {"keep_rate": 1.0}], ids=str)
def test_map_counts_the_slices_in_which_a_place_is_kept(options):
  out = run(make_batch(), **{"keep_rate": 0.5, **options})
  kept = np.asarray(make_model().maps(out, {})["kept"])
  assert kept.shape == (2, 4, 4)
  expected = np.ones((2, 16)) if "pruning" not in options else np.zeros((2, 16))  # the keyframe
  history = out["kept"][-1] if out["kept"] else np.tile(np.arange(48), (2, 1))
  for row, places in enumerate(np.asarray(history)):
    np.add.at(expected[row], places % 16, 1)
  np.testing.assert_allclose(kept.reshape(2, 16), expected / 4, atol=1e-6)
  assert (kept.min() < 1) == ("keep_rate" not in options)


def test_all_tokens_reach_the_decoder_once():
  out = run(make_batch(), decoder_tokens="all")
  assert out["decoder_in"].shape[1] == 4 * 16 + SMALL.num_queries
  # Every place of the rebuilt map got a token: none is the learnt empty one.
  restored = np.asarray(make_model(decoder_tokens="all").decoder.mask_token[...])
  assert not np.isclose(np.asarray(out["narrow_tokens"]), restored).all(-1).any()


def test_keyframe_weight_changes_only_which_tokens_stay():
  batch = make_batch()
  plain, weighted = (run(batch, keyframe_weight=w) for w in (1.0, 4.0))
  np.testing.assert_array_equal(plain["block_tokens"][0], weighted["block_tokens"][0])
  assert not np.allclose(plain["importance"][0], weighted["importance"][0])


@pytest.mark.parametrize("padding", ["actors", "rows"])
def test_padding_never_changes_the_loss(padding):
  batch = make_batch()
  expected, _ = loss_and_gradients(batch)
  if padding == "actors":
    extra = make_batch(seed=1)
    padded = batch | {name: np.concatenate([batch[name], extra[name]], 1) for name in ("boxes", "labels")}
    padded["box_mask"] = np.concatenate([batch["box_mask"], np.zeros_like(batch["box_mask"])], 1)
    padded["boxes"][:, 3:] = np.nan
  else:
    extra = make_batch(seed=1) | {"key": np.full(2, -1, np.int32), "video_size": np.zeros((2, 2), np.int32)}
    padded = {name: np.concatenate([batch[name], extra[name]]) for name in batch}
  loss, gradients = loss_and_gradients(padded)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_rows_that_fill_a_batch_are_no_detections():
  model, batch = make_model(), make_batch()
  batch["key"][1] = -1
  found = model.detections(run(batch), batch)
  assert found.valid[0].all() and not found.valid[1].any()


def test_masked_padding_makes_the_canvas_irrelevant():
  options = dict(keep_rate=1.0, mask_padding=True)
  small = make_batch()
  large = dict(small, video=np.zeros((2, 8, 64, 128, 3), np.uint8))
  large["video"][:, :, :, :64] = small["video"]
  # Positions are those of the canvas, so the same grid is compared: noise in the padding must not matter.
  noisy = dict(large, video=large["video"].copy())
  noisy["video"][:, :, :, 64:] = 255
  masked = run(large, **options)
  for name in ("boxes", "action_logits"):
    np.testing.assert_array_equal(masked[name], run(noisy, **options)[name])
  unmasked = run(large, keep_rate=1.0)
  assert not np.allclose(masked["boxes"][-1], unmasked["boxes"][-1])


def test_padded_tokens_are_dropped_first():
  batch = make_batch()
  batch["video_size"][:, 1] = 32  # the right half is padding
  out = run(batch, mask_padding=True, keep_rate=0.625, prune_at=(2,))
  column = np.asarray(out["kept"][0]) % 4
  assert (column < 2).all()


def test_gradients_reach_every_parameter(monkeypatch):
  monkeypatch.setitem(VARIANTS, "levels", SMALL._replace(canonical_size=32.0))
  model = make_model(variant="levels")
  side = jnp.array([0.1, 0.2, 0.32, 0.6, 1.0, 1.0])  # of 128 pixels: proposals on every level of the pyramid
  model.proposals.boxes[...] = jnp.stack([jnp.full(6, 0.5)] * 2 + [side] * 2, -1)
  _, gradients = loss_and_gradients(make_batch(height=128, width=128), variant="levels")
  flat = nnx.to_flat_state(gradients)
  still = {".".join(map(str, path)) for path, gradient in flat if not np.asarray(gradient[...]).any()}
  assert not still


def test_remat_changes_nothing():
  batch = make_batch()
  plain, again = (loss_and_gradients(batch, remat=remat) for remat in (False, True))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_drop_path_only_in_training():
  model, batch = make_model(drop_path=0.5), make_batch()
  with pytest.raises(ValueError, match="rngs"):
    run(batch, drop_path=0.5)
  dropped = [run(batch, nnx.Rngs(dropout=seed), drop_path=0.5)["boxes"] for seed in (0, 0, 1)]
  np.testing.assert_array_equal(dropped[0], dropped[1])
  assert not np.allclose(dropped[0], dropped[2])
  graph, params = nnx.split(nnx.view(model, deterministic=True))
  kept = jax.jit(lambda params: nnx.merge(graph, params)(batch)["boxes"])(params)
  np.testing.assert_allclose(kept, run(batch)["boxes"], rtol=1e-3, atol=1e-3)


def test_bfloat16_stays_near_float32():
  batch = make_batch()
  exact, rough = (run(batch, dtype=dtype, keep_rate=1.0) for dtype in ("float32", "bfloat16"))
  assert rough["tokens"].dtype == jnp.bfloat16
  for name in ("tokens", "actor_features"):
    a, b = (np.asarray(x[name], np.float32) for x in (exact, rough))
    assert np.abs(a - b).mean() < 0.05 * a.std(), name


def test_eight_devices_agree_with_one():
  eight_devices.check(make_model(), make_batch(rows=8))


def test_learns_one_batch_by_heart():
  model, batch = make_model(variant="quickstart"), make_batch(height=64, width=96)
  graph, params = nnx.split(model)
  optimizer = optax.adamw(1e-3)

  @jax.jit
  def step(params, state):
    (loss, terms), gradients = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), batch), has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss, terms

  state, history = optimizer.init(params), []
  for _ in range(60):
    params, state, loss, _ = step(params, state)
    history.append(float(loss))
  assert history[-1] < 0.4 * history[0]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(variant="vit_x"), r"vit_x.*vit_s, vit_b, vit_l"),
    (dict(pruning="none"), "keyframe, unified, random"),
    (dict(keep_rate=0.0), "keep_rate"),
    (dict(dtype="float16"), "float32, bfloat16"),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    build("evad", **options, rngs=nnx.Rngs(0))


def test_bad_sizes_and_names_are_named():
  with pytest.raises(ValueError, match="multiples of 32"):
    run(make_batch(height=48))
  with pytest.raises(ValueError, match=r"unknown model 'evat'.*evad"):
    build("evat", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("variant", "millions"), [("vit_s", 119.7), ("vit_b", 185.359636), ("vit_l", 439.535220)])
def test_parameter_counts(variant, millions):
  model = nnx.eval_shape(lambda: EVAD(variant=variant, rngs=make_rngs(0)))
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert count == pytest.approx(millions * 1e6, rel=1e-9 if variant != "vit_s" else 0.2)
