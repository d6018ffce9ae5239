"""BMViT: token selections, heads, matching costs and losses; padding, batches, devices, precision."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import bmvit_hieral, bmvit_mvitv2s, bmvit_vitb
from tests import eight_devices
from vad_jax import models
from vad_jax.layers.position import grid_box_bias
from vad_jax.models import bmvit
from vad_jax.ops.matching import match

CLASSES = 5


def make_batch(seed: int = 0, rows: int = 2, size: tuple[int, int] = (32, 64), actors: int = 3) -> dict:
  rng = np.random.default_rng(seed)
  low = rng.uniform(0, 0.6, (rows, actors, 2))
  boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, (rows, actors, 2))], -1)
  return dict(
    video=rng.integers(0, 256, (rows, 4, *size, 3), dtype=np.uint8),
    video_size=np.tile(np.array(size, np.int32), (rows, 1)),
    boxes=boxes.astype(np.float32),
    labels=(rng.random((rows, actors, CLASSES)) < 0.4).astype(np.float32),
    box_mask=np.arange(actors) < np.array([[1], [actors]])[np.arange(rows) % 2],
    key=np.arange(rows, dtype=np.int32),
  )


class Patches(nnx.Module):
  """A backbone that compiles in no time: linear in patches of 2 x 8 x 8, and mixed over time."""

  width = 64

  def __init__(self, *, last_pool: bool, drop_path: float, remat: bool, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    self.linear = nnx.Linear(2 * 8 * 8 * 3, self.width, dtype=dtype, rngs=rngs)

  def __call__(self, video, rngs=None):
    x = self.linear(einops.rearrange(video, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=2, j=8, k=8))
    return jnp.tanh(x + x.mean(1, keepdims=True))


@pytest.fixture(autouse=True, scope="module")
def patches():
  bmvit.VARIANTS["patches"] = bmvit.Variant(Patches, {})
  yield
  del bmvit.VARIANTS["patches"]


def make_model(variant: str = "patches", **options) -> bmvit.BMViT:
  """Weights that are no longer at their start, where heads say the same of every token."""
  options = {"drop_path": 0.0, **options}
  model = models.build("bmvit", variant=variant, num_classes=CLASSES, rngs=nnx.Rngs(0), **options)
  for index, head in enumerate((model.box, model.actor, model.action)):
    kernel = head.layers[2].kernel
    kernel[...] = 0.5 * jax.random.normal(jax.random.key(index), kernel.shape)
  return model


@pytest.fixture(scope="module")
def model() -> bmvit.BMViT:
  return make_model()


@pytest.fixture(scope="module")
def run(model):
  """Compiled once: everything that a batch gives."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def everything(batch):
    model = nnx.merge(graphdef, state)
    out = model(batch)
    mask = match(model.costs(out, batch), batch["box_mask"])
    return out, mask, model.loss(out, batch, mask), model.detections(out, batch)

  return everything


def test_token_selections():
  """By hand, on features that say their own time slice and place."""
  features = jnp.arange(8 * 3 * 2, dtype=jnp.float32).reshape(1, 8, 3, 2, 1)
  mean = features.mean(1, keepdims=True)
  expected = {
    "centre": (features[:, 4:5], mean),
    "2(c+t)": (features[:, 3:5], jnp.stack([features[:, :4].mean(1), features[:, 4:].mean(1)], 1)),
    "tubelet": (mean, mean),
    "singleton": (features, features),
    "max_class": (features[:, 4:5], features),
  }
  assert set(expected) == set(bmvit.SELECTIONS)
  for name, pair in expected.items():
    for found, wanted in zip(bmvit.select_tokens(features, name), pair, strict=True):
      np.testing.assert_array_equal(found, wanted, err_msg=name)


@pytest.mark.parametrize("tokens", bmvit.SELECTIONS)
def test_every_selection_trains(tokens):
  batch, model = make_batch(), make_model(tokens=tokens)
  graphdef, params = nnx.split(model)

  @jax.jit
  def value_and_grad(params):
    def loss(params):
      model = nnx.merge(graphdef, params)
      out = model(batch)
      mask = match(model.costs(out, batch), batch["box_mask"])
      return model.loss(out, batch, mask)[0], (mask, model.detections(out, batch))

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, (mask, found)), gradients = value_and_grad(params)
  tokens_of = {"2(c+t)": 2, "singleton": 2}.get(tokens, 1) * 4 * 8  # 4 frames are 2 slices
  assert found.boxes.shape == (2, tokens_of, 4) and found.action_score.shape == (2, tokens_of, CLASSES)
  assert np.isfinite(loss)
  np.testing.assert_array_equal(mask.sum(1), batch["box_mask"])
  for path, gradient in nnx.to_flat_state(gradients):
    assert np.isfinite(gradient[...]).all(), path
    assert np.any(gradient[...]), path


def test_max_class_takes_the_largest_logit_over_time():
  model, batch = make_model(tokens="max_class"), make_batch()
  out = jax.jit(lambda batch: model(batch))(batch)
  each = model.action(out["features"]).max(1)
  np.testing.assert_allclose(out["action_logits"], each.reshape(2, -1, CLASSES), atol=1e-5)


def test_boxes_start_at_their_tokens():
  model = models.build("bmvit", variant="patches", num_classes=CLASSES, rngs=nnx.Rngs(0))
  out = jax.jit(lambda batch: model(batch))(make_batch())
  bias = 1 / (1 + np.exp(-grid_box_bias(4, 8).reshape(-1, 4)))
  boxes = np.asarray(out["boxes"])
  center, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
  np.testing.assert_allclose(center[0], np.tile(bias[:, :2], (2, 1)), atol=1e-5)
  np.testing.assert_allclose(size[0], np.tile(bias[:, 2:], (2, 1)), atol=1e-5)


def test_costs_and_losses_by_hand(run, model):
  """Both equations, token by token in numpy."""
  batch = make_batch()
  out, mask, (loss, terms), _ = run(batch)
  boxes, actor, action = (np.asarray(out[k], np.float64) for k in ("boxes", "actor_logits", "action_logits"))
  cost = np.asarray(model.costs(out, batch))
  entropy = lambda logit, wanted: np.log1p(np.exp(-np.abs(logit))) + np.maximum(logit, 0) - logit * wanted  # noqa: E731

  def form(box):
    return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]])

  def giou(a, b):
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    hull = np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - sides.prod()
    return sides.prod() / union - (hull.prod() - union) / hull.prod()

  expected = dict(loss_box=0.0, loss_giou=0.0, loss_actor=0.0, loss_action=0.0)
  for image in range(2):
    for token in range(boxes.shape[1]):
      odds = actor[image, token, 0] - actor[image, token, 1]
      matched = np.flatnonzero(mask[image, token])
      for m in np.flatnonzero(batch["box_mask"][image]):
        target, labels = batch["boxes"][image, m].astype(np.float64), batch["labels"][image, m]
        l1 = np.abs(form(boxes[image, token]) - form(target)).sum()
        overlap = giou(boxes[image, token], target)
        classes = entropy(action[image, token], labels).mean()
        by_hand = 5 * l1 + 2 * (1 - overlap) + 2 * entropy(odds, 1) + 6 * classes
        np.testing.assert_allclose(cost[image, token, m], by_hand, rtol=1e-4)
        if m in matched:
          expected["loss_box"] += 5 * l1
          expected["loss_giou"] += 2 * (1 - overlap)
      wanted = batch["labels"][image, matched].sum(0)
      expected["loss_actor"] += 2 * entropy(odds, len(matched))
      expected["loss_action"] += 6 * entropy(action[image, token], wanted).mean()
  count = batch["box_mask"].sum()
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value / count, rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(loss, sum(expected.values()) / count, rtol=1e-4)


def test_maps_show_the_probability_of_actors(run, model):
  batch = make_batch()
  out, *_, found = run(batch)
  heat = np.asarray(model.maps(out, batch)["actor"])
  assert heat.shape == (2, 4, 8)
  np.testing.assert_allclose(heat, np.asarray(found.actor_score).reshape(2, 2, 4, 8).max(1), atol=1e-6)


def test_padded_targets_and_rows_change_nothing(run):
  batch = make_batch(rows=4)
  batch["key"][2:] = -1
  out, _, (loss, _), found = run(batch)
  other = {**batch, "boxes": np.where(batch["box_mask"][..., None], batch["boxes"], np.nan)}
  other["video"], other["labels"] = batch["video"].copy(), np.where(batch["box_mask"][..., None], batch["labels"], 7)
  other["video"][2:] = 255
  again, _, (again_loss, _), again_found = run(other)
  np.testing.assert_allclose(again_loss, loss, rtol=1e-6)
  np.testing.assert_allclose(again["boxes"][:2], out["boxes"][:2], atol=1e-6)
  assert not np.asarray(found.valid)[2:].any() and np.asarray(again_found.valid)[:2].all()
  alone = {key: value[:2] for key, value in batch.items()}
  _, _, (alone_loss, _), _ = run(alone)
  np.testing.assert_allclose(alone_loss, loss, rtol=1e-5)


def test_padding_of_the_frame(run):
  """Boxes are of the unpadded frame, and tokens in the padding take no part."""
  batch = make_batch()
  batch["video_size"] = np.array([[32, 40], [24, 64]], np.int32)
  out, mask, _, found = run(batch)
  tokens = np.asarray(out["token_mask"]).reshape(2, 2, 4, 8)
  assert tokens[0, :, :, :5].all() and not tokens[0, :, :, 5:].any()
  assert tokens[1, :, :3].all() and not tokens[1, :, 3:].any()
  np.testing.assert_array_equal(found.valid, out["token_mask"])
  assert not np.asarray(mask)[~np.asarray(out["token_mask"])].any()
  assert (np.asarray(found.boxes) >= 0).all() and (np.asarray(found.boxes) <= 1).all()


def test_no_actor_gives_finite_gradients(model):
  batch = make_batch()
  batch["box_mask"][:] = False
  graphdef, params = nnx.split(model)

  @jax.jit
  def gradients(params):
    def loss(params):
      model = nnx.merge(graphdef, params)
      out = model(batch)
      return model.loss(out, batch, match(model.costs(out, batch), batch["box_mask"]))[0]

    return jax.value_and_grad(loss)(params)

  value, found = gradients(params)
  assert np.isfinite(value) and value > 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_bfloat16_is_close():
  batch = make_batch()
  exact, found = (
    jax.jit(lambda batch, model=model: model.detections(model(batch), batch))(batch)
    for model in (make_model("tiny"), make_model("tiny", dtype="bfloat16"))
  )
  assert found.boxes.dtype == jnp.float32
  for name in ("boxes", "actor_score", "action_score"):
    assert np.abs(np.asarray(getattr(found, name)) - np.asarray(getattr(exact, name))).max() < 0.05, name


def test_eight_devices_agree_with_one(model):
  eight_devices.check(model, make_batch(rows=8))


@pytest.mark.parametrize(
  "config, variant, side",
  [
    (bmvit_mvitv2s.get_config(), "mvitv2_s", 256),
    (bmvit_vitb.get_config("data=jhmdb"), "vit_b", 288),
    (bmvit_hieral.get_config(), "hiera_l", 224),
  ],
)
def test_configs(config, variant, side):
  assert (config.model.variant, tuple(config.canvas)) == (variant, (side, side))
  assert (config.num_epochs, config.schedule.learning_rate, config.optimizer.weight_decay) == (25, 1e-4, 1e-4)


@pytest.mark.parametrize(
  "options, message",
  [(dict(tokens="all"), "centre, 2"), (dict(variant="vit"), "mvitv2_s, vit_b"), (dict(dtype="f16"), "bfloat16")],
)
def test_options_that_do_not_exist(options, message):
  with pytest.raises(ValueError, match=message):
    models.build("bmvit", rngs=nnx.Rngs(0), **{"variant": "patches", **options})
