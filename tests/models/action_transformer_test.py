"""Action Transformer: proposals, targets, heads and losses by hand; padding, batches, devices, precision."""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import action_transformer_i3d
from tests import eight_devices, seeded
from vad_jax import describe, models
from vad_jax.backbones.i3d import I3D
from vad_jax.models import action_transformer
from vad_jax.models.action_transformer import ActionTransformer, Place, Variant, principal_colors
from vad_jax.ops.nms import nms
from vad_jax.ops.roi_align import roi_pool
from vad_jax.papers import PAPERS
from vad_jax.rngs import make_rngs

CLASSES = 5
OPTIONS = [
  {"head": "tx_i3d", "class_agnostic": True},
  {"query": "low_res", "boxes": "ground_truth"},
  {"head": "i3d", "class_boxes": True},
]


class Patches(nnx.Module):
  """A trunk that compiles in no time: linear in patches of 4 x 16 x 16, and mixed over time."""

  features = 26  # of Mixed_4f at this width

  def __init__(self, *, final_endpoint, norm, width, remat, dtype, rngs):
    assert (final_endpoint, width) == ("Mixed_4f", 1 / 32)
    self.linear = nnx.Linear(4 * 16 * 16 * 3, self.features, dtype=dtype, rngs=rngs)

  def __call__(self, video):
    x = self.linear(einops.rearrange(video, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=4, j=16, k=16))
    return jnp.tanh(x + x.mean(1, keepdims=True))


@pytest.fixture(autouse=True, scope="module")
def patches():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(action_transformer, "I3D", Patches)
    patch.setattr(action_transformer, "_LAYERS", 2)
    patch.setitem(action_transformer.VARIANTS, "patches", Variant(1 / 32, 32.0, 16, 8, 16, 16, 4))
    yield


def make_batch(seed: int = 0, rows: int = 2, size: tuple[int, int] = (64, 96), actors: int = 3) -> dict:
  rng = np.random.default_rng(seed)
  low = rng.uniform(0, 0.5, (rows, actors, 2))
  boxes = np.concatenate([low, low + rng.uniform(0.3, 0.5, (rows, actors, 2))], -1)
  return dict(
    video=rng.integers(0, 256, (rows, 8, *size, 3), dtype=np.uint8),
    video_size=np.tile(np.array(size, np.int32), (rows, 1)),
    boxes=boxes.astype(np.float32),
    labels=(rng.random((rows, actors, CLASSES)) < 0.4).astype(np.float32),
    box_mask=np.arange(actors) < np.array([[1], [actors]])[np.arange(rows) % 2],
    key=np.arange(rows, dtype=np.int32),
  )


def make_model(**options) -> ActionTransformer:
  """Numbers that are made in no time, and no longer those of the start, where all boxes have the same score."""
  options = {"variant": "patches", "proposals": 24, "dropout": 0.0, "num_classes": CLASSES, **options}
  model = nnx.eval_shape(lambda: models.build("action_transformer", rngs=make_rngs(0), **options))

  def fill(path: tuple, variable: Any) -> np.ndarray:
    shape = variable.shape
    if path[-1].key == "kernel":
      return seeded.seeded(jax.tree_util.keystr(path), shape) * np.prod(shape[:-1], dtype=np.float32) ** -0.5
    return np.full(shape, path[-1].key in ("scale", "var"), np.float32)

  state = jax.tree.map_with_path(fill, nnx.to_pure_dict(nnx.state(model)))
  nnx.update(model, jax.tree.map(jnp.asarray, state))
  return model


@pytest.fixture(scope="module")
def model() -> ActionTransformer:
  return make_model()


@pytest.fixture(scope="module")
def run(model):
  """Compiled once: everything that a batch gives in evaluation."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def everything(batch):
    model = nnx.merge(graphdef, state)
    out = model(batch)
    return out, model.loss(out, batch), model.detections(out, batch), model.maps(out, batch)

  return everything


def train_step(model: ActionTransformer):
  """Compiled once: loss, what the network returned and detections, and gradients, for a random choice of examples."""
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params, batch):
    model = nnx.merge(graphdef, params, rest)
    out = model(batch, rngs=nnx.Rngs(0))
    assert model.costs(out, batch) is None
    return model.loss(out, batch, None)[0], (out, model.detections(out, batch))

  return functools.partial(jax.jit(jax.value_and_grad(loss, has_aux=True)), params)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains(options):
  batch, model = make_batch(), make_model(**options)
  step = train_step(model)
  (loss, (out, found)), gradients = step(batch)
  slots = 3 if options.get("boxes") else 24
  assert found.boxes.shape == (2, slots, 4) and found.action_score.shape == (2, slots, CLASSES)
  assert found.valid.any(-1).all()
  assert np.isfinite(loss) and loss > 0
  for path, gradient in nnx.to_flat_state(gradients):
    assert np.isfinite(gradient[...]).all(), path
    assert np.any(gradient[...]) or path[-2:] == ("key", "bias"), path  # softmax does not see these
  assert ("attention" in out) == (options.get("head") != "i3d")

  nobody = {**batch, "box_mask": np.zeros((2, 3), bool), "boxes": np.full((2, 3, 4), np.nan, np.float32)}
  (loss, _), gradients = step(nobody)
  assert np.isfinite(loss) and loss > 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def entropy(logit, wanted):
  return np.log1p(np.exp(-np.abs(logit))) + np.maximum(logit, 0) - logit * wanted


def huber(x):
  return np.where(np.abs(x) < 1, x * x / 2, np.abs(x) - 0.5)


def overlap(a, b):
  sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
  return sides.prod() / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - sides.prod())


def deltas_of(box, target):
  size, wanted = box[2:] - box[:2], target[2:] - target[:2]
  shift = (target[:2] + target[2:] - box[:2] - box[2:]) / 2 / size
  return np.concatenate([10 * shift, 5 * np.log(wanted / size)])


def test_losses_by_hand(run):
  """Both stages, box by box in numpy; all proposals count in evaluation, and the first 256 anchors."""
  batch = make_batch()
  out, (loss, terms), _, _ = run(batch)
  out = {name: np.asarray(value, np.float64) for name, value in out.items()}
  expected = dict.fromkeys(terms, 0.0)
  for image in range(2):
    actors = np.flatnonzero(batch["box_mask"][image])
    targets = batch["boxes"][image, actors].astype(np.float64)
    labels = batch["labels"][image, actors]
    anchors = out["anchors"][image]
    inside = np.flatnonzero((anchors >= 0).all(-1) & (anchors <= 1).all(-1))
    table = np.array([[overlap(anchors[a], target) for target in targets] for a in inside])
    owner = np.where(table.max(1) >= 0.7, table.argmax(1), np.where(table.max(1) < 0.3, -1, -2))
    for m in reversed(range(len(actors))):
      owner[table[:, m].argmax()] = m
    assert (owner >= 0).sum() < 128 and (owner != -2).sum() < 256  # all of them count
    for a, m in zip(inside, owner, strict=True):
      if m == -2:
        continue
      share = 1 / (owner != -2).sum() / 2
      odds = out["anchor_logits"][image, a, 1] - out["anchor_logits"][image, a, 0]
      expected["loss_rpn_actor"] += share * entropy(odds, m >= 0)
      if m >= 0:
        off = out["anchor_deltas"][image, a] - deltas_of(anchors[a], targets[m])
        expected["loss_rpn_box"] += 2 * share * huber(off).sum()
    proposals = np.flatnonzero(out["proposal_mask"][image])
    for n in proposals:
      box, share = out["proposals"][image, n], 1 / len(proposals) / 2
      ious = [overlap(box, target) for target in targets]
      m = int(np.argmax(ious))
      wanted = np.concatenate([[0], labels[m]]) if ious[m] >= 0.5 else np.eye(1, 1 + CLASSES)[0]
      expected["loss_action"] += share * entropy(out["action_logits"][image, n], wanted).sum()
      if ious[m] >= 0.5:
        expected["loss_box"] += 2 * share * huber(out["deltas"][image, n] - deltas_of(box, targets[m])).sum()
  assert expected["loss_box"] > 0
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-3, err_msg=name)
  np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-3)


def test_proposals_by_hand(run, model):
  """Decoded and clipped anchors, greedily suppressed; not those of the padding, or larger than the frame."""
  batch = make_batch()
  batch["video_size"] = np.array([[64, 56], [40, 96]], np.int32)
  out, *_ = run(batch)
  cells = np.asarray(out["cells"])
  np.testing.assert_array_equal(cells[0], np.tile(np.arange(6) < 4, (4, 1)))  # cell 3 begins at pixel 48
  np.testing.assert_array_equal(cells[1], np.repeat(np.arange(4) < 3, 6).reshape(4, 6))
  for image, (height, width) in enumerate(batch["video_size"]):
    anchors = np.asarray(out["anchors"][image]) * [width, height, width, height]
    np.testing.assert_allclose(anchors, action_transformer.anchor_boxes((4, 6), base=32.0), atol=1e-3)
    deltas = np.asarray(out["anchor_deltas"][image], np.float64) / [10, 10, 5, 5]
    center, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    center, side = center + deltas[:, :2] * side, side * np.exp(deltas[:, 2:])
    boxes = np.concatenate([center - side / 2, center + side / 2], 1) / [width, height, width, height]
    boxes = np.clip(boxes, 0, 1)
    logits = np.asarray(out["anchor_logits"][image], np.float64)
    score = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    score[
      ~np.repeat(cells[image].reshape(-1), 12) | (anchors[:, 2:] - anchors[:, :2] > [width, height]).any(1)
    ] = -np.inf
    kept = nms(boxes, score, 0.7)[:24]
    count = int(out["proposal_mask"][image].sum())
    assert count == len(kept)
    np.testing.assert_allclose(out["proposals"][image, :count], boxes[kept], atol=1e-4)
    np.testing.assert_allclose(out["objectness"][image, :count], score[kept], rtol=1e-4)
    assert not np.asarray(out["objectness"])[image, count:].any()


def test_chosen_examples():
  """16 of 64 are positive at most, and the choice follows the random numbers."""
  boxes = jnp.tile(jnp.array([[0.1, 0.1, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9]]), (50, 1))[None]
  out = {"proposals": boxes, "proposal_mask": jnp.ones((1, 100), bool).at[0, 90:].set(False)}
  out["objectness"] = jnp.arange(100.0)[None]
  batch: Any = {"boxes": boxes[:, :1], "box_mask": jnp.ones((1, 1), bool)}
  choices = [action_transformer._choose(out, batch, nnx.Rngs(seed)) for seed in range(2)]
  for chosen in choices:
    place = np.asarray(chosen["objectness"][0]).astype(int)[np.asarray(chosen["proposal_mask"][0])]
    assert len(set(place)) == len(place) == 16 + 45  # all of the background there is
    assert (place % 2 == 0).sum() == 16 and place.max() < 90
    assert chosen["proposals"].shape == (1, 64, 4)
  assert not np.array_equal(choices[0]["objectness"], choices[1]["objectness"])


def test_detections_without_duplicates(run):
  batch = make_batch()
  out, _, found, _ = run(batch)
  for image in range(2):
    mask = np.asarray(out["proposal_mask"][image])
    score = 1 / (1 + np.exp(np.asarray(out["action_logits"][image, :, 0], np.float64)))
    kept = nms(np.asarray(out["boxes"][image]), np.where(mask, score, -np.inf), 0.6)
    count = int(found.valid[image].sum())
    assert 1 < count == len(kept) < mask.sum()
    np.testing.assert_allclose(found.boxes[image, :count], out["boxes"][image][kept], atol=1e-6)
    np.testing.assert_allclose(found.actor_score[image, :count], score[kept], rtol=1e-5)
    action = jax.nn.sigmoid(out["action_logits"][image][kept, 1:])
    np.testing.assert_allclose(found.action_score[image, :count], action, rtol=1e-5)


def test_given_boxes_are_the_detections():
  """Also two actors in the same place keep their own; without boxes, proposals stand in."""
  model, batch = make_model(boxes="ground_truth"), make_batch()
  batch["boxes"][1, 1] = batch["boxes"][1, 0]
  run = jax.jit(lambda batch: (lambda out: (out, model.loss(out, batch), model.detections(out, batch)))(model(batch)))
  out, (_, terms), found = run(batch)
  np.testing.assert_array_equal(found.valid, batch["box_mask"])
  np.testing.assert_array_equal(np.asarray(found.boxes)[batch["box_mask"]], batch["boxes"][batch["box_mask"]])
  np.testing.assert_array_equal(found.actor_score, batch["box_mask"])
  wanted = np.concatenate([np.zeros((2, 3, 1)), batch["labels"]], -1)
  expected = entropy(np.asarray(out["action_logits"], np.float64), wanted).sum(-1)
  expected = (expected[0, 0] + expected[1].mean()) / 2
  np.testing.assert_allclose(terms["loss_action"], expected, rtol=1e-5)

  alone: Any = {name: batch[name] for name in ("video", "video_size", "key")}
  out, found = jax.jit(lambda batch: (lambda out: (out, model.detections(out, batch)))(model(batch)))(alone)
  assert found.boxes.shape == (2, 24, 4)
  np.testing.assert_allclose(found.actor_score[:, 0], out["objectness"].max(-1))


def test_regions_of_the_i3d_head_in_turns(monkeypatch):
  """Many regions take turns, and come out as if at once: by time slice, pooled, and averaged at last."""
  model = make_model(head="i3d")
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.normal(size=(2, 4, 4, 6, 26)), jnp.float32)
  low = rng.uniform(0, 0.5, (2, 7, 2))
  regions = jnp.asarray(np.concatenate([low, low + 0.4], -1), jnp.float32)
  at_once = jax.jit(model._tubes)(features, regions)
  monkeypatch.setattr(action_transformer, "_REGIONS_AT_ONCE", 3)
  np.testing.assert_allclose(jax.jit(model._tubes)(features, regions), at_once, atol=1e-5)
  tubes = jnp.stack([roi_pool(features[:, t], regions) for t in range(4)], 2)  # [2, 7, t, 7, 7, C]
  expected = jax.jit(lambda head, x: head(x).mean((1, 2, 3)))(model.i3d_head, tubes[1, 5][None])
  np.testing.assert_allclose(at_once[1, 5], expected[0], atol=1e-5)


def test_unit_by_hand():
  """Attention over cells that may be looked at, both norms, feed-forward part."""
  rngs = nnx.Rngs(0)
  unit = action_transformer.TxUnit(nnx.Linear(3, 4, rngs=rngs), 6, 4, 5, dropout=0.0, dtype=None, rngs=rngs)
  query, memory = jax.random.normal(rngs.x(), (1, 2, 3)), jax.random.normal(rngs.x(), (1, 7, 6))
  mask = jnp.arange(7) < 5
  found, attention, keys = unit(query, memory, mask[None], None)
  q, k, v = unit.query(query)[0], unit.key(memory)[0], unit.value(memory)[0]
  weights = np.exp(np.asarray(q @ k.T / 2, np.float64)) * np.asarray(mask)
  weights /= weights.sum(-1, keepdims=True)
  np.testing.assert_allclose(attention[0], weights, atol=1e-5)
  np.testing.assert_array_equal(keys[0], k)

  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

  middle = norm(np.asarray(q + weights @ v))
  first, _, second = unit.mlp.layers
  inner = np.maximum(middle @ np.asarray(first.kernel) + np.asarray(first.bias), 0)
  np.testing.assert_allclose(
    found[0], norm(middle + inner @ np.asarray(second.kernel) + np.asarray(second.bias)), atol=1e-4
  )


def test_places_are_seen_from_the_centre():
  place = Place(8, dtype=None, rngs=nnx.Rngs(0))
  found = place(3, 5, 1)
  assert found.shape == (3, 5, 1, 8)
  np.testing.assert_allclose(found[1, 3, 0, :4], place.space(jnp.array([0.5, 0.0])), atol=1e-6)
  np.testing.assert_allclose(found[2, 3, 0, 4:], place.time(jnp.array([1.0])), atol=1e-6)


def test_maps(run):
  batch = make_batch()
  batch["video_size"][0] = 48, 64
  out, _, found, maps = run(batch)
  shapes = {
    "person": (2, 4, 6),
    "attention": (2, len(found.valid[1]), 1, 4, 6),
    "keys_1": (2, 4, 6, 3),
    "keys_2": (2, 4, 6, 3),
  }
  assert shapes == {name: value.shape for name, value in maps.items()}
  for name, value in maps.items():
    value = np.asarray(value if name != "attention" else value.sum((1, 2)) / value.shape[1])
    assert value.min() >= 0 and value.max() <= 1, name
    assert not value[0, 3:].any() and not value[0, :, 4:].any(), name
  attention = np.asarray(out["attention"])
  np.testing.assert_allclose(attention.sum((3, 4, 5)), 1, rtol=1e-5)
  assert found.valid[1].sum() > 1
  for slot in np.flatnonzero(found.valid[1]):  # detections are some of the regions, in another order
    (region,) = np.flatnonzero((np.asarray(out["boxes"][1]) == found.boxes[1, slot]).all(-1))
    np.testing.assert_allclose(maps["attention"][1, slot, 0], attention[1, :, region].sum(1).mean(0), rtol=1e-4)


def test_colors_are_principal_components():
  """Of keys that vary most along x, then y, then time, of which a slice shows nothing."""
  z, y, x = np.meshgrid(np.arange(3), np.arange(4), np.arange(5), indexing="ij")
  keys = (
    np.stack([3.0 * x, 2.0 * y, 0.1 * z, np.zeros_like(x)], -1)[None]
    @ np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
  )
  colors = np.asarray(principal_colors(jnp.asarray(keys, jnp.float32), jnp.ones((1, 4, 5), bool)))[0]
  for channel, ramp in ((0, np.tile(np.arange(5) / 4, (4, 1))), (1, np.tile(np.arange(4)[:, None] / 3, (1, 5)))):
    error = min(np.abs(colors[..., channel] - ramp).max(), np.abs(colors[..., channel] - ramp[::-1, ::-1]).max())
    assert error < 1e-3


def test_padded_targets_and_rows_change_nothing(run):
  batch = make_batch(rows=4)
  batch["key"][2:] = -1
  out, (loss, _), found, _ = run(batch)
  other = {**batch, "boxes": np.where(batch["box_mask"][..., None], batch["boxes"], np.nan)}
  other["video"], other["labels"] = batch["video"].copy(), np.where(batch["box_mask"][..., None], batch["labels"], 7)
  other["video"][2:], other["video_size"] = 255, batch["video_size"] * (batch["key"] >= 0)[:, None]
  again, (again_loss, _), again_found, _ = run(other)
  np.testing.assert_allclose(again_loss, loss, rtol=1e-6)
  np.testing.assert_allclose(again["boxes"][:2], out["boxes"][:2], atol=1e-6)
  assert not np.asarray(found.valid)[2:].any() and not np.asarray(again_found.valid)[2:].any()
  alone = {key: value[:2] for key, value in batch.items()}
  _, (alone_loss, _), alone_found, _ = run(alone)
  np.testing.assert_allclose(alone_loss, loss, rtol=1e-5)
  np.testing.assert_allclose(alone_found.boxes, found.boxes[:2], atol=1e-5)


def test_dropout_only_in_training():
  rngs = nnx.Rngs(0)
  unit = action_transformer.TxUnit(nnx.Linear(3, 4, rngs=rngs), 6, 4, 5, dropout=0.5, dtype=None, rngs=rngs)
  args = jnp.ones((1, 2, 3)), jnp.ones((1, 7, 6)), jnp.ones((1, 7), bool)
  first, again, inference = (
    nnx.view(unit, deterministic=deterministic)(*args, nnx.Rngs(seed))[0]
    for deterministic, seed in ((False, 1), (False, 1), (True, 1))
  )
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, inference)


def test_bfloat16_is_close(run):
  batch = make_batch(rows=1)
  model, exact = make_model(dtype="bfloat16"), run(batch)[0]
  names = ("anchor_logits", "anchor_deltas", "features")  # what follows depends on the choice of proposals
  found = jax.jit(lambda batch: {name: model(batch)[name] for name in names})(batch)
  assert [found[name].dtype for name in names] == [jnp.float32, jnp.float32, jnp.bfloat16]
  for name in names:
    assert np.abs(found[name] - exact[name]).max() < 0.05 * np.abs(exact[name]).max(), name


def test_eight_devices_agree_with_one(model):
  eight_devices.check(model, make_batch(rows=8))


@pytest.fixture
def whole_network(monkeypatch):
  monkeypatch.setattr(action_transformer, "I3D", I3D)
  monkeypatch.setattr(action_transformer, "_LAYERS", 3)


@pytest.mark.parametrize(
  "options, millions", [({"head": "i3d"}, 16.238413), ({"query": "low_res"}, 13.931741), ({}, 19.306461)]
)
def test_parameters_of_table_1(whole_network, options, millions):
  model = nnx.eval_shape(lambda: models.build("action_transformer", rngs=make_rngs(0), **options))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == round(1e6 * millions)


def test_described_as_in_table_1(whole_network):
  found = describe.describe(action_transformer_i3d.get_config("head=i3d,proposals=64"), training=False)
  assert found["input"] == [64, 400, 400]
  assert (found["paper"]["parameters"], found["paper"]["gflops"]) == ("16.2M", None)
  gmacs = {name: round(part["exact"] / 1e9, 2) for name, part in found["parts"].items()}
  assert gmacs["backbone"] == 348.49
  np.testing.assert_allclose(gmacs["i3d_head"], 64 * 0.609, rtol=1e-3)  # of 64 regions


@pytest.mark.parametrize("figure", PAPERS["action_transformer"].figures, ids=lambda figure: str(figure.mean_ap))
def test_config_arguments_give_the_rows_of_the_tables(figure):
  options = dict(figure.options)
  scratch = ",from_scratch" if options.pop("norm", "") else ""
  arg = ",".join(f"{name}={value}" for name, value in options.items()) + scratch
  config = action_transformer_i3d.get_config(arg)
  assert figure in describe.figures(config)
  assert config.num_steps == (500_000 if options.get("head") == "i3d" else 300_000)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(head="tx3"), "choose one of tx, i3d, tx_i3d"),
    (dict(query="mid"), "high_res, low_res"),
    (dict(variant="vit"), "i3d, tiny"),
    (dict(boxes="oracle"), "ground_truth"),
    (dict(dtype="f16"), "bfloat16"),
    (dict(proposals=0), "at least one"),
  ],
)
def test_options_that_do_not_exist(options, message):
  with pytest.raises(ValueError, match=message):
    models.build("action_transformer", rngs=nnx.Rngs(0), **{"variant": "patches", **options})
