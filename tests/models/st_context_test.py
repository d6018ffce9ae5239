"""Spatio-Temporal Context: the baseline against PySlowFast's detector, blocks and loss by hand, padding, devices."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import st_context_slowfast_r50
from tests import eight_devices, golden_files, seeded
from vad_jax import convert, describe, models, optim
from vad_jax.layers.position import sincos_positions
from vad_jax.models import st_context

CLASSES = 5
ROWS = {
  "baseline": {"context": "none"},
  "spatial": {"context": "spatial", "actor_grid": False},
  "spatial, grid": {"context": "spatial"},
  "spatial + temporal": {"actor_grid": False},
  "spatial + temporal, grid": {},
}


def make_batch(seed: int = 0, rows: int = 2, size: tuple[int, int] = (64, 96), actors: int = 3) -> dict:
  """The proposals are the annotated boxes, one that is nearly the first of them, and one of nobody; then padding."""
  rng = np.random.default_rng(seed)
  low = rng.uniform(0, 0.5, (rows, actors, 2))
  boxes = np.concatenate([low, low + rng.uniform(0.2, 0.4, (rows, actors, 2))], -1).astype(np.float32)
  box_mask = np.arange(actors) < np.array([[1], [actors]])[np.arange(rows) % 2]
  near, nobody = boxes[:, :1] + np.float32(0.004), np.tile(np.array([0.9, 0.9, 1, 1], np.float32), (rows, 1, 1))
  return dict(
    video=rng.integers(0, 256, (rows, 4, *size, 3), dtype=np.uint8),
    video_size=np.tile(np.array(size, np.int32), (rows, 1)),
    boxes=boxes,
    labels=(rng.random((rows, actors, CLASSES)) < 0.4).astype(np.float32),
    box_mask=box_mask,
    proposals=np.concatenate([boxes, near, nobody, 0 * near], 1),
    proposal_mask=np.concatenate([box_mask, np.tile([True, True, False], (rows, 1))], 1),
    key=np.arange(rows, dtype=np.int32),
  )


class Patches(nnx.Module):
  """A backbone that compiles in no time: linear in patches of 16 pixels, of one frame or of two."""

  widths = (16, 8)

  def __init__(self, *, norm: str, remat: bool, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    slow, fast = self.widths
    self.slow = nnx.Linear(2 * 16 * 16 * 3, slow, dtype=dtype, rngs=rngs)
    self.fast = nnx.Linear(16 * 16 * 3, fast, dtype=dtype, rngs=rngs)

  def __call__(self, video):
    cut = lambda i: einops.rearrange(video, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=i, j=16, k=16)  # noqa: E731
    return jnp.tanh(self.slow(cut(2))), jnp.tanh(self.fast(cut(1)))


@pytest.fixture(autouse=True)
def patches(monkeypatch):
  tiny = st_context.Variant({}, width=32, heads=2)
  monkeypatch.setitem(st_context.VARIANTS, "patches", tiny)
  slowfast = st_context.SlowFast
  monkeypatch.setattr(st_context, "SlowFast", lambda **sizes: (slowfast if "width" in sizes else Patches)(**sizes))


def make_model(**options) -> st_context.SpatioTemporalContext:
  options = {"variant": "patches", "num_classes": CLASSES, "dropout": 0.0, **options}
  return models.build("st_context", rngs=nnx.Rngs(0), **options)


def run(model, batch):
  """Everything that a batch gives."""
  graphdef, state = nnx.split(nnx.view(model, raise_if_not_found=False, deterministic=True))

  @jax.jit
  def everything(state, batch):
    model = nnx.merge(graphdef, state)
    out = model(batch)
    return out, model.loss(out, batch, None)[0], model.detections(out, batch)

  return everything(state, batch)


def test_the_baseline_is_the_official_detector(monkeypatch):
  """SlowFast with its head, in PySlowFast's names, on seeded weights."""
  recorded = golden_files.load("slowfast/tiny_16x64_detector")
  monkeypatch.setitem(
    st_context.VARIANTS, "tiny", st_context.Variant(st_context.slowfast.VARIANTS["tiny"], width=0, heads=0)
  )
  abstract = nnx.eval_shape(lambda: make_model(variant="tiny", context="none", num_classes=80))
  source = convert.Source("", "", (), st_context.REFERENCE_NAMES, "st_context", dict)
  (gain,) = recorded["fill_overrides"]
  names, values = dict(recorded["manifest"]), []
  for path, variable in nnx.to_flat_state(nnx.state(abstract)):
    (name,) = convert.published_names(path, source)
    value = seeded.fill(name, names.pop(name))
    value = value * np.float32(gain["gain"]) if value.ndim == gain["ndim"] else value
    value = np.moveaxis(value, (0, 1), (-1, -2)) if path[-1] == "kernel" else value
    values.append((path, variable.replace(jnp.asarray(value))))
  assert all(name.endswith("num_batches_tracked") for name in names)
  model = nnx.merge(nnx.graphdef(abstract), nnx.from_flat_state(values))
  (clip,) = recorded["inputs"]
  boxes = np.array(recorded["config"]["roi_boxes_batchidx_x1y1x2y2_pixels"], np.float32)[None, :, 1:]
  batch = {
    **make_batch(rows=1),
    "video": seeded.seeded(clip["key"], clip["shape"]).transpose(0, 2, 3, 4, 1),
    "video_size": np.array([[64, 64]], np.int32),
    "proposals": boxes / 64,
    "proposal_mask": np.ones((1, 2), bool),
  }

  model = nnx.view(model, deterministic=True)
  graphdef, state = nnx.split(model)
  quick = {"xla_backend_optimization_level": 0}
  out = jax.jit(lambda state, batch: nnx.merge(graphdef, state)(batch), compiler_options=quick)(state, batch)
  golden_files.assert_tap(out["action_logits"][0], recorded["taps"]["logits"], 2e-4)
  golden_files.assert_tap(jnp.moveaxis(out["regions"][0], -1, 1), recorded["taps"]["cat_tpool_roi7x7"], 2e-4)


def test_parameters():
  """The baseline has exactly those of PySlowFast's AVA detector; the context those of its linear layers and norms."""
  count = lambda model: sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))  # noqa: E731
  baseline = nnx.eval_shape(lambda: make_model(variant="r50", num_classes=80, context="none"))
  assert count(baseline) == 33_828_888
  d, attention = 512, lambda width: 2 * (512 * 512 + 512) + 2 * (width * 512 + 512)
  feed_forward = 2 * 4 * d * d + 5 * d + 4 * d  # with both norms
  around = 2304 * d + d + d * d + d
  options = dict(actor_grid=True, positions=False, dropout=0.0, dtype=None)
  for temporal, blocks in ((True, attention(2048) + attention(256)), (False, attention(2304))):
    context = nnx.eval_shape(
      lambda temporal=temporal: st_context.Context(
        baseline.backbone.widths, st_context.VARIANTS["r50"], temporal=temporal, **options, rngs=nnx.Rngs(0)
      )
    )
    assert count(context) == blocks + (1 + temporal) * feed_forward + around


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_table_1_learns(row):
  batch, model = make_batch(), make_model(**ROWS[row])
  graphdef, params = nnx.split(model)
  sgd = optim.make_optimizer(params, name="sgd", learning_rate=lambda _: 0.05, weight_decay=0)

  @jax.jit
  def step(params, state):
    def loss(params):
      model = nnx.merge(graphdef, params)
      return model.loss(model(batch), batch, None)[0]

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = sgd.update(gradients, state, params)
    return value, gradients, jax.tree.map(jnp.add, params, updates), state

  losses, state = [], sgd.init(params)
  for _ in range(8):
    value, gradients, params, state = step(params, state)
    losses.append(float(value))
  assert losses[-1] < 0.9 * losses[0]
  for path, gradient in nnx.to_flat_state(gradients):
    assert np.isfinite(gradient[...]).all(), path
    # The same number added to all keys changes no attention.
    assert np.any(gradient[...]) or path[-2:] == ("key", "bias"), path


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
  "row, positions", [("spatial", False), ("spatial, grid", True), ("spatial + temporal, grid", True)]
)
def test_blocks_by_hand(row, positions):
  """Each actor on its own, in numpy; the second video has padding, which nobody sees."""
  batch, model = make_batch(), make_model(positions=positions, **ROWS[row])
  batch["video_size"][1] = 50, 72  # of 4 x 6 cells, 4 x 5 are real
  out, _, _ = run(model, batch)
  slow, fast, regions = (np.asarray(out[name], np.float64) for name in ("slow", "fast", "regions"))
  linear = lambda layer, x: x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])  # noqa: E731

  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

  def block(layer, x, context, table):
    q, k, v = linear(layer.query, x), linear(layer.key, context), linear(layer.value, context)
    k = k + table if positions else k
    parts = [slice(0, 16), slice(16, 32)]  # two heads
    weights = [softmax(q[:, part] @ k[:, part].T / 4) for part in parts]
    found = np.concatenate([weight @ v[:, part] for weight, part in zip(weights, parts, strict=True)], -1)
    x = norm(x + linear(layer.proj, found))
    return norm(x + linear(layer.fc2, np.maximum(linear(layer.fc1, x), 0))), np.mean(weights, (0, 1))

  for index, across in ((0, 6), (1, 5)):
    still = np.concatenate([slow[index].mean(0), fast[index].mean(0)], -1)[:, :across]
    scene = still if row.startswith("spatial,") or row == "spatial" else still[..., :16]
    y, x = np.meshgrid(np.arange(4), np.arange(across), indexing="ij")
    places = np.concatenate([sincos_positions(4, 16)[y], sincos_positions(6, 16)[x]], -1).reshape(-1, 32)
    for actor in np.flatnonzero(batch["proposal_mask"][index]):
      tokens = regions[index, actor].reshape(49, -1)
      tokens = tokens if "grid" in row else tokens.max(0, keepdims=True)
      tokens, attention = block(
        model.context.spatial, linear(model.context.project, tokens), scene.reshape(-1, scene.shape[-1]), places
      )
      if "temporal" in row:
        moments = fast[index, :, :, :across].mean((1, 2))
        tokens, _ = block(model.context.temporal, tokens, moments, sincos_positions(4, 32))
      looked = np.asarray(model.maps(out, batch)["attention"][index, actor, 0])
      np.testing.assert_allclose(looked[:, :across], attention.reshape(4, across), atol=1e-5)
      assert not looked[:, across:].any()
      features = np.maximum(linear(model.context.hidden, tokens.max(0)), 0)
      np.testing.assert_allclose(out["features"][index, actor], features, atol=2e-4)
      logits = linear(model.classifier, features)
      np.testing.assert_allclose(out["action_logits"][index, actor], logits, atol=2e-4)


def test_loss_by_hand():
  batch, model = make_batch(), make_model()
  out, loss, found = run(model, batch)
  total, count = 0.0, 0
  for index in range(2):
    labels = batch["labels"][index]
    for slot in np.flatnonzero(batch["proposal_mask"][index]):
      wanted = [labels[0], labels[1], labels[2], labels[0], np.zeros(CLASSES)][slot]
      logit = np.asarray(out["action_logits"][index, slot], np.float64)
      total += (np.log1p(np.exp(-np.abs(logit))) + np.maximum(logit, 0) - logit * wanted).mean()
      count += 1
  assert count == 8
  np.testing.assert_allclose(loss, total / count, rtol=1e-5)
  np.testing.assert_array_equal(found.valid, batch["proposal_mask"])
  np.testing.assert_array_equal(found.actor_score, batch["proposal_mask"].astype(np.float32))
  np.testing.assert_allclose(found.boxes[1, :3], batch["boxes"][1])
  scored = model.detections(out, {**batch, "proposal_score": np.full((2, 6), 0.7, np.float32)})
  np.testing.assert_allclose(scored.actor_score, 0.7 * batch["proposal_mask"])


def test_labels_of_proposals():
  """At an IoU of 0.9 labels are the nearest one's; boxes at one place are one actor; padding is nobody."""
  boxes = np.array([[[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0.95], [np.nan] * 4]], np.float32)
  labels = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [np.nan] * 3]], np.float32)
  mask = np.array([[True, True, True, False]])
  proposals = np.array([[[0, 0, 1, 1], [0, 0, 1, 0.91], [0, 0, 1, 0.89], [0, 0, 0, 0], [0, 0, 1, 0.84]]], np.float32)
  found = st_context.proposal_labels(jnp.asarray(proposals), boxes, labels, mask)
  np.testing.assert_array_equal(found[0], [[1, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]])


def test_padding_changes_nothing():
  """Padded targets, proposals and rows, other rows, and how many slots there are."""
  batch, model = make_batch(rows=4), make_model()
  batch["key"][2:] = -1
  _, loss, found = run(model, batch)
  other = {key: value.copy() for key, value in batch.items()}
  other["video"][2:] = 255
  for boxes, mask in (("boxes", "box_mask"), ("proposals", "proposal_mask")):
    other[boxes][~batch[mask]] = np.nan
  other["labels"][~batch["box_mask"]] = np.nan
  alone = {key: value[:2] for key, value in other.items()}
  for key in ("proposals", "proposal_mask"):
    alone[key] = np.concatenate([alone[key], np.zeros_like(alone[key])], 1)
  assert not found.valid[2:].any()
  for changed in (other, alone):
    _, again, others = run(model, changed)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    for name in found._fields:
      ours, theirs = (np.asarray(getattr(x, name))[:2, :6] for x in (found, others))
      np.testing.assert_allclose(theirs[batch["proposal_mask"][:2]], ours[batch["proposal_mask"][:2]], atol=1e-5)


def test_padding_of_the_frame():
  """A wider canvas changes nothing that people in the frame do."""
  batch, model = make_batch(), make_model()
  _, loss, found = run(model, batch)
  wide = {**batch, "video": np.pad(batch["video"], ((0, 0), (0, 0), (0, 0), (0, 32), (0, 0)))}
  _, again, others = run(model, wide)
  # The samples of boxes at the border, between the last cell and the padding, do differ.
  inside = batch["proposal_mask"] & (batch["proposals"][..., 2] < 0.9)
  np.testing.assert_allclose(others.action_score[inside], found.action_score[inside], atol=1e-5)
  np.testing.assert_allclose(again, loss, rtol=0.02)


@pytest.mark.parametrize("nobody", ["box_mask", "proposal_mask"])
def test_nobody_gives_finite_gradients(nobody):
  batch, model = make_batch(), make_model()
  batch[nobody][:] = False
  graphdef, params = nnx.split(model)

  @jax.jit
  def gradients(params):
    def loss(params):
      model = nnx.merge(graphdef, params)
      return model.loss(model(batch), batch, None)[0]

    return jax.value_and_grad(loss)(params)

  value, found = gradients(params)
  assert np.isfinite(value) and (value > 0) == (nobody == "box_mask")
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_dropout_is_for_training():
  batch, model = make_batch(), make_model(dropout=0.5)
  training = nnx.view(model, deterministic=False)
  run_twice = jax.jit(lambda batch: [training(batch, rngs=nnx.Rngs(seed))["action_logits"] for seed in (0, 1)])
  first, second = run_twice(batch)
  assert np.abs(first - second).max() > 0.01
  np.testing.assert_allclose(run(model, batch)[0]["action_logits"], run(make_model(), batch)[0]["action_logits"])


def test_bfloat16_is_close():
  batch = make_batch()
  exact, found = (run(make_model(dtype=dtype), batch)[2] for dtype in ("float32", "bfloat16"))
  assert found.action_score.dtype == found.boxes.dtype == jnp.float32
  assert np.abs(np.asarray(found.action_score) - np.asarray(exact.action_score)).max() < 0.05


def test_eight_devices_agree_with_one():
  eight_devices.check(make_model(), make_batch(rows=8))


def test_config():
  config = st_context_slowfast_r50.get_config("context=spatial,actor_grid=no")
  assert (config.model.context, config.model.actor_grid, config.data.proposal_threshold) == ("spatial", False, 0.8)
  assert st_context_slowfast_r50.get_config("context=none").model.dropout == 0.5
  assert st_context_slowfast_r50.get_config("scratch").model.norm == "batch"
  assert st_context_slowfast_r50.get_config("oracle").data.to_dict() == {"name": "ava", "root": "data", "oracle": True}
  schedule = optim.make_schedule(**config.schedule, num_steps=2000, steps_per_epoch=100)
  rates = [schedule(100 * epoch) for epoch in (0, 5, 9.99, 10, 15, 20)]
  np.testing.assert_allclose(rates, [0.000125, 0.1, 0.1, 0.01, 0.001, 0.001], rtol=1e-5)


@pytest.mark.parametrize(
  "arguments, mean_ap",
  [
    ("context=none", 24.8),
    ("context=spatial,actor_grid=no", 26.5),
    ("context=spatial", 26.75),
    ("actor_grid=no", 26.65),
    ("", 27.02),
    ("positions", None),
  ],
)
def test_figures_of_table_1(arguments, mean_ap):
  figures = describe.figures(st_context_slowfast_r50.get_config(arguments))
  assert [figure.mean_ap for figure in figures] == ([mean_ap] if mean_ap else [])


def test_described():
  config = st_context_slowfast_r50.get_config("tiny")
  described = describe.describe(config, (8, 64, 64), training=False)
  assert described["inputs"]["proposals"] == "float32[1, 4, 4]" and described["parts"]["context"]["parameters"]


@pytest.mark.parametrize(
  "options, message",
  [(dict(context="temporal"), "none, spatial, "), (dict(variant="r101"), "r50, tiny"), (dict(dtype="f16"), "bfloat16")],
)
def test_options_that_do_not_exist(options, message):
  with pytest.raises(ValueError, match=message):
    make_model(**options)


def test_a_batch_without_proposals():
  batch = make_batch()
  del batch["proposals"]
  with pytest.raises(ValueError, match=r"classifies given boxes, and the batch has none: set config\.max_proposals"):
    make_model()(batch)
