"""EVAD against the outputs of its official implementation, on seeded weights in the official names and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import evad_vitb
from tests import golden_files, seeded
from vad_jax import checkpoint, convert, optim, train
from vad_jax.layers.position import video_positions
from vad_jax.models import evad
from vad_jax.models.evad import EVAD
from vad_jax.ops import boxes, losses, matching
from vad_jax.ops.roi_align import box_levels, roi_align
from vad_jax.rngs import make_rngs

BACKBONE, ROI, BOXES, FINAL = 5e-5, 3e-4, 1e-4, 1e-4


def official_weights(manifest: dict) -> dict[str, np.ndarray]:
  """Seeded tensors; three kinds are tamed, as plain noise would give negative boxes or boxes of 1e5 pixels."""
  weights = {}
  for name, shape in manifest.items():
    value = seeded.fill(name, shape)
    if name == "init_proposal_boxes.weight":
      value = np.stack([0.5 + 0.3 * value[:, 0], 0.5 + 0.3 * value[:, 1], *(0.05 + np.abs(value[:, 2:])).T], 1)
    elif name.endswith("bboxes_delta.weight"):
      value = np.float32(0.1) * value
    weights[name] = value.astype(np.float32)
  return weights


def official_batch(clips: list[dict]) -> dict:
  """Seeded clips, zero-padded as the official code pads them."""
  sizes = [clip["shape"][2:] for clip in clips]
  height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
  video = np.zeros((len(clips), clips[0]["shape"][1], height, width, 3), np.float32)
  for row, clip in zip(video, clips, strict=True):
    row[:, : clip["shape"][2], : clip["shape"][3]] = seeded.seeded(clip["key"], clip["shape"]).transpose(1, 2, 3, 0)
  return dict(video=video, video_size=np.array(sizes, np.int32), key=np.arange(len(clips), dtype=np.int32))


def official_taps(out: dict) -> dict[str, np.ndarray]:
  """Our tensors under the official names and in the official layout."""

  def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)

  taps = {
    "tokens_in": out["tokens_in"],
    "norm": out["tokens"],
    "encoder_to_decoder": out["narrow_tokens"],
    "x_full": channels_first(out["restored"]),
    "roi_boxes_extended": out["extended_boxes"],
    "roi_feature": out["actor_features"],
    "crd_in": out["decoder_in"],
  }
  taps |= {f"block{i}": x for i, x in enumerate(out["block_tokens"])}
  taps |= {f"fpn_out_p{i + 2}": channels_first(x) for i, x in enumerate(out["fpn"])}
  for i, layer in enumerate(out["head"]):
    roi = np.asarray(layer["roi"])
    taps[f"head{i}_roi"] = np.moveaxis(roi.reshape(-1, *roi.shape[2:]), -1, 1)
    taps[f"head{i}_dynconv"] = np.asarray(layer["dynamic"]).reshape(-1, roi.shape[-1])
    taps[f"head{i}_levels"] = np.asarray(layer["level"]).reshape(-1) + 2
    taps |= {
      f"head{i}_{name}": layer[key]
      for name, key in dict(boxes_in="boxes_in", feature="feature", class_logits="logits", boxes="boxes").items()
    }
  for i, (x, logits) in enumerate(zip(out["decoder_tokens"], out["action_logits"], strict=True)):
    taps |= {f"crd{i}_x": x, f"crd{i}_logits": logits}
  return taps


def limit_of(name: str) -> float:
  if name.endswith(("_roi", "_dynconv")):
    return ROI
  return BACKBONE if name.startswith(("block", "tokens", "norm", "fpn")) else BOXES


def check_taps(out: dict, recorded: dict, scale: float = 1.0) -> None:
  checked = 0
  for name, value in official_taps(out).items():
    if name in recorded:
      checked += 1
      golden_files.assert_tap(value, recorded[name], limit_of(name) * scale, name)
  assert checked > 4


def check_detections(model, out: dict, batch: dict, recorded: dict, limit: float = FINAL) -> None:
  found = model.detections(out, batch)
  boxes, person, action = (np.asarray(x) for x in found[:3])
  kept = person >= 0.7
  kept[~kept.any(1)] = True
  rows = np.concatenate([np.argwhere(kept)[:, :1], boxes[kept]], 1)
  golden_files.assert_tap(rows, recorded["final_boxes"], limit, "final_boxes")
  golden_files.assert_tap(action[kept], recorded["final_actions"], limit, "final_actions")
  golden_files.assert_tap(person, recorded["person_scores"], limit, "person_scores")


def force_order(monkeypatch, recorded: dict) -> None:
  """Makes every pruning keep the recorded tokens in the recorded order: near ties may swap in another arithmetic."""
  chosen = iter(
    [recorded[name] for name in sorted((n for n in recorded if n.startswith("prune")), key=lambda n: int(n[5:]))]
  )

  def descending(importance):
    rows = []
    for image in next(chosen)["per_image"]:
      first = image["local_idx"]
      rows.append([*first, *sorted(set(range(importance.shape[1])) - set(first))])
    return jnp.array(rows)

  monkeypatch.setattr(evad, "descending", descending)


def build(recorded: dict, weights: dict | None = None, **options) -> EVAD:
  variant = "tiny" if recorded["config"]["embed_dim"] == 96 else "vit_b"
  model = EVAD(variant=variant, rngs=nnx.Rngs(0), **options)
  convert.load_reference(model, weights or official_weights(recorded["manifest"]), source="evad")
  return nnx.view(model, deterministic=True)


def in_float64(model: EVAD) -> EVAD:
  graph, state = nnx.split(model)
  return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))


@pytest.fixture(scope="module")
def tiny():
  recorded = golden_files.load("evad/evad_tiny")
  return recorded, build(recorded)


@pytest.mark.parametrize("case", [0, 1])
def test_tiny_keeps_the_same_tokens_in_the_same_order(tiny, case):
  recorded, model = tiny
  case = recorded["cases"][case]
  out = model(official_batch(case["clips"]))
  for index, name in enumerate(["prune2", "prune4", "prune6"]):
    expected = [image["global_nonkey_idx"] for image in case["taps"][name]["per_image"]]
    np.testing.assert_array_equal(out["kept"][index], expected)


@pytest.mark.parametrize("case", [0, 1])
def test_tiny_agrees_at_every_tap(tiny, case):
  recorded, model = tiny
  case = recorded["cases"][case]
  batch = official_batch(case["clips"])
  out = model(batch)
  check_taps(out, case["taps"])
  check_detections(model, out, batch, case["taps"])


@pytest.mark.parametrize("case", [0, 1])
def test_tiny_agrees_in_float64(tiny, case):
  recorded, model = tiny
  case = recorded["cases"][case]
  with jax.enable_x64(True):
    batch = official_batch(case["clips"])
    batch["video"] = jnp.asarray(batch["video"], jnp.float64)
    exact = in_float64(model)
    out = exact(batch)
    # The recorded values are a float32 run of the reference: no reproduction can agree better than its rounding.
    check_taps(out, case["taps"])
    check_detections(exact, out, batch, case["taps"])


def test_tiny_in_paper_order(tiny):
  recorded, _ = tiny
  case = recorded["cases"][0]
  model = build(recorded, token_order="paper")
  out = model(official_batch(case["clips"]))
  taps = official_taps(out)
  expected = case["variant_ascending_order"]["taps"]
  for name in ("roi_feature", "x_full", "crd0_logits", "crd1_logits"):
    golden_files.assert_tap(taps[name], expected[name], FINAL, name)


@pytest.mark.parametrize("name", ["evad_vitb_224", "evad_vitb_224x320"])
def test_vit_b_agrees_at_every_tap(name, monkeypatch):
  recorded = golden_files.load(f"evad/{name}")
  model = build(recorded)
  for case in recorded["cases"]:
    batch = official_batch(case["clips"])
    with monkeypatch.context() as patch:
      force_order(patch, case["taps"])
      out = model(batch)
    check_taps(out, case["taps"])
    check_detections(model, out, batch, case["taps"])


def training_batch(recorded: dict) -> dict:
  batch = official_batch(recorded["clips"])
  count = 4
  boxes = np.zeros((2, count, 4), np.float32)
  labels = np.zeros((2, count, 80), np.float32)
  mask = np.zeros((2, count), bool)
  for i, (image_boxes, image_labels) in enumerate(
    zip(recorded["gt_boxes_xyxy_pixels"], recorded["gt_labels_active"], strict=True)
  ):
    height, width = batch["video_size"][i]
    for j, (box, active) in enumerate(zip(image_boxes, image_labels, strict=True)):
      boxes[i, j], mask[i, j] = np.array(box) / [width, height, width, height], True
      labels[i, j, active] = 1
  return batch | dict(boxes=boxes, labels=labels, box_mask=mask)


@pytest.mark.parametrize("method", ["device", "scipy"])
def test_training_step(method):
  recorded = golden_files.load("evad/train_tiny")
  manifest = golden_files.load("evad/evad_tiny")["manifest"]
  model = EVAD(variant="tiny", drop_path=0.0, rngs=nnx.Rngs(0))
  convert.load_reference(model, official_weights(manifest), source="evad")
  batch = training_batch(recorded)
  graph, params = nnx.split(model)

  def loss_of(params):
    model = nnx.merge(graph, params)
    out = model(batch)
    match = matching.match(model.costs(out, batch), batch["box_mask"], method)
    return model.loss(out, batch, match)

  (total, terms), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
  np.testing.assert_allclose(total, recorded["total_fp64"], rtol=1e-5)
  ours = {
    "loss_ce": "loss_person",
    "loss_bbox": "loss_box",
    "loss_giou": "loss_giou",
    "loss_bce": "loss_action",
  }
  for name, expected in recorded["loss_weighted_fp64"].items():
    kind, _, layer = name.partition("_")[2].partition("_")
    np.testing.assert_allclose(terms[ours[f"loss_{kind}"] + (layer and f"_{layer}")], expected, rtol=1e-5, err_msg=name)

  checked = 0
  for path, gradient in nnx.to_flat_state(gradients):
    (name,) = convert.published_names(path, convert.SOURCES["evad"])
    value = np.asarray(gradient[...])
    if path[-1] == "kernel":
      value = np.moveaxis(value, (-1, -2), (0, 1))
    if name in recorded["params_without_grad"]:
      assert not value.any(), name
      continue
    norm = recorded["grad_norm"][name]["norm64"]
    if norm > 1e-6:
      checked += 1
      assert abs(np.linalg.norm(value) - norm) <= 1e-4 * norm, name
    if name in recorded["grad_taps"]:
      tap = recorded["grad_taps"][name]
      difference = value.reshape(-1)[tap["index"]] - np.array(tap["value"])
      assert np.linalg.norm(difference) <= 1e-4 * np.linalg.norm(tap["value"]) + 1e-9, name
  assert checked > 200


def test_one_optimizer_step():
  """Our whole training step against PyTorch's AdamW on the official gradients, groups and learning rates included."""
  recorded, expected = golden_files.load("evad/train_tiny"), golden_files.load("evad/adamw_step")
  manifest = golden_files.load("evad/evad_tiny")["manifest"]
  rate, optimizer_options = 2.5e-5, evad_vitb.get_config().optimizer.to_dict()
  with jax.enable_x64(True):
    model = EVAD(variant="tiny", drop_path=0.0, rngs=nnx.Rngs(0))
    convert.load_reference(model, official_weights(manifest))
    graphdef, params, rest = checkpoint.split_model(in_float64(model))
    optimizer = optim.make_optimizer(params, learning_rate=optax.constant_schedule(rate), **optimizer_options)
    step = train.make_train_step(
      graphdef,
      optimizer,
      optax.constant_schedule(rate),
      seed=0,
      matcher="device",
      microbatch=None,
      ema_decay=None,
    )
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "rest": rest, "opt": optimizer.init(params)}
    after, _ = jax.jit(step)(state, training_batch(recorded))
    updated = dict(nnx.to_flat_state(nnx.State(after["params"])))
  checked = 0
  for path, value in updated.items():
    (name,) = convert.published_names(path, convert.SOURCES["evad"])
    if name not in expected["index"]:
      continue
    value = np.asarray(value)
    value = np.moveaxis(value, (-1, -2), (0, 1)) if path[-1] == "kernel" else value
    gradient = np.array(expected["gradient"][name])
    # Where a gradient is nearly zero, its sign, which is all that the first step of AdamW sees, is noise.
    clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
    difference = value.reshape(-1)[expected["index"][name]] - np.array(expected["updated"][name])
    assert np.abs(difference[clear]).max() < 1e-5 * rate, name
    checked += clear.sum()
  assert checked > 1500


def loss_case(case: dict) -> tuple[dict, dict]:
  """Recorded predictions as the network's output, and annotations as a batch with a padded slot."""
  size = np.array(case["image_wh"], np.float32)
  count = max(case["num_gt"]) + 1
  boxes, labels = np.zeros((2, count, 4), np.float32), np.zeros((2, count, case["num_classes"]), np.float32)
  mask = np.arange(count) < np.array(case["num_gt"])[:, None]
  for i, (image_boxes, active) in enumerate(zip(case["gt_boxes_xyxy_pixels"], case["gt_labels_active"], strict=True)):
    for j, (box, classes) in enumerate(zip(image_boxes, active, strict=True)):
      boxes[i, j] = np.array(box) / np.tile(size[i], 2)
      labels[i, j, classes] = 1
  out = dict(
    boxes=jnp.array([layer["boxes_xyxy_pixels"] for layer in case["pred"]]),
    person_logits=jnp.array([layer["logits"] for layer in case["pred"]]),
    frame_size=jnp.tile(size, (1, 2)),
    action_logits=jnp.stack([seeded.seeded(key, case["actions_shape"]) for key in case["actions_key"]]),
  )
  return out, dict(boxes=boxes, labels=labels, box_mask=mask, key=np.arange(2))


@pytest.mark.parametrize("name", ["gt3_gt1", "gt3_gt0", "gt0_gt0_reference_is_nan"])
def test_losses_assignments_and_gradients(name):
  case = golden_files.load("evad/losses")["cases"][name]
  out, batch = loss_case(case)
  model = EVAD(variant="tiny", num_classes=case["num_classes"], rngs=nnx.Rngs(0))
  costs = model.costs(out, batch)
  match = matching.match(costs, batch["box_mask"])
  for layer, images in enumerate(case["match"]):
    for image, pairs in enumerate(images):
      expected = np.zeros(match.shape[2:], bool)
      expected[pairs["pred"], pairs["gt"]] = True
      np.testing.assert_array_equal(match[layer, image], expected)
      recorded = np.array(case["cost_matrix"][layer][image]).reshape(costs.shape[2], -1)
      np.testing.assert_allclose(costs[layer, image, :, : recorded.shape[1]], recorded, rtol=1e-4, atol=1e-5)

  def total_of(boxes, logits, actions):
    changed = out | dict(boxes=boxes, person_logits=logits, action_logits=actions)
    return model.loss(changed, batch, match)

  arguments = out["boxes"], out["person_logits"], out["action_logits"]
  (total, terms), gradients = jax.value_and_grad(total_of, argnums=(0, 1, 2), has_aux=True)(*arguments)
  ours = {"ce": "person", "bbox": "box", "giou": "giou", "bce": "action"}
  for term, expected in case["loss_weighted"].items():
    kind, _, layer = term.partition("_")[2].partition("_")
    if expected != "nan":
      value = terms[f"loss_{ours[kind]}" + (layer and f"_{layer}")]
      np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7, err_msg=term)
  if case["total"] == "nan":
    assert np.isfinite(total) and all(np.isfinite(x).all() for x in gradients)  # the reference divides by no actors
  else:
    np.testing.assert_allclose(total, case["total"], rtol=1e-5)
    for gradient, key in zip(gradients, ("boxes", "logits"), strict=False):
      np.testing.assert_allclose(gradient, case["grad_total"][key], rtol=1e-4, atol=1e-7)
    for layer, tap in enumerate(case["grad_total"]["actions"]):
      golden_files.assert_tap(gradients[2][layer], tap, 1e-4, f"actions {layer}")


def test_post_processing():
  for case in golden_files.load("evad/postprocess")["cases"]:
    actions = case["raw_actions_scale"] * seeded.seeded(case["raw_actions_key"], case["raw_actions_shape"])
    out = dict(
      boxes=jnp.array([case["raw_boxes_xyxy_pixels"]]),
      person_logits=jnp.array([case["raw_logits"]]),
      action_logits=jnp.array(actions)[None],
      frame_size=jnp.tile(jnp.array(case["input_wh"], jnp.float32), (1, 2)),
    )
    model = EVAD(variant="tiny", rngs=nnx.Rngs(0))
    found = model.detections(out, dict(key=np.arange(len(actions))))
    kept = np.asarray(found.actor_score) >= case["threshold"]
    kept[~kept.any(1)] = True
    rows = np.concatenate([np.argwhere(kept)[:, :1], np.asarray(found.boxes)[kept]], 1)
    np.testing.assert_allclose(rows, case["out_boxes_batchidx_x1y1x2y2_normalised"], atol=1e-5)


def test_units():
  units = golden_files.load("evad/units")
  for name, tap in units["pos_embed"].items():
    source, target = name.split("_to_")
    t, side, _, dim = map(int, source.split("x"))
    table = video_positions(dim, (t, *map(int, target.split("x"))), side)
    golden_files.assert_tap(table.reshape(1, -1, dim), tap["resized"], 1e-5, name)
  deltas = units["apply_deltas"]
  moved = boxes.apply_deltas(jnp.array(deltas["boxes"]), jnp.array(deltas["deltas"]), weights=deltas["weights"])
  np.testing.assert_allclose(moved, deltas["out"], rtol=1e-4, atol=1e-2)
  for case in units["roi_extension"]:
    frame = jnp.array([case["image_wh"] * 2], jnp.float32)
    grown = boxes.extend_boxes(jnp.array([case["boxes"]]), tuple(case["scale"]), frame)
    np.testing.assert_allclose(grown[0], case["out"], rtol=1e-5, atol=1e-4)
  giou = units["giou"]
  pairs = losses.box_costs(jnp.array(giou["a"]), jnp.array(giou["b"]))[1]
  np.testing.assert_allclose(pairs, giou["matrix"], rtol=1e-4, atol=1e-5)
  for case in units["keep_counts"]:
    assert evad.num_kept(case["n"], case["keep_rate"]) == case["kept_total"], case


@pytest.mark.parametrize("variant", ["tiny", "vit_b"])
def test_optimizer_groups(variant):
  config = evad_vitb.get_config()
  model = nnx.eval_shape(lambda: EVAD(variant=variant, rngs=make_rngs(0)))
  ours = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    scale, decayed = optim.group_of(
      "/".join(map(str, path)),
      variable.shape,
      groups=config.optimizer.groups,
      no_decay=config.optimizer.no_decay,
    )
    ours[convert.published_names(path, convert.SOURCES["evad"])[0]] = (scale, config.optimizer.weight_decay * decayed)
  recorded = golden_files.load("evad/optimizer_groups")["groups"]["tiny" if variant == "tiny" else "ViT_B"]
  assert ours == {name: (group["lr_scale"], group["weight_decay"]) for group in recorded for name in group["names"]}


def test_pyramid_levels():
  recorded = golden_files.load("evad/roi_align")["level_assignment"]
  np.testing.assert_array_equal(box_levels(jnp.array(recorded["boxes"]), 4) + 2, recorded["level"])


def test_roi_align_and_its_gradient():
  for case in golden_files.load("evad/roi_align")["cases"]:
    features = np.moveaxis(seeded.seeded(case["map_key"], case["map_shape"]), 1, -1)
    rois = np.array(case["rois_batch_x0y0x1y1"], np.float32)
    size, images = tuple(case["output_size"]), len(features)

    def pooled(features, rois=rois, size=size, images=images, case=case):
      every = roi_align(
        features,
        jnp.broadcast_to(rois[:, 1:], (images, len(rois), 4)),
        scale=case["spatial_scale"],
        output_size=size,
        sampling_ratio=case["sampling_ratio"],
      )
      return jnp.moveaxis(every[rois[:, 0].astype(int), jnp.arange(len(rois))], -1, 1)

    cotangent = seeded.seeded(case["cotangent_key"], case["output_shape"])
    value, pullback = jax.vjp(pooled, jnp.asarray(features))
    np.testing.assert_allclose(value, np.array(case["output"]).reshape(case["output_shape"]), atol=1e-4)
    gradient = np.moveaxis(np.asarray(pullback(jnp.asarray(cotangent))[0]), -1, 1)
    np.testing.assert_allclose(gradient, np.array(case["grad_map"]).reshape(case["map_shape"]), atol=1e-4)
