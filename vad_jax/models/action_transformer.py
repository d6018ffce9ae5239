"""Video Action Transformer: each person asks the whole clip what it is doing.

Paper: Girdhar et al., "Video Action Transformer Network", CVPR 2019 (Figures 2 and 3).

    video [B, T, H, W, 3] -> I3D to Mixed_4f -> features [B, t, h, w, C]
      centre slice -> region proposal network -> proposals [B, N, 4]
    heads, one or both:
      Tx:  region of the centre slice -> query [B, N, D], attends to all cells of the clip, 3 layers of 2 units
      I3D: region of every slice -> Mixed_5a to Mixed_5c -> mean over time and space
    box [B, N, 4] refined, background and actions [B, N, 1 + K]

The Tx head classifies better, the I3D head places boxes better; ``tx_i3d`` takes the best of both (Table 3).

The code, on top of TensorFlow's object detection API, was never published. What the paper leaves open is as in that
API, and else decided here:

* Proposal network, anchors, targets, choice of examples, losses and their weights are the API's. As there, ground
  truth does not join the proposals in training.
* The widths that are not printed are chosen so that Table 1's numbers of parameters come out: embeddings of place and
  time of 128 each, HighRes regions of 384 channels, feed-forward parts of 256, a preprocessor and projections of its
  own for each unit. The proposal network does not see the embedding of places; the I3D head has none.
* Attention passes over cells in the padding of the frame, and anchors there propose nothing. Neither do anchors larger
  than the frame: training passes over anchors that leave it, so what the network says of these would be noise.
* The API drops duplicates class by class. Here a person is one box with all its actions, so they are dropped by the
  score of the actor, which is 1 - the probability of background. At most 100 are left.
* Class-specific boxes (Table 5): all regressors of the actor's actions learn, and that of its likeliest action counts.
* With ground-truth boxes (section 4.2) these are the proposals, in the order of the batch, and the detections. All else
  is trained as ever. Where there are none, as in prediction, proposals take their place, with the score that the
  proposal network gives them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vad_jax.backbones.i3d import I3D, TRUNK_END, I3DHead, Norm
from vad_jax.batch import Array, Batch, Detections
from vad_jax.models._options import check_options
from vad_jax.ops import losses
from vad_jax.ops.anchors import anchor_boxes
from vad_jax.ops.boxes import apply_deltas, box_deltas
from vad_jax.ops.nms import batched_nms
from vad_jax.ops.pixels import normalize
from vad_jax.ops.proposals import assign, choose_balanced
from vad_jax.ops.roi_align import roi_pool


class Variant(NamedTuple):
  """Sizes of the network.

  Attributes:
    width: factor of I3D's channels.
    anchor: side of the anchor of scale 1, in pixels.
    rpn: channels of the proposal network.
    place: channels that say where and when a cell is, half each.
    dim: ``D``, channels of queries, keys and values.
    hidden: channels inside a feed-forward part.
    reduced: channels of a HighRes region, of which all 7 x 7 cells are kept.
  """

  width: float = 1.0
  anchor: float = 256.0
  rpn: int = 512
  place: int = 256
  dim: int = 128
  hidden: int = 256
  reduced: int = 384


VARIANTS = {
  "i3d": Variant(),
  "tiny": Variant(width=0.25, anchor=48.0, rpn=64, place=32, dim=32, hidden=64, reduced=16),
}
_LAYERS, _UNITS = 3, 2  # units beside each other in a layer are what others call heads
_STRIDE = 16  # pixels per cell of Mixed_4f
_CODER = (10.0, 10.0, 5.0, 5.0)  # weights of what networks predict of boxes
_REGIONS_AT_ONCE = 64  # in the I3D head, to bound its memory


class ActionTransformer(nnx.Module):
  """The detector; see the module's docstring.

  Parameters live in backbone, rpn, tx and i3d_head (or one of them), action and box.
  """

  def __init__(
    self,
    *,
    num_classes: int = 80,
    variant: str = "i3d",
    head: Literal["tx", "i3d", "tx_i3d"] = "tx",
    query: Literal["high_res", "low_res"] = "high_res",
    boxes: Literal["rpn", "ground_truth"] = "rpn",
    proposals: int = 300,
    class_agnostic: bool = False,
    class_boxes: bool = False,
    norm: Norm = "frozen",
    dropout: float = 0.3,
    remat: bool = False,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      num_classes: ``K``.
      variant: one of ``VARIANTS``.
      head: ``tx_i3d`` takes actions from the Tx head and boxes from the I3D head.
      query: how the Tx head makes a query of a region: all of its cells, or their mean.
      boxes: ``ground_truth`` takes the annotated boxes as proposals (section 4.2).
      proposals: ``R``, how many are passed on at most.
      class_agnostic: all actions are one, to measure localisation alone (section 4.3); each gets its score.
      class_boxes: boxes are refined for each class (Table 5).
      norm: of I3D: ``frozen`` to fine-tune published weights, ``batch`` to train from scratch.
      dropout: of the Tx head.
      remat: recompute the trunk's endpoints in the backward pass instead of storing what is inside of them.
      dtype: computation type, "float32" or "bfloat16"; parameters, boxes and losses stay float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an option has a value that does not exist.
    """
    check_options(
      variant=(variant, VARIANTS),
      head=(head, ("tx", "i3d", "tx_i3d")),
      query=(query, ("high_res", "low_res")),
      boxes=(boxes, ("rpn", "ground_truth")),
      dtype=(dtype, ("float32", "bfloat16")),
    )
    if proposals < 1:
      raise ValueError(f"proposals {proposals}: at least one is needed")
    sizes = VARIANTS[variant]
    self.num_classes, self.boxes, self.proposals, self.anchor = num_classes, boxes, proposals, sizes.anchor
    self.class_agnostic = class_agnostic
    self.class_parameters = r"(action|box)\..*" if class_boxes else r"action\..*"
    self.compute_dtype = compute = jnp.bfloat16 if dtype == "bfloat16" else None
    trunk = {"norm": norm, "width": sizes.width, "dtype": compute, "rngs": rngs}
    self.backbone = I3D(final_endpoint=TRUNK_END, remat=remat, **trunk)
    channels = self.backbone.features
    self.rpn = ProposalNetwork(channels, sizes.rpn, dtype=compute, rngs=rngs)
    tx = functools.partial(TxHead, channels, sizes, high_res=query == "high_res", dropout=dropout)
    self.tx = tx(dtype=compute, rngs=rngs) if head != "i3d" else None
    self.i3d_head = I3DHead(**trunk) if head != "tx" else None
    widths = [_UNITS * sizes.dim] * (self.tx is not None)
    widths += [self.i3d_head.features] if self.i3d_head else []
    classes = 1 if class_agnostic else num_classes
    bias = lambda key, shape, dtype: jnp.full(shape, _RARE, dtype).at[0].set(-_RARE)  # noqa: E731
    linear = functools.partial(nnx.Linear, kernel_init=_SMALL, dtype=compute, rngs=rngs)
    self.action = linear(widths[0], 1 + classes, bias_init=bias)
    self.box = linear(widths[-1], 4 * classes if class_boxes else 4)

  def __call__(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> dict[str, Any]:
    """Runs the network.

    Args:
      batch: uses ``video`` and ``video_size``; in training, and for ground-truth boxes, ``boxes`` and ``box_mask``.
      rngs: given in training: stream ``dropout``, and ``proposals`` for the choice of examples to learn from; proposals
        are then those that were chosen.

    Returns:
      ``boxes`` and ``proposals`` ``[B, N, 4]`` xyxy in [0, 1] of the unpadded frame, ``proposal_mask`` ``[B, N]``
      (False where there is none), ``objectness`` ``[B, N]`` of the proposals, ``action_logits`` ``[B, N, 1 + K]``
      (background first), ``deltas`` ``[B, N, 4]`` or ``[B, N, K, 4]`` between proposals and boxes, ``anchors``
      ``[B, A, 4]`` as boxes are, their ``anchor_logits`` ``[B, A, 2]`` (background first), ``anchor_deltas``
      ``[B, A, 4]`` and ``anchor_priority`` ``[B, A]`` in training, ``cells`` ``[B, h, w]`` (False in the padding),
      ``features`` ``[B, t, h, w, C]``; of the last Tx layer ``attention`` ``[B, units, N, t, h, w]`` and ``keys``
      ``[B, units, t, h, w, D]``.
    """
    video, _ = normalize(batch["video"], batch["video_size"], mean=0.5, std=0.5, dtype=self.compute_dtype)
    size = jnp.maximum(jnp.asarray(batch["video_size"]), 1)  # rows that fill up a batch may have none
    features = self.backbone(video)
    count, _, h, w, _ = features.shape
    y, x = (jnp.arange(n) * _STRIDE < size[:, axis, None] for axis, n in enumerate((h, w)))
    cells = y[:, :, None] & x[:, None]
    out = {"features": features, "cells": cells, **self._propose(features, cells, size, rngs)}
    if self.boxes == "ground_truth" and "boxes" in batch:
      mask = jnp.asarray(batch["box_mask"])
      given = jnp.where(mask[..., None], batch["boxes"], jnp.array([0.0, 0.0, 1.0, 1.0]))
      out |= {"proposals": given, "proposal_mask": mask, "objectness": mask.astype(jnp.float32)}
    elif rngs is not None:
      out |= _choose(out, batch, rngs)

    # RoIPool's 0 and 1 are the first and last cell of the padded frame.
    regions = out["proposals"] * jnp.tile(size[:, None, ::-1] / jnp.array(video.shape[3:1:-1]), 2)
    described = []
    if self.tx is not None:
      found, out["attention"], out["keys"] = self.tx(features, regions, cells, rngs)
      described.append(found)
    if self.i3d_head is not None:
      described.append(self._tubes(features, regions))
    out["action_logits"] = _exact(self.action(described[0]))
    deltas = _exact(self.box(described[-1]))
    best = deltas
    if deltas.shape[-1] > 4:
      deltas = deltas.reshape(count, -1, deltas.shape[-1] // 4, 4)
      likeliest = out["action_logits"][..., 1:].argmax(-1)[..., None, None]
      best = jnp.take_along_axis(deltas, likeliest, 2)[:, :, 0]
    refined = jnp.clip(apply_deltas(out["proposals"], best, weights=_CODER), 0, 1)
    return {**out, "deltas": deltas, "boxes": refined}

  def _propose(self, features: Array, cells: Array, size: Array, rngs: nnx.Rngs | None) -> dict[str, Array]:
    """Anchors of the centre slice, what the proposal network says of them, and the proposals."""
    count, slices, h, w, _ = features.shape
    logits, deltas = self.rpn(features[:, slices // 2])
    # Boxes and overlaps do not care for the unit, so all is in [0, 1] of the frame at once.
    anchors = anchor_boxes((h, w), stride=_STRIDE, base=self.anchor) / jnp.tile(size[:, None, ::-1], 2)
    objectness = jax.nn.softmax(logits)[..., 1]
    boxes = jnp.clip(jax.lax.stop_gradient(apply_deltas(anchors, deltas, weights=_CODER)), 0, 1)
    fit = (anchors[..., 2:] - anchors[..., :2] <= 1).all(-1)
    fit &= jnp.repeat(cells.reshape(count, -1), anchors.shape[1] // (h * w), 1)
    kept, mask = batched_nms(
      boxes, jnp.where(fit, objectness, -jnp.inf), iou_threshold=_PROPOSAL_IOU, count=self.proposals
    )
    return {
      "anchors": anchors,
      "anchor_logits": logits,
      "anchor_deltas": deltas,
      "anchor_priority": jnp.zeros(fit.shape) if rngs is None else rngs.proposals.uniform(fit.shape),
      "proposals": _take(boxes, kept),
      "proposal_mask": mask,
      "objectness": jnp.where(mask, _take(objectness, kept), 0),
    }

  def _tubes(self, features: Array, regions: Array) -> Array:
    """The I3D head's features ``[B, N, C]`` of regions ``[B, N, 4]``, which are the same in every time slice."""
    head = self.i3d_head
    assert head is not None
    count, slices, h, w, channels = features.shape
    flat = jnp.moveaxis(features, 1, 3).reshape(count, h, w, -1)

    def describe(regions: Array) -> Array:
      pooled = roi_pool(flat, regions).reshape(-1, 7, 7, slices, channels)
      return head(jnp.moveaxis(pooled, 3, 1)).mean((1, 2, 3)).reshape(*regions.shape[:2], -1)

    turns = -(-regions.shape[1] // _REGIONS_AT_ONCE)
    if turns == 1:  # as in training, where statistics of the batch are of all of it
      return describe(regions)
    share = -(-regions.shape[1] // turns)
    padded = jnp.pad(regions, ((0, 0), (0, turns * share - regions.shape[1]), (0, 0)))
    found = jax.lax.map(describe, padded.reshape(count, turns, share, 4).swapaxes(0, 1))
    return found.swapaxes(0, 1).reshape(count, turns * share, -1)[:, : regions.shape[1]]

  def costs(self, out: dict[str, Any], batch: Batch) -> None:
    """Nothing is matched."""

  def loss(self, out: dict[str, Any], batch: Batch, match: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """Losses of both stages: means over the boxes that were chosen in a clip, then over clips.

    Args:
      out: what the network returned.
      batch: uses ``boxes``, ``labels``, ``box_mask`` and ``key`` (rows of key -1 do not count).
      match: None.

    Returns:
      Scalar, and its weighted terms by name.
    """
    real = jnp.asarray(batch["key"]) >= 0
    actors = jnp.asarray(batch["box_mask"]) & real[:, None]
    # What stands in padded slots must not even reach the arithmetic: NaN times zero is NaN in the gradient.
    targets = jnp.where(actors[..., None], batch["boxes"], 0)
    labels = jnp.where(actors[..., None], 1.0 if self.class_agnostic else batch["labels"], 0)  # [B, M, 1 or K]

    def mean(values: Array, counted: Array, chosen: Array) -> Array:
      of_clip = losses.masked_sum(values, counted, -1) / jnp.maximum(chosen.sum(-1), 1)
      return losses.masked_sum(of_clip, real) / jnp.maximum(real.sum(), 1)

    owner, actor, background = _anchor_targets(out["anchors"], targets, actors)
    chosen = choose_balanced(actor, background, out["anchor_priority"], **_FIRST_STAGE)
    distance = _distance(out["anchor_deltas"], out["anchors"], _take(targets, owner), actor)
    entropy = optax.softmax_cross_entropy_with_integer_labels(out["anchor_logits"], actor.astype(jnp.int32))
    terms = {
      "loss_rpn_box": _BOX * mean(distance, chosen & actor, chosen),
      "loss_rpn_actor": mean(entropy, chosen, chosen),
    }

    chosen = out["proposal_mask"]
    if self.boxes == "ground_truth":
      owner, actor = jnp.broadcast_to(jnp.arange(chosen.shape[1]), chosen.shape), chosen
    else:
      owner, actor, _ = _proposal_targets(out, targets, actors)
    wanted = jnp.where(actor[..., None], _take(labels, owner), 0)
    entropy = losses.binary_cross_entropy(
      out["action_logits"], jnp.concatenate([~actor[..., None], wanted], -1).astype(jnp.float32)
    )
    deltas, target = out["deltas"], _take(targets, owner)
    if deltas.ndim == 3:
      distance = _distance(deltas, out["proposals"], target, actor)
    else:  # the mean over the actor's actions
      each = _distance(deltas, out["proposals"][:, :, None], target[:, :, None], actor[..., None])
      distance = (each * wanted).sum(-1) / jnp.maximum(wanted.sum(-1), 1)
    terms |= {
      "loss_box": _BOX * mean(distance, chosen & actor, chosen),
      "loss_action": mean(entropy.sum(-1), chosen, chosen),
    }
    return jnp.asarray(sum(terms.values())), terms

  def detections(self, out: dict[str, Any], batch: Batch) -> Detections:
    """Refined boxes without duplicates, best actor first; or the given boxes as they are."""
    kept, valid = self._kept(out, batch)
    boxes = out["proposals"] if self._given(batch) else out["boxes"]
    action = jax.nn.sigmoid(out["action_logits"][..., 1:])
    action = jnp.broadcast_to(action, (*action.shape[:2], self.num_classes))
    return Detections(_take(boxes, kept), _take(self._actor_score(out), kept), _take(action, kept), valid)

  def maps(self, out: dict[str, Any], batch: Batch) -> dict[str, Array]:
    """Where the network sees people; what each detection attends to, at all times; kinds of cells in colours.

    Attention is that of the last Tx layer. Colours are the principal components of a unit's keys
    (Figure 4); both need the Tx head.
    """
    count, _, h, w, _ = out["features"].shape
    people = jax.nn.softmax(out["anchor_logits"])[..., 1].reshape(count, h, w, -1).max(-1)
    maps = {"person": jnp.where(out["cells"], people, 0)}
    if self.tx is None:
      return maps
    maps["attention"] = _take(out["attention"].mean(1).sum(2), self._kept(out, batch)[0])[:, :, None]
    for unit in range(_UNITS):
      maps[f"keys_{unit + 1}"] = principal_colors(out["keys"][:, unit], out["cells"])
    return maps

  def _given(self, batch: Batch) -> bool:
    """Whether the detections are the annotated boxes."""
    return self.boxes == "ground_truth" and "boxes" in batch

  def _kept(self, out: dict[str, Any], batch: Batch) -> tuple[Array, Array]:
    """Which regions ``[B, M]`` are the detections, and whether they are any."""
    valid = out["proposal_mask"] & (jnp.asarray(batch["key"])[:, None] >= 0)
    if self._given(batch):
      return jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape), valid
    score = jnp.where(valid, self._actor_score(out), -jnp.inf)
    count = min(_MOST_DETECTIONS, valid.shape[1])
    return batched_nms(out["boxes"], score, iou_threshold=_DETECTION_IOU, count=count)

  def _actor_score(self, out: dict[str, Array]) -> Array:
    """Probability ``[B, N]`` of an actor. Who saw nothing but ground truth in training cannot tell background."""
    return out["objectness"] if self.boxes == "ground_truth" else jax.nn.sigmoid(-out["action_logits"][..., 0])


# --- Parts of the network -------------------------------------------------------------------------------------------

_RARE = -math.log(99)  # logit of 1 %: what the network first thinks of every action
_SMALL = nnx.initializers.normal(0.01)


class ProposalNetwork(nnx.Module):
  """Says of every anchor of a map ``[B, h, w, C]`` whether it is a person, and where exactly."""

  def __init__(self, channels: int, width: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    anchors = anchor_boxes((1, 1)).shape[0]
    self.conv = nnx.Conv(channels, width, (3, 3), kernel_init=_SMALL, dtype=dtype, rngs=rngs)
    self.actor = nnx.Linear(width, 2 * anchors, kernel_init=_SMALL, dtype=dtype, rngs=rngs)
    self.box = nnx.Linear(width, 4 * anchors, kernel_init=_SMALL, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> tuple[Array, Array]:
    """Logits ``[B, h * w * anchors, 2]``, background first, and deltas ``[B, h * w * anchors, 4]``."""
    x = jax.nn.relu6(self.conv(x))
    return _exact(self.actor(x)).reshape(len(x), -1, 2), _exact(self.box(x)).reshape(len(x), -1, 4)


class TxHead(nnx.Module):
  """Layers of units that attend from regions to all of the clip (section 3.2)."""

  def __init__(
    self, channels: int, sizes: Variant, *, high_res: bool, dropout: float, dtype: jnp.dtype | None, rngs: nnx.Rngs
  ):
    self.place = Place(sizes.place, dtype=dtype, rngs=rngs)
    channels += sizes.place
    self.layers = nnx.List()
    for layer in range(_LAYERS):
      units = nnx.List()
      for _ in range(_UNITS):
        if layer:
          query = nnx.Linear(_UNITS * sizes.dim, sizes.dim, dtype=dtype, rngs=rngs)
        else:
          query = Preprocessor(channels, sizes.dim, reduced=high_res * sizes.reduced, dtype=dtype, rngs=rngs)
        units.append(TxUnit(query, channels, sizes.dim, sizes.hidden, dropout=dropout, dtype=dtype, rngs=rngs))
      self.layers.append(units)

  def __call__(
    self, features: Array, regions: Array, cells: Array, rngs: nnx.Rngs | None
  ) -> tuple[Array, Array, Array]:
    """Classifies regions by all of the clip.

    Args:
      features: ``[B, t, h, w, C]``.
      regions: ``[B, N, 4]`` as ``roi_pool`` takes them, of the centre slice.
      cells: ``[B, h, w]`` bool, False for cells that nobody may look at.
      rngs: see ``ActionTransformer``.

    Returns:
      Features of the regions ``[B, N, units * D]``; attention ``[B, units, N, t, h, w]`` and keys
      ``[B, units, t, h, w, D]`` of the last layer.
    """
    count, t, h, w, _ = features.shape
    place = self.place(t, h, w).astype(features.dtype)
    memory = jnp.concatenate([features, jnp.broadcast_to(place, (count, *place.shape))], -1)
    query = roi_pool(memory[:, t // 2], regions)
    memory = memory.reshape(count, t * h * w, -1)
    mask = jnp.tile(cells.reshape(count, -1), (1, t))
    attention = keys = ()
    for layer in self.layers:
      queries, attention, keys = zip(*(unit(query, memory, mask, rngs) for unit in layer), strict=True)
      query = jnp.concatenate(queries, -1)
    grid = (t, h, w)
    attention = jnp.stack(attention, 1).reshape(count, _UNITS, -1, *grid)
    return query, attention, jnp.stack(keys, 1).reshape(count, _UNITS, *grid, -1)


class TxUnit(nnx.Module):
  """Queries look for what they need in the clip's cells, then think about it."""

  def __init__(
    self,
    query: Callable[[Array], Array],
    channels: int,
    dim: int,
    hidden: int,
    *,
    dropout: float,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    self.query = query
    self.key, self.value = (nnx.Linear(channels, dim, dtype=dtype, rngs=rngs) for _ in range(2))
    self.norm1, self.norm2 = (nnx.LayerNorm(dim, dtype=dtype, rngs=rngs) for _ in range(2))
    self.mlp = _two_layers(dim, hidden, dim, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)

  def __call__(self, query: Array, memory: Array, mask: Array, rngs: nnx.Rngs | None) -> tuple[Array, Array, Array]:
    """Updates queries.

    Args:
      query: what the unit's own preprocessor or projection makes queries ``[B, N, D]`` of.
      memory: ``[B, cells, C]``.
      mask: ``[B, cells]`` bool, False for cells that nobody may look at.
      rngs: stream ``dropout``; needed in training.

    Returns:
      Queries ``[B, N, D]``, attention ``[B, N, cells]``, keys ``[B, cells, D]``.
    """
    query = self.query(query)
    keys, values = self.key(memory), self.value(memory)
    logits = _exact(jnp.einsum("bnd,bkd->bnk", query, keys)) * query.shape[-1] ** -0.5
    attention = jax.nn.softmax(jnp.where(mask[:, None], logits, jnp.finfo(logits.dtype).min))
    found = jnp.einsum("bnk,bkd->bnd", attention.astype(values.dtype), values)
    query = self.norm1(query + self.dropout(found, rngs=rngs))
    return self.norm2(query + self.dropout(self.mlp(query), rngs=rngs)), attention, keys


class Preprocessor(nnx.Module):
  """Regions ``[B, N, 7, 7, C]`` to queries ``[B, N, D]``: of their mean, or of ``reduced`` channels of each cell."""

  def __init__(self, channels: int, dim: int, *, reduced: int, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    self.reduce = nnx.Linear(channels, reduced, dtype=dtype, rngs=rngs) if reduced else None
    self.project = nnx.Linear(7 * 7 * reduced or channels, dim, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """See the class."""
    return self.project(self.reduce(x).reshape(*x.shape[:2], -1) if self.reduce else x.mean((2, 3)))


class Place(nnx.Module):
  """Embedding of where and when the cells of a clip are, seen from its centre; its ends are at -1 and 1."""

  def __init__(self, channels: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    half = channels // 2
    self.space = _two_layers(2, half, half, dtype=dtype, rngs=rngs)
    self.time = _two_layers(1, half, half, dtype=dtype, rngs=rngs)

  def __call__(self, t: int, h: int, w: int) -> Array:
    """``[t, h, w, channels]``."""
    z, y, x = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in (t, h, w))
    space = self.space(jnp.stack(jnp.meshgrid(y, x, indexing="ij"), -1))
    time = self.time(jnp.asarray(z)[:, None])[:, None, None]
    return jnp.concatenate([jnp.broadcast_to(part, (t, h, w, part.shape[-1])) for part in (space, time)], -1)


def _two_layers(channels: int, hidden: int, features: int, **options: Any) -> nnx.Sequential:
  return nnx.Sequential(nnx.Linear(channels, hidden, **options), jax.nn.relu, nnx.Linear(hidden, features, **options))


# --- Targets and losses ---------------------------------------------------------------------------------------------

_PROPOSAL_IOU, _DETECTION_IOU, _MOST_DETECTIONS = 0.7, 0.6, 100  # of non-maximum suppression
_BOX = 2.0  # weight of both losses of boxes; the others weigh 1
_FIRST_STAGE = {"count": 256, "positive_share": 0.5}  # examples of a clip
_SECOND_STAGE = {"count": 64, "positive_share": 0.25}


def _anchor_targets(anchors: Array, targets: Array, actors: Array) -> tuple[Array, Array, Array]:
  """Whose each anchor is; see ``assign``. Those that leave the frame are nobody's."""
  inside = ((anchors >= 0) & (anchors <= 1)).all(-1)
  return assign(anchors, inside, targets, actors, low=0.3, high=0.7, force=True)


def _proposal_targets(out: dict[str, Array], targets: Array, actors: Array) -> tuple[Array, Array, Array]:
  """Whose each proposal is; see ``assign``."""
  return assign(out["proposals"], out["proposal_mask"], targets, actors, low=0.5, high=0.5)


def _choose(out: dict[str, Array], batch: Batch, rngs: nnx.Rngs) -> dict[str, Array]:
  """The proposals that are learnt from in a step."""
  _, actor, background = _proposal_targets(out, jnp.asarray(batch["boxes"]), jnp.asarray(batch["box_mask"]))
  chosen = choose_balanced(actor, background, rngs.proposals.uniform(actor.shape), **_SECOND_STAGE)
  first = jnp.argsort(~chosen)[:, : _SECOND_STAGE["count"]]
  return {
    "proposals": _take(out["proposals"], first),
    "proposal_mask": _take(chosen, first),
    "objectness": _take(out["objectness"], first),
  }


def _distance(deltas: Array, boxes: Array, targets: Array, actor: Array) -> Array:
  """Smooth L1 distance ``[...]`` of predicted deltas to what turns boxes into targets; 0 is the target of nobody."""
  wanted = jnp.where(actor[..., None], box_deltas(boxes, targets, weights=_CODER), 0)
  return optax.huber_loss(deltas, wanted).sum(-1)


# --- Small things ---------------------------------------------------------------------------------------------------


def principal_colors(keys: Array, cells: Array) -> Array:
  """The three principal components of a clip's keys as red, green and blue of the cells of its centre slice.

  Args:
    keys: ``[B, t, h, w, D]``.
    cells: ``[B, h, w]`` bool, False in the padding, which is black.

  Returns:
    ``[B, h, w, 3]`` in [0, 1]; every colour goes from its least to its most in the slice.
  """
  keys, mask = _exact(keys), cells[..., None]
  mean = keys.mean((1, 2, 3), where=mask[:, None], keepdims=True)
  keys = jnp.where(mask[:, None], keys - mean, 0)
  _, axes = jnp.linalg.eigh(jnp.einsum("bthwd,bthwe->bde", keys, keys))
  axes = axes[..., :-4:-1]  # eigenvalues rise
  # An axis has no direction of its own: its largest number is positive.
  largest = jnp.take_along_axis(axes, jnp.abs(axes).argmax(1, keepdims=True), 1)
  colors = jnp.einsum("bhwd,bdc->bhwc", keys[:, keys.shape[1] // 2], axes * jnp.sign(largest))
  low = colors.min((1, 2), keepdims=True, where=mask, initial=jnp.inf)
  high = colors.max((1, 2), keepdims=True, where=mask, initial=-jnp.inf)
  return jnp.where(mask, (colors - low) / jnp.maximum(high - low, 1e-6), 0)


def _take(values: Array, index: Array) -> Array:
  """Rows ``[B, N, ...]`` of ``[B, A, ...]`` by index ``[B, N]``."""
  return jnp.take_along_axis(values, index.reshape(index.shape + (1,) * (values.ndim - 2)), 1)


def _exact(x: Array) -> Array:
  """In at least float32."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
