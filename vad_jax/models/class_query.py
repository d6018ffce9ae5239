"""Class queries: whole tubes in one pass, and for each person and each class a look of its own at the scene.

Paper: Lee et al., "Classification Matters: Improving Video Action Detection with Class-Specific Attention", ECCV 2024.

    video [B, T, H, W, 3] -> ViT or CSN -> 4 levels [B, t, h, w, D]
      3-D deformable encoder -> levels, resampled to one grid of T frames
      of each frame that is asked for, in each decoder layer
        localizing layer:  N boxes and embeddings look at the levels -> people, context of each [N, h w, D]
        classifying layer: K class queries of each person look at that context [N, K, D]
    box [B, F, N, 4], confidence [B, F, N], one logit per class [B, F, N, K], and where each class looked

Frames do not exchange anything in the decoder: a tube is the same query in every frame. ``tubes`` decodes all ``F = T``
frames, else it is the keyframe alone.

The released code, which only evaluates, differs from the paper, and its weights need the code. So
``faithful="official"`` is the code and the default; ``"paper"`` changes this, and nothing else:

* offsets of the deformable encoder are in cells of their own axis; the code divides x, y and t by the number of frames,
  columns and rows;
* levels are resized as images are; the code samples between corners that lie half a cell outside, where it is zero, and
  repeats the positions of the few frames of the encoder for the many of the decoder;
* the classifying layer is that of Figure 4 and equation 1, see ``ClassifyingLayer``;
* confidence is one sigmoid rather than a softmax of three, of which the first is never used;
* losses are means over queries and frames (equation 5). In the code those of classes are sums, in which people weigh
  ten times as much as background, and labels of AVA are smoothed.

Training code was never released. Where evaluation has it wrong, ours is right: all decoder layers have a loss of the
same weights, each predicted box is compared to the actor that it is matched to, weights stand at the frames that they
belong to, and clips without people give finite numbers. The gradient of the sampling is the true one.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.backbones import csn, vit
from vad_jax.backbones.csn import CSN
from vad_jax.backbones.vit import ViT
from vad_jax.batch import Array, Batch, Detections
from vad_jax.layers.class_decoder import Aggregation, Combination, Decoder
from vad_jax.layers.deformable import Encoder
from vad_jax.layers.detr import EncoderLayer
from vad_jax.layers.from_scratch import dense_head
from vad_jax.layers.position import corner_matrix, linear_matrix, volume_positions
from vad_jax.layers.pyramid import MapPyramid, TokenPyramid
from vad_jax.models._options import check_options
from vad_jax.ops import losses
from vad_jax.ops.boxes import cxcywh_to_xyxy, generalized_iou, xyxy_to_cxcywh
from vad_jax.ops.pixels import normalize

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WORKING = 2  # level whose grid the decoder sees
_EPSILON = 1e-5
_MOST_CELLS = 2**24  # numbers in the maps of all people that a device holds at a time, 64 MiB in float32


class Variant(NamedTuple):
  """Sizes.

  Attributes:
    network: of the backbone.
    backbone: its arguments.
    dim: ``D``.
    heads: of all attentions.
    hidden: channels inside feed-forward parts.
    encoder_layers, decoder_layers: how many.
    points: samples that the encoder takes for each cell, head and level.
    from_scratch: see ``vad_jax.layers.from_scratch``.
  """

  network: type[ViT] | type[CSN]
  backbone: Mapping[str, Any]
  dim: int = 256
  heads: int = 8
  hidden: int = 2048
  encoder_layers: int = 6
  decoder_layers: int = 6
  points: int = 8
  from_scratch: bool = False


_TINY = (64, 4, 128, 1, 2, 2, True)
VARIANTS = {
  "vitb": Variant(ViT, {"width": 768, "depth": 12, "heads": 12}),
  "csn152": Variant(CSN, csn.VARIANTS["csn152"]),
  "csn50": Variant(CSN, csn.VARIANTS["csn50"]),
  "tiny": Variant(ViT, {"width": 128, "depth": 4, "heads": 4, "stem": "convolution"}, *_TINY),
  "tiny_csn": Variant(CSN, csn.VARIANTS["tiny"], *_TINY),
}


class Weights(NamedTuple):
  """What terms of matching cost and loss weigh, as published for keyframes (AVA) and for tubes (UCF101-24, JHMDB).

  Attributes:
    cost: of the confidence, in matching.
    classes, confidence: of the losses; those of L1 and GIoU weigh 5 and 2, in matching, too.
    background: of queries without an actor in the loss of the confidence.
    smoothing: of labels.
  """

  cost: float
  classes: float
  confidence: float
  background: float
  smoothing: float


_KEYFRAMES = Weights(cost=12, classes=10, confidence=1, background=0.1, smoothing=0.1)
_TUBES = Weights(cost=4, classes=4, confidence=3, background=0.5, smoothing=0)
_L1, _GIOU = 5.0, 2.0
_ACTOR_WEIGHT = 10.0  # of queries with an actor in the loss of classes


class ClassQuery(nnx.Module):
  """The detector; see the module's docstring. Parameters live in backbone, pyramid, encoder and decoder.

  Attributes:
    transformer_parameters: what the second stage of the training takes from the first, by a regular expression.
  """

  transformer_parameters = r"level_embed|(plain_)?encoder\..*|decoder\.(?!confidence).*"

  def __init__(
    self,
    *,
    num_classes: int = 80,
    variant: str = "vitb",
    tubes: bool = False,
    num_frames: int = 16,
    num_queries: int = 15,
    layers: int | None = None,
    faithful: Literal["official", "paper"] = "official",
    encoder: Literal["deformable", "transformer"] = "deformable",
    decoder: Literal["ldl_cdl", "ldl", "detr"] = "ldl_cdl",
    aggregation: Aggregation = "actor",
    positional_queries: bool = True,
    combination: Combination = "sum",
    last_stride: bool = False,
    class_weight: float | None = None,
    empty_frames: bool = True,
    auxiliary: bool = True,
    norm: Literal["frozen", "batch"] = "frozen",
    drop_path: float = 0.2,
    dropout: float = 0.1,
    remat: bool = False,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      num_classes: ``K``.
      variant: one of ``VARIANTS``.
      tubes: answer for every frame, rather than for the keyframe.
      num_frames: ``T``, of a clip; queries of tubes have a box of their own in each.
      num_queries: ``N``.
      layers: of the encoder, and of the decoder; None takes the variant's (published: 6 for AVA, 3 for tubes).
      faithful: to the released code, or to the paper; see the module's docstring.
      encoder: "transformer" is that of DETR on the working grid alone (Table 1).
      decoder: without classifying layers classes come of people by a linear layer; "detr" is the plain one (Table 1).
      aggregation: of levels (Table 2).
      positional_queries: class queries know where their actor is (Table 3).
      combination: of actor and context (Table 4).
      last_stride: CSN halves its last map in space, too.
      class_weight: of the loss of classes; None takes 10 for keyframes and 4 for tubes.
      empty_frames: frames without people count in the loss of classes of tubes. False is for sets where these only fill
        up clips (JHMDB).
      auxiliary: all decoder layers have a loss.
      norm: of CSN: "frozen" keeps published statistics, "batch" trains from scratch.
      drop_path: of ViT.
      dropout: of encoder and decoder; 0 switches off that of what is known of classes (0.5), too.
      remat: recompute blocks and frames in the backward pass instead of storing their activations.
      dtype: computation type, "float32" or "bfloat16"; parameters, coordinates and losses stay float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an option has a value that does not exist.
    """
    check_options(
      variant=(variant, VARIANTS),
      faithful=(faithful, ("official", "paper")),
      encoder=(encoder, ("deformable", "transformer")),
      decoder=(decoder, ("ldl_cdl", "ldl", "detr")),
      aggregation=(aggregation, ("actor", "weighted_sum", "mean")),
      combination=(combination, ("sum", "concat", "cross_attention", "self_attention")),
      dtype=(dtype, ("float32", "bfloat16")),
    )
    sizes = VARIANTS[variant]
    if layers is not None:
      sizes = sizes._replace(encoder_layers=layers, decoder_layers=layers)
    self.tubes, self.published, self.remat = tubes, faithful == "paper", remat
    self.empty_frames, self.auxiliary, self.from_scratch = empty_frames, auxiliary, sizes.from_scratch
    self.weights = _TUBES if tubes else _KEYFRAMES
    if class_weight is not None:
      self.weights = self.weights._replace(classes=class_weight)
    self.class_parameters = r"decoder\.class_queries" if decoder == "ldl_cdl" else r"decoder\.classifier\..*"
    self.compute_dtype = compute = jnp.bfloat16 if dtype == "bfloat16" else None
    options: dict[str, Any] = {"dtype": compute, "rngs": rngs}
    if sizes.network is ViT:
      self.backbone = ViT(**sizes.backbone, drop_path=drop_path, remat=remat, **options)
      self.pyramid = TokenPyramid(self.backbone.width, sizes.dim, **options)
    else:
      self.backbone = CSN(**sizes.backbone, last_stride=last_stride, norm=norm, remat=remat, **options)
      self.pyramid = MapPyramid(self.backbone.widths, sizes.dim, **options)
    self.level_embed = nnx.Param(jax.random.normal(rngs.params(), (4, sizes.dim)))
    shape = (sizes.dim, sizes.heads, sizes.hidden)
    parts: dict[str, Any] = {"dropout": dropout, **options}
    deformable = encoder == "deformable"
    self.encoded_levels = (0, 1, 2, 3) if deformable else (_WORKING,)
    sampling = {"points": sizes.points, "normalizer": faithful, "remat": remat}
    self.encoder = Encoder(*shape, sizes.encoder_layers, **sampling, **parts) if deformable else None
    plain = 0 if deformable else sizes.encoder_layers
    self.plain_encoder = nnx.List([EncoderLayer(*shape, **parts) for _ in range(plain)])
    self.decoder = Decoder(
      *shape,
      sizes.decoder_layers,
      levels=len(self.encoded_levels),
      kind=decoder,
      num_classes=num_classes,
      num_queries=num_queries,
      num_anchors=num_queries * (num_frames if tubes else 1),
      published=self.published,
      aggregation=aggregation,
      positional=positional_queries,
      combination=combination,
      **parts,
    )
    if sizes.from_scratch:
      cells = volume_positions(jnp.ones((1, 16, 16), bool), 1, sizes.dim)[0, 0] + self.level_embed[...][_WORKING]
      self.decoder.start_from_scratch(cells, rngs)
      self.dense = dense_head(sizes.dim, num_classes, rngs)

  def __call__(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> dict[str, Any]:
    """Runs the network.

    Args:
      batch: uses ``video`` and ``video_size``.
      rngs: streams ``dropout`` and ``drop_path``; needed in training.

    Returns:
      Of ``F`` frames, 1 for keyframes, all that ``Decoder`` returns, with axes ``B, F`` in place of its rows (in
      ``layers`` ``F, B``); ``features`` of the backbone; ``levels``, four maps ``[B, t, h, w, D]`` before the encoder,
      their ``positions``, and ``encoded``, the frames of them that the decoder needs; ``memory`` ``[F, L, B, S, D]``
      and ``memory_positions`` ``[F, B, S, D]``, what it sees.

    Raises:
      ValueError: tubes are asked of a clip of another length than the network was built for.
    """
    size = jnp.maximum(jnp.asarray(batch["video_size"]), 1)  # rows that fill up a batch may have none
    video, _ = normalize(batch["video"], size, mean=_MEAN, std=_STD, dtype=self.compute_dtype)
    if isinstance(self.backbone, ViT):  # what does not fill a patch of the frame is not seen
      h, w = (side // patch * patch for side, patch in zip(video.shape[2:4], self.backbone.patch[1:], strict=True))
      features = self.backbone(video[:, :, :h, :w], rngs)
    else:
      features = self.backbone(video)
    levels = self.pyramid(features)
    masks = [level_mask(size, video.shape[2:4], level.shape[2:4]) for level in levels]
    return {"features": features, "levels": levels, **self.detect(levels, masks, video.shape[1], rngs)}

  def detect(
    self, levels: list[Array], masks: list[Array], frames: int, rngs: nnx.Rngs | None = None
  ) -> dict[str, Any]:
    """The network behind the pyramid.

    Args:
      levels: four maps ``[B, t, h, w, D]``.
      masks: ``[B, h, w]`` bool of each, False for padding.
      frames: ``T``, of the clip.
      rngs: as above.
    """
    embeds = self.level_embed[...]
    positions = [
      volume_positions(mask, level.shape[1], level.shape[-1]) + embed
      for mask, level, embed in zip(masks, levels, embeds, strict=True)
    ]
    chosen = np.arange(frames) if self.tubes else np.array([frames // 2])
    over_time = [self._resize(levels[index].shape[1], frames)[chosen] for index in self.encoded_levels]
    seen = [np.flatnonzero(matrix.any(0)).tolist() for matrix in over_time]
    encoded = self._encode(levels, positions, masks, seen, rngs)
    memory = self._memory(encoded, [matrix[:, index] for matrix, index in zip(over_time, seen, strict=True)])

    working, mask = positions[_WORKING], masks[_WORKING]
    place = working[:, np.arange(frames) % working.shape[1]]
    if self.published:
      place = volume_positions(mask, frames, working.shape[-1]) + embeds[_WORKING]
    place = jnp.moveaxis(place[:, chosen], 1, 0).reshape(len(chosen), len(mask), -1, place.shape[-1])
    out = self._decode(memory, place, mask, rngs)
    if self.from_scratch:
      cells = memory[:, self.encoded_levels.index(_WORKING)].swapaxes(0, 1)
      out["dense"] = self.dense(cells.reshape(*cells.shape[:2], *mask.shape[1:], -1))
      out["visible"] = jnp.stack([mask[:, 0].sum(1), mask[:, :, 0].sum(1)], -1)  # columns and rows
    return {**out, "positions": positions, "encoded": encoded, "memory": memory, "memory_positions": place}

  def _resize(self, old: int, new: int) -> np.ndarray:
    """Matrix ``[new, old]`` that makes an axis of the working grid of one of a level."""
    return (linear_matrix if self.published else corner_matrix)(old, new)

  def _encode(
    self, levels: list[Array], positions: list[Array], masks: list[Array], seen: list[list[int]], rngs: nnx.Rngs | None
  ) -> list[Array]:
    """What the decoder sees of the levels: of each, frames with these numbers."""
    if self.encoder is not None:
      return self.encoder(levels, positions, masks, rngs, seen)
    x, mask = levels[_WORKING], masks[_WORKING]
    flat = lambda values: values.reshape(len(x), -1, *values.shape[4:])  # noqa: E731
    tokens, place = flat(x), flat(positions[_WORKING]).astype(x.dtype)
    inside = flat(jnp.broadcast_to(mask[:, None], x.shape[:4]))
    for layer in self.plain_encoder:
      tokens = layer(tokens, place, inside, rngs)
    return [tokens.reshape(x.shape)[:, seen[0]]]

  def _memory(self, encoded: list[Array], over_time: list[np.ndarray]) -> Array:
    """Levels ``[F, L, B, S, D]`` on the working grid, given matrices that make their frames those to be decoded."""
    working = encoded[self.encoded_levels.index(_WORKING)].shape[2:4]
    memory = []
    for level, frames in zip(encoded, over_time, strict=True):
      over_space = (self._resize(old, new) for old, new in zip(level.shape[2:4], working, strict=True))
      matrices = (jnp.asarray(matrix, level.dtype) for matrix in (frames, *over_space))
      level = jnp.einsum("ft,yh,xw,bthwd->fbyxd", *matrices, level)
      memory.append(level.reshape(*level.shape[:2], -1, level.shape[-1]))
    return jnp.stack(memory, 1)

  def _decode(self, memory: Array, positions: Array, mask: Array, rngs: nnx.Rngs | None) -> dict[str, Any]:
    """All frames, or one after the other where they are many, since each has maps of its own for every person."""
    anchors = self.decoder.anchors[...].reshape(self.decoder.num_queries, -1, 4).swapaxes(0, 1)
    if len(anchors) != len(memory):
      raise ValueError(f"a clip of {len(memory)} frames: the network was built for num_frames={len(anchors)}")
    keys = None if rngs is None else jax.random.split(rngs.dropout(), len(memory))
    grid = mask.shape[1:]

    def decode(frame: tuple[Array, Array, Array, Array | None]) -> dict[str, Any]:
      levels, place, boxes, key = frame
      return self.decoder(
        levels,
        anchors=boxes,
        positions=place.astype(levels.dtype),
        mask=mask.reshape(len(mask), -1),
        grid=grid,
        rngs=None if key is None else nnx.Rngs(dropout=key),
      )

    decode = jax.checkpoint(decode) if self.remat else decode
    cells = memory[:, 0].size * self.decoder.num_queries // max(jax.sharding.get_abstract_mesh().size, 1)
    every = jax.vmap(decode) if cells <= _MOST_CELLS else functools.partial(jax.lax.map, decode)
    out = every((memory, positions, anchors, keys))
    layers = out.pop("layers")
    return {**{name: jnp.moveaxis(values, 0, 2) for name, values in out.items()}, "layers": layers}

  def costs(self, out: dict[str, Any], batch: Batch) -> Array:
    """Matching costs ``[layers, B, N, M]``, of tubes ``[layers, B, T, N, M]``: L1, GIoU and confidence."""
    l1, giou = self._distances(out["boxes"], batch["boxes"])
    costs = _L1 * l1 - _GIOU * giou - self.weights.cost * self._confidence(out)[..., None]
    return costs if self.tubes else costs[:, :, 0]

  def _distances(self, predicted: Array, targets: Array) -> tuple[Array, Array]:
    """L1 of centre and size, and GIoU, ``[layers, B, F, N, M]``."""
    targets = jnp.asarray(targets) if self.tubes else jnp.asarray(targets)[:, None]
    a, b = predicted[..., :, None, :], targets[..., None, :, :]
    return jnp.abs(a - xyxy_to_cxcywh(b)).sum(-1), generalized_iou(cxcywh_to_xyxy(a), b)

  def _confidence(self, out: dict[str, Any]) -> Array:
    """Probability ``[layers, B, F, N]`` of an actor."""
    logits = out["confidence_logits"]
    return jax.nn.sigmoid(logits[..., 0]) if self.published else jax.nn.softmax(logits)[..., 1]

  def _action_score(self, out: dict[str, Any]) -> Array:
    """Probability ``[layers, B, F, N, K]`` of each action; in tubes, of an actor who does it."""
    action = jax.nn.sigmoid(out["action_logits"])
    return jnp.clip(self._confidence(out)[..., None] * action, _EPSILON, 1 - _EPSILON) if self.tubes else action

  def loss(self, out: dict[str, Any], batch: Batch, match: Array) -> tuple[Array, dict[str, Array]]:
    """Losses of every decoder layer.

    Args:
      out: what the network returned.
      batch: uses ``boxes``, ``labels``, ``box_mask`` and ``key`` (rows of key -1 do not count).
      match: of the shape of ``costs``, which query is which actor.

    Returns:
      Scalar, and its weighted terms by name; ``_i`` marks those of earlier layers.
    """
    boxes, labels, mask = (jnp.asarray(batch[name]) for name in ("boxes", "labels", "box_mask"))
    if not self.tubes:
      boxes, labels, mask, match = boxes[:, None], labels[:, None], mask[:, None], match[:, :, None]
    real = (jnp.asarray(batch["key"]) >= 0)[:, None, None]  # [B, 1, 1]
    mask = mask & real
    # What stands in padded slots must not even reach the arithmetic: NaN times zero is NaN in the gradient.
    boxes, labels = jnp.where(mask[..., None], boxes, 0), jnp.where(mask[..., None], labels, 0)
    match = match & mask[..., None, :]
    matched = match.any(-1)  # [layers, B, F, N]
    queries = jnp.broadcast_to(real, matched.shape[1:])
    l1, giou = self._distances(out["boxes"], boxes if self.tubes else boxes[:, 0])
    everyone = jnp.maximum(queries.sum(), 1)
    actors = everyone if self.published else jnp.maximum(mask.sum(), 1)

    weight = jnp.where(matched, 1.0, 1.0 if self.published else self.weights.background) * queries
    entropy = self._confidence_entropy(out["confidence_logits"], matched)
    weight_sum = everyone if self.published else jnp.maximum(weight.sum((1, 2, 3)), _EPSILON)
    of_layer = {
      "loss_confidence": self.weights.confidence * losses.masked_sum(weight * entropy, queries, (1, 2, 3)) / weight_sum,
      "loss_box": _L1 * losses.masked_sum(l1, match, (1, 2, 3, 4)) / actors,
      "loss_giou": _GIOU * losses.masked_sum(1 - giou, match, (1, 2, 3, 4)) / actors,
      "loss_action": self.weights.classes * self._class_loss(out, match, matched, labels, mask, queries),
    }
    last = len(matched) - 1
    terms = {
      name if layer == last else f"{name}_{layer}": values[layer]
      for name, values in of_layer.items()
      for layer in range(0 if self.auxiliary else last, last + 1)
    }
    if self.from_scratch:
      cells = boxes * jnp.tile(out["visible"], 2)[:, None, None]
      flat = (x.reshape(-1, *x.shape[2:]) for x in (out["dense"], cells, labels, mask))
      terms["loss_dense"] = losses.dense_detection_loss(*flat, stride=1)
    return jnp.asarray(sum(terms.values())), terms

  def _confidence_entropy(self, logits: Array, matched: Array) -> Array:
    """Cross-entropy ``[layers, B, F, N]``; the code's classes are unused, actor, nobody."""
    if self.published:
      return losses.binary_cross_entropy(logits[..., 0], matched.astype(logits.dtype))
    log_probability = jax.nn.log_softmax(logits)
    return -jnp.where(matched, log_probability[..., 1], log_probability[..., 2])

  def _class_loss(
    self, out: dict[str, Any], match: Array, matched: Array, labels: Array, mask: Array, queries: Array
  ) -> Array:
    """Focal loss ``[layers]`` of classes."""
    wanted = jnp.einsum("lbfnm,bfmk->lbfnk", match.astype(labels.dtype), labels)
    logits = out["action_logits"]
    if self.tubes:
      score = self._action_score(out)
      logits = jnp.log(score) - jnp.log1p(-score)
    if self.published:
      focal = losses.focal_loss(logits, wanted).mean(-1)
      return losses.masked_sum(focal, queries, (1, 2, 3)) / jnp.maximum(queries.sum(), 1)
    smoothing = self.weights.smoothing
    focal = losses.focal_loss(logits, wanted * (1 - smoothing) + smoothing / 2).mean(-1)
    of_frame = losses.masked_sum(focal * jnp.where(matched, _ACTOR_WEIGHT, 1), queries, 3)  # [layers, B, F]
    counted = jnp.ones(mask.shape[:2], bool) if self.empty_frames else mask.any(-1)
    return (losses.masked_sum(of_frame, counted, 2) / jnp.maximum(counted.sum(1), 1)).sum(1)

  def detections(self, out: dict[str, Any], batch: Batch) -> Detections:
    """All queries, of keyframes ``[B, N]`` or of tubes ``[B, T, N]``.

    Scores of actions are final: those of tubes contain the actor's, those of keyframes do not.
    """
    boxes = jnp.clip(cxcywh_to_xyxy(out["boxes"][-1]), 0, 1)
    actor, action = self._confidence(out)[-1], self._action_score(out)[-1]
    real = jnp.broadcast_to(jnp.asarray(batch["key"])[:, None] >= 0, (boxes.shape[0], boxes.shape[2]))
    if not self.tubes:
      boxes, actor, action = boxes[:, 0], actor[:, 0], action[:, 0]
    return Detections(boxes, actor, action, real)

  def maps(self, out: dict[str, Any], batch: Batch) -> dict[str, Array]:
    """Where each person was looked at for each class in the keyframe, by the last layer (Figures 2, 6 and 7).

    Without classifying layers there is nothing to see.
    """
    if self.decoder.class_queries is None:
      return {}
    attention = out["layers"][-1]["classifying"]["attention"]
    frame = len(attention) // 2  # the only one of keyframes
    return {"attention": attention[frame].reshape(*attention.shape[1:4], *out["positions"][_WORKING].shape[2:4])}


# --- Small things ---------------------------------------------------------------------------------------------------


def level_mask(size: Array, canvas: Sequence[int], grid: Sequence[int]) -> Array:
  """Which cells ``[B, h, w]`` of a level are not of padding, as nearest-neighbour resizing of pixels tells.

  Args:
    size: ``[B, 2]`` height and width of the frames without padding.
    canvas: height and width with padding.
    grid: height and width of the level.
  """
  sides = enumerate(zip(canvas, grid, strict=True))
  y, x = (np.arange(new) * old // new < size[:, axis, None] for axis, (old, new) in sides)
  return y[:, :, None] & x[:, None]


# --- Published weights ----------------------------------------------------------------------------------------------

_LAYER, _CLASS_LAYER = r"transformer.decoder.layers.\1.", r"transformer.decoder.cls_layers.\1."
# What stands where in the code's sequences of each level: enlargements, norm between, lateral, norm, output.
_PYRAMID = {
  "0": {"enlarge.0": 0, "enlarged_norm": 1, "enlarge.1": 3, "lateral": 4, "norm": 5, "output": 6},
  "1": {"enlarge.0": 0, "lateral": 1, "norm": 2, "output": 3},
  "2": {"lateral": 0, "norm": 1, "output": 2},
  "3": {"lateral": 1, "norm": 2, "output": 3},
}


def _in_backbone(name: Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
  return lambda path: f"backbone.0.body.{name(path)}"


# (our path, published name), see vad_jax.convert.
REFERENCE_NAMES = (
  *((rf"backbone\.{ours}", rf"backbone.0.body.{theirs}") for ours, theirs in vit.REFERENCE_NAMES),
  *((rf"backbone\.{ours}", _in_backbone(theirs)) for ours, theirs in csn.REFERENCE_NAMES),
  (
    r"pyramid\.levels\.(\d)\.(enlarge\.\d|[a-z]+(?:_norm)?)\.(.*)",
    lambda path: f"backbone.0.lateral_convs.{path[1]}.{_PYRAMID[path[1]][path[2]]}.{path[3]}",
  ),
  (r"pyramid\.lateral\.(\d)\.(.*)", r"input_proj.\1.0.\2"),
  (r"pyramid\.halve\.(.*)", r"input_proj.3.0.\1"),
  (r"pyramid\.norms\.(\d)\.(.*)", r"input_proj.\1.1.\2"),
  (r"level_embed", r"transformer.level_embed"),
  (r"encoder\.(.*)", r"transformer.encoder.\1"),
  (r"decoder\.anchors", r"refpoint_embed.weight"),
  (r"decoder\.class_queries", r"transformer.decoder.class_queries.weight"),
  (r"decoder\.confidence\.(.*)", r"class_embed_b.\1"),
  (r"decoder\.box\.(.*)", r"bbox_embed.\1"),
  (r"decoder\.layers\.(\d+)\.([sc]a_\w+)\.(.*)", _LAYER + r"\2_proj.\3"),
  (r"decoder\.layers\.(\d+)\.(self|cross)_out\.(.*)", _LAYER + r"\2_attn.out_proj.\3"),
  (r"decoder\.layers\.(\d+)\.level\.(.*)", _LAYER + r"lvl_w_embed.\2"),
  (r"decoder\.layers\.(\d+)\.context_norm\.(.*)", _LAYER + r"norm_.\2"),
  (r"decoder\.layers\.(\d+)\.mlp\.fc(\d\..*)", _LAYER + r"linear\2"),
  (r"decoder\.layers\.(\d+)\.(norm\d\..*)", _LAYER + r"\2"),
  (r"decoder\.class_layers\.(\d+)\.(self|cross)_out\.(.*)", _CLASS_LAYER + r"\2_attn.out_proj.\3"),
  (r"decoder\.class_layers\.(\d+)\.place\.(.*)", _CLASS_LAYER + r"cls_qpos_sine_proj.\2"),
  (r"decoder\.class_layers\.(\d+)\.actor_mlp\.fc(\d)\.(.*)", _CLASS_LAYER + r"cls_linear\2.\3"),
  (r"decoder\.class_layers\.(\d+)\.actor_norm\.(.*)", _CLASS_LAYER + r"cls_norm.\2"),
  (r"decoder\.class_layers\.(\d+)\.map_norm\.(.*)", _CLASS_LAYER + r"conv_norm.\2"),
  (r"decoder\.class_layers\.(\d+)\.blocks\.0\.norm\.(.*)", _CLASS_LAYER + r"conv_blocks.2.norm.\2"),
  (r"decoder\.class_layers\.(\d+)\.blocks\.0\.conv\.(.*)", _CLASS_LAYER + r"conv_blocks.2.conv1.\2"),
  (
    r"decoder\.class_layers\.(\d+)\.blocks\.0\.fc(\d)\.(.*)",
    lambda path: f"transformer.decoder.cls_layers.{path[1]}.conv_blocks.2.conv{int(path[2]) + 1}.{path[3]}",
  ),
  (r"decoder\.class_layers\.(\d+)\.mlp\.fc(\d)\.(.*)", _CLASS_LAYER + r"cls_linear\2_.\3"),
  (r"decoder\.class_layers\.(\d+)\.norm2\.(.*)", _CLASS_LAYER + r"cls_norm_.\2"),
  (r"decoder\.class_layers\.(\d+)\.((?:norm1|[qkv]_proj)\..*)", _CLASS_LAYER + r"\2"),
  (r"decoder\.position\.(.*)", r"transformer.decoder.ref_point_head.\1"),
  (r"decoder\.scale\.(.*)", r"transformer.decoder.query_scale.\1"),
  (r"decoder\.size\.(.*)", r"transformer.decoder.ref_anchor_head.\1"),
  (r"decoder\.class_norm\.(.*)", r"transformer.decoder.cls_norm2.\1"),
  (r"decoder\.unused_norm\.(.*)", r"transformer.decoder.cls_norm.\1"),
  (r"decoder\.norm\.(.*)", r"transformer.decoder.norm.\1"),
)

# Released networks of tubes, by the number of their classes: JHMDB51-21 and UCF101-24.
_RELEASED_TUBES = {
  21: {"num_frames": 40, "num_queries": 5, "empty_frames": False},
  24: {"num_frames": 32, "num_queries": 15},
}


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for released weights, from the shapes of their tensors.

  Raises:
    ValueError: no variant has these sizes.
  """
  count = lambda pattern: len({match[1] for name in shapes if (match := re.match(pattern, name))})  # noqa: E731
  width = shapes.get("backbone.0.body.patch_embed.proj.weight", [0])[0]
  depths = tuple(count(rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
  dim = shapes["transformer.level_embed"][1]
  fitting = [
    name
    for name, (_, backbone, *sizes) in VARIANTS.items()
    if (backbone.get("width"), sizes[0]) == (width, dim) or backbone.get("depths") == depths
  ]
  if not fitting:
    raise ValueError(
      f"no variant of class_query has a ViT of width {width}, or a CSN of {depths} blocks, and {dim} channels"
    )
  num_classes = shapes["transformer.decoder.class_queries.weight"][0]
  boxes = shapes["refpoint_embed.weight"][0]
  layers = count(r"transformer\.decoder\.layers\.(\d+)\.")
  tubes = _RELEASED_TUBES.get(num_classes, {})
  if tubes and boxes != tubes["num_frames"] * tubes["num_queries"]:
    tubes = {}
  return {
    "variant": fitting[0],
    "num_classes": num_classes,
    "layers": layers,
    **({"tubes": True, **tubes} if tubes else {"num_queries": boxes}),
  }


def reference_info(arguments: Mapping[str, Any]) -> dict[str, Any]:
  """What inference has to know of released weights: clips and frames that they were trained with."""
  frames, stride = (arguments["num_frames"], 1) if arguments.get("tubes") else (16, 4)
  if arguments["variant"].startswith("csn"):
    frames, stride = 32, 2
  short_side = 224 if arguments["num_classes"] == 24 else 256
  clip = {"num_frames": frames, "frame_stride": stride, "fps": 25.0 if arguments.get("tubes") else 30.0}
  return {"clip": clip, "canvas": (short_side, 2 * short_side), "short_side": short_side}
