"""Class queries against the outputs of the official implementation, on seeded weights in the official names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden_files, seeded
from vad_jax import convert
from vad_jax.models import class_query
from vad_jax.models.class_query import ClassQuery, Variant, level_mask
from vad_jax.ops import matching
from vad_jax.ops.boxes import cxcywh_to_xyxy


def official_weights(case: dict) -> dict[str, np.ndarray]:
  """Seeded tensors under the official names; those of which several names are one have the values of the last."""
  weights = {}
  for name, shape in case["manifest"].items():
    effective = case["aliases"].get(name, name)
    value = seeded.fill(effective, shape)
    for suffix, factor in case["gain"]:
      value = value * value.dtype.type(factor) if effective.endswith(suffix) else value
    weights[name] = value
  return weights


def official_batch(clip: dict) -> dict:
  """A seeded clip, zero-padded where the official one is."""
  video = seeded.seeded(clip["key"], clip["shape"]).transpose(0, 2, 3, 4, 1) * clip.get("scale", 1.0)
  rows, _, *full = video.shape[:4]
  sizes = np.array(clip.get("valid_hw") or [full] * rows, np.int32)
  return {"video": video, "video_size": sizes, "key": np.arange(rows, dtype=np.int32)}


def make_model(case: dict, monkeypatch: pytest.MonkeyPatch) -> ClassQuery:
  """The network of a golden, with its weights."""
  config = case["config"]
  settings, vit = config["MODEL"], config["ViT"]
  if settings["BACKBONE_NAME"] == "ViT":
    backbone = {"width": vit["EMBED_DIM"], "depth": vit["DEPTH"], "heads": vit["NUM_HEADS"]}
    sizes = Variant(class_query.ViT, backbone)
  else:
    sizes = class_query.VARIANTS["csn50"]
  sizes = sizes._replace(dim=settings["D_MODEL"], heads=settings["NHEAD"], hidden=settings["DIM_FEEDFORWARD"])
  sizes = sizes._replace(encoder_layers=settings["ENC_LAYERS"], decoder_layers=settings["DEC_LAYERS"])
  monkeypatch.setitem(class_query.VARIANTS, "golden", sizes)
  model = ClassQuery(
    variant="golden",
    num_classes=config["DATA"]["NUM_CLASSES"],
    tubes=not settings["SINGLE_FRAME"],
    num_frames=config["DATA"]["TEMP_LEN"],
    num_queries=settings["QUERY_NUM"],
    rngs=nnx.Rngs(0),
  )
  parts = None if "input" in case else r"(?!backbone|pyramid|decoder\.confidence).*"
  report = convert.load_reference(model, official_weights(case), source="class_query", parts=parts)
  assert parts or not report.named("missing")
  return nnx.view(model, deterministic=True)


def official_taps(model: ClassQuery, out: dict) -> dict[str, np.ndarray]:
  """Our tensors under the official names and in the official layout."""

  def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)

  def people_first(x):
    """``[F, B, N, ...]`` to ``[N, B F, ...]``."""
    x = np.asarray(x)
    return np.moveaxis(x, (2, 1, 0), (0, 1, 2)).reshape(x.shape[2], -1, *x.shape[3:])

  def rows(x):
    """``[F, B, ...]`` to ``[B F, ...]``."""
    x = np.asarray(x)
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

  def folded(x):
    """``[F, B, N, ...]`` to ``[N B F, ...]``."""
    x = people_first(x)
    return x.reshape(-1, *x.shape[2:])

  taps = {}
  for level, values in enumerate(out.get("levels", ())):
    taps[f"backbone.lateral.{level}"] = taps[f"input_proj.{level}"] = channels_first(values)
  features = out.get("features")
  if isinstance(features, list):
    taps |= {f"backbone.layer{index}": channels_first(values) for index, values in enumerate(features, 2)}
  elif features is not None:
    taps["backbone.vit_out"] = channels_first(features)
  first = int(isinstance(features, list))  # level 0 of a CSN is its second map
  for level, (values, embed) in enumerate(zip(out["positions"], model.level_embed[...], strict=True), first):
    taps[f"pos3d.{level}"] = channels_first(values - embed)
  tubes = out["boxes"].shape[2]
  anchors = np.asarray(model.decoder.anchors[...]).reshape(model.decoder.num_queries, tubes, 4)
  taps["decoder_in.refpoints_unsigmoid"] = np.tile(anchors, (1, out["boxes"].shape[1], 1))
  memory = np.asarray(out["memory"])
  levels, cells, dim = memory.shape[1], *memory.shape[3:]
  taps["decoder_in.memory"] = memory.transpose(1, 3, 2, 0, 4).reshape(levels, cells, -1, dim)
  place = rows(out["memory_positions"]).swapaxes(0, 1)
  taps["decoder_in.pos"] = np.broadcast_to(place, (4, *place.shape))
  grid = out["positions"][2].shape[2:4]
  for index, layer in enumerate(out["layers"]):
    ldl, cdl = f"ldl.{index}.", f"cdl.{index}."
    taps[ldl + "self_attention"] = rows(layer["self_attention"])
    taps[ldl + "attention"] = rows(layer["attention"])
    for name, key in (
      ("level_weights", "level_weights"),
      ("query_sine_embed", "place"),
      ("query_pos", "query_position"),
      ("output", "output"),
      ("actor_feature", "actor_feature"),
    ):
      taps[ldl + name] = people_first(layer[key])
    taps[ldl + "context"] = people_first(layer["context"]).swapaxes(1, 2)
    said = layer["classifying"]
    taps[cdl + "actor_feature"] = people_first(said["actor"])
    for name, key in (("conv_in", "combined"), ("z", "z")):
      values = folded(said[key])
      taps[cdl + name] = channels_first(values.reshape(len(values), *grid, -1))
    taps[cdl + "class_attention"] = folded(said["attention"])
    taps[cdl + "output"] = people_first(said["output"])
    classes = np.broadcast_to(said["class_queries"], said["output"].shape)
    taps[cdl + "class_query_after_self_attn"] = folded(classes).swapaxes(0, 1)
  for name, key in (("hs", "hidden"), ("cls_hs", "class_hidden"), ("references", "references")):
    values = np.asarray(out[key])
    taps[f"decoder.{name}"] = values.reshape(len(values), -1, *values.shape[3:])
  last = len(out["boxes"]) - 1
  for name, key in (("boxes", "boxes"), ("logits", "action_logits"), ("logits_b", "confidence_logits")):
    for layer, values in enumerate(np.asarray(out[key])):
      values = values if values.shape[1] > 1 else values[:, 0]
      taps[("out." if layer == last else f"out.aux{layer}.") + f"pred_{name}"] = values
  return taps


def encoder_taps(model: ClassQuery, out: dict, masks: list) -> dict[str, np.ndarray]:
  """All cells behind each layer of the encoder; the model itself runs the last one only where it is needed."""
  assert model.encoder is not None
  taps, layers = {}, list(model.encoder.layers)
  for index in range(len(layers)):
    model.encoder.layers = nnx.List(layers[: index + 1])
    maps = model.encoder(out["levels"], out["positions"], masks)
    taps[f"encoder.{index}"] = jnp.concatenate(
      [values.reshape(len(values), -1, values.shape[-1]) for values in maps], 1
    )
  return taps


# How far float32 may be off, in standard deviations: ten times what PyTorch's is (README of the reference outputs).
LIMITS = {"encoder": 2e-4, "class_attention": 2e-3, "pred_logits": 1e-2, "cls_hs": 1e-2}
# Tables that do not depend on weights, and a map that nobody uses, have tests of their own; so has the padding.
ELSEWHERE = ("vit.pos_table", "vit.pos_used", "decoder_in.key_padding_mask", "backbone.layer1")


def limit_of(name: str) -> float:
  return next((limit for part, limit in LIMITS.items() if part in name), 4e-4)


def assert_taps(taps: dict, case: dict) -> None:
  compared = 0
  for name, tap in case["taps"].items():
    if name not in (*ELSEWHERE, *(["pos3d.0"] if "backbone.layer1" in case["taps"] else [])):
      golden_files.assert_tap(taps[name], tap, limit_of(name), name)
      compared += 1
  assert compared > 20


@pytest.mark.parametrize(
  ("file", "index"), [*(("cq_tiny", i) for i in range(3)), *(("cq_tiny32", i) for i in range(2)), ("cq_csn50_ava", 0)]
)
def test_every_tap(file, index, monkeypatch):
  case = golden_files.load(f"class_query/{file}")["cases"][index]
  model = make_model(case, monkeypatch)
  batch = official_batch(case["input"])
  graphdef, state = nnx.split(model)

  def run(state, batch):
    model = nnx.merge(graphdef, state)
    out = model(batch)
    canvas = batch["video"].shape[2:4]
    masks = [level_mask(batch["video_size"], canvas, level.shape[2:4]) for level in out["levels"]]
    return out, encoder_taps(model, out, masks)

  out, encoder = jax.jit(run)(state, batch)
  assert_taps(official_taps(model, out) | encoder, case)


def test_in_float64(monkeypatch):
  """Closer than float32 can be; positions and reference points stay in float32, as in the official code."""
  case = golden_files.load("class_query/cq_tiny")["cases"][0]
  with jax.enable_x64(True):
    model = make_model(case, monkeypatch)
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(jnp.float64), state)
    batch = official_batch(case["input"])
    batch["video"] = batch["video"].astype(np.float64)
    out = jax.jit(lambda state, batch: nnx.merge(graphdef, state)(batch))(state, batch)
  assert out["boxes"].dtype == jnp.float64
  for name, values in official_taps(model, out).items():
    if name in case["taps"]:
      golden_files.assert_tap(values, case["taps"][name], 5e-5, name)


def test_transformer_alone(monkeypatch):
  """On seeded maps in place of a backbone's."""
  case = golden_files.load("class_query/cq_tiny")["cases"][3]
  model = make_model(case, monkeypatch)
  levels = [jnp.moveaxis(seeded.seeded(clip["key"], clip["shape"]), 1, -1) for clip in case["inputs"]]
  masks = [jnp.ones(level.shape[:1] + level.shape[2:4], bool) for level in levels]
  out = model.detect(levels, masks, case["config"]["MODEL"]["TEMP_LEN"])
  assert_taps(official_taps(model, out) | encoder_taps(model, out | {"levels": levels}, masks), case)


def targets_of(recorded: list[dict], num_classes: int) -> dict[str, np.ndarray]:
  """Targets of keyframes in our layout."""
  most = max(len(target["boxes"]) for target in recorded)
  boxes = np.zeros((len(recorded), most, 4), np.float32)
  labels = np.zeros((len(recorded), most, num_classes), np.float32)
  mask = np.zeros((len(recorded), most), bool)
  for row, target in enumerate(recorded):
    count = len(target["boxes"])
    boxes[row, :count] = cxcywh_to_xyxy(np.array(target["boxes"], np.float32)[:, 1:])
    labels[row, :count], mask[row, :count] = target["labels"], True
  return {"boxes": boxes, "labels": labels, "box_mask": mask, "key": np.arange(len(recorded), dtype=np.int32)}


@pytest.mark.parametrize("index", [0, 1])
def test_losses_and_gradients(index, monkeypatch):
  """With the losses of all layers, and with that of the last alone."""
  case = golden_files.load("class_query/cq_tiny_grad")["cases"][index]
  model = make_model(case, monkeypatch)
  model.auxiliary = case["aux_losses_added"]
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  batch = official_batch(case["input"]) | targets_of(case["targets"], 10)

  def loss(params):
    model = nnx.merge(graphdef, params, rest)
    out = model(batch)
    return model.loss(out, batch, matching.match(model.costs(out, batch), batch["box_mask"]))

  (total, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(total, case["total"], rtol=1e-5)
  weights = {"loss_ce": ("loss_action", 10), "loss_ce_b": ("loss_confidence", 1), "loss_bbox": ("loss_box", 5)}
  weights["loss_giou"] = ("loss_giou", 2)
  for name, (ours, weight) in weights.items():
    np.testing.assert_allclose(terms[ours], weight * case["losses"][name], rtol=1e-5, err_msg=name)
    assert (f"{ours}_0" in terms) == case["aux_losses_added"]
  kind = convert.SOURCES["class_query"]
  gradients, norms = ({case["aliases"].get(n, n): v for n, v in case[key].items()} for key in ("grad", "grad_norm"))
  seen = set()
  for path, value in nnx.to_flat_state(gradient):
    (name,) = convert.published_names(path, kind)
    recorded = gradients.get(name)
    if recorded is None:
      assert name in case["no_gradient"], name
      continue
    seen.add(name)
    value = np.asarray(value[...])
    value = np.moveaxis(value, (-1, -2), (0, 1)) if path[-1] == "kernel" else value
    norm = norms[name]
    np.testing.assert_allclose(np.linalg.norm(value), norm, rtol=1e-3, atol=1e-5, err_msg=name)
    found = value.reshape(-1)[recorded["index"]]
    typical = norm / np.sqrt(value.size)
    np.testing.assert_allclose(found, recorded["value"], rtol=1e-2, atol=1e-2 * typical + 2e-6, err_msg=name)
  assert seen == gradients.keys()
