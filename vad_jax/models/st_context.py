"""Spatio-Temporal Context: actions of given people, from themselves and what they attend to in the scene.

Paper: Sarmiento Calderó et al., "Spatio-Temporal Context for Action Detection", 2021 (Figure 2).

    video [B, T, H, W, 3] -> SlowFast -> slow map [B, t, h, w, C], fast map [B, T, h, w, C']
      both, averaged over time, at the people's boxes (RoIAlign) -> 7 x 7 actor tokens each
      actor tokens attend to the slow map, averaged over time   (spatial context, h w tokens)
      actor tokens attend to the fast map, averaged over space  (temporal context, T tokens)
      the largest over each actor's tokens -> two linear layers -> action logits [B, P, K]

It finds nobody itself: the boxes are ``proposals`` of the batch. The five rows of Table 1 are options: ``context`` is
"none" (the SlowFast detector of PySlowFast, whose weights fit), "spatial" (one block that attends to both maps,
averaged over time) or "spatial_temporal"; ``actor_grid`` keeps the 7 x 7 tokens, which are pooled to one before the
blocks otherwise.

No code was ever published. What the paper leaves open is decided here:

* Actor tokens are projected to a narrower width first. A block is that of "Attention Is All You Need": multi-head
  attention and two linear layers with ReLU, each added and then normalised. There are no positions; ``positions`` adds
  sines and cosines of the place, or of the time, to the keys.
* Pooling over time or space means the average, that of the actor tokens to one the largest, as in the baseline.
* A given box has the labels of the annotated one that it overlaps most, from an IoU of 0.9 on, else none: so were those
  made that PySlowFast trains with. Annotated boxes are among the proposals in training, and have their own labels.
* The loss is the mean sigmoid cross-entropy over classes and boxes.

In padded frames nobody attends to cells of padding, and averages over space leave them out.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.backbones import slowfast
from vad_jax.backbones.slowfast import SlowFast
from vad_jax.batch import Array, Batch, Detections
from vad_jax.layers.attention import attend
from vad_jax.layers.position import sincos_positions
from vad_jax.models._options import check_options
from vad_jax.ops import losses
from vad_jax.ops.boxes import iou
from vad_jax.ops.pixels import normalize
from vad_jax.ops.roi_align import roi_align

CONTEXTS = ("none", "spatial", "spatial_temporal")
_SAME_ACTOR = 0.9  # IoU with an annotated box from which on a given one has its labels


class Variant(NamedTuple):
  """Sizes.

  Attributes:
    backbone: arguments of SlowFast.
    width: of the tokens in the blocks; their hidden layer is four times as wide.
    heads: of the attention.
  """

  backbone: Mapping[str, Any]
  width: int
  heads: int


VARIANTS = {
  "r50": Variant(slowfast.VARIANTS["r50"], width=512, heads=8),
  "tiny": Variant({**slowfast.VARIANTS["tiny"], "depths": (1, 1, 1, 1)}, width=64, heads=4),
}


class SpatioTemporalContext(nnx.Module):
  """The classifier of people; see the module's docstring. Parameters live in backbone, context and classifier."""

  class_parameters = r"classifier\..*"
  takes_proposals = True

  def __init__(
    self,
    *,
    num_classes: int = 80,
    variant: str = "r50",
    context: str = "spatial_temporal",
    actor_grid: bool = True,
    positions: bool = False,
    norm: Literal["frozen", "batch"] = "frozen",
    dropout: float = 0.3,
    remat: bool = False,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      num_classes: ``K``.
      variant: one of ``VARIANTS``.
      context: one of ``CONTEXTS``: what actors attend to.
      actor_grid: an actor is 7 x 7 tokens rather than one.
      positions: keys of the attention say where, or when, they are.
      norm: of the backbone: ``frozen`` keeps the statistics of pre-trained weights, ``batch`` trains from scratch.
      dropout: rate in the blocks and before the classifier.
      remat: recompute blocks of the backbone in the backward pass instead of storing their activations.
      dtype: computation type, "float32" or "bfloat16"; parameters and losses stay float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an option has a value that does not exist.
    """
    check_options(
      variant=(variant, VARIANTS),
      context=(context, CONTEXTS),
      dtype=(dtype, ("float32", "bfloat16")),
    )
    sizes = VARIANTS[variant]
    self.compute_dtype = compute = jnp.bfloat16 if dtype == "bfloat16" else None
    self.backbone = SlowFast(**sizes.backbone, norm=norm, remat=remat, dtype=compute, rngs=rngs)
    if context == "none":
      self.context, width = None, sum(self.backbone.widths)
    else:
      options = {"temporal": context == "spatial_temporal", "actor_grid": actor_grid, "positions": positions}
      self.context = Context(self.backbone.widths, sizes, **options, dropout=dropout, dtype=compute, rngs=rngs)
      width = sizes.width
    self.dropout = nnx.Dropout(dropout)
    self.classifier = nnx.Linear(width, num_classes, dtype=compute, rngs=rngs)

  def __call__(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> dict[str, Any]:
    """Runs the network.

    Args:
      batch: uses ``video``, ``video_size``, ``proposals``, ``proposal_mask`` and ``key``.
      rngs: stream ``dropout``; needed in training.

    Returns:
      ``boxes`` ``[B, P, 4]`` the proposals as far as they lie in the frame, zero in padded slots; ``action_logits``
      ``[B, P, K]``; ``regions`` ``[B, P, 7, 7, C + C']`` of the actors, their ``features`` ``[B, P, D]``, the maps
      ``slow`` and ``fast`` of the backbone, and with context what the spatial block compares: ``query``
      ``[B, P * tokens, heads, d]`` and ``key`` ``[B, h * w, heads, d]``, of which those ``inside`` ``[B, h, w]`` count.

    Raises:
      ValueError: the batch has no proposals.
    """
    proposals, given = given_boxes(batch)
    size = jnp.maximum(jnp.asarray(batch["video_size"]), 1)
    video, _ = normalize(batch["video"], size, mean=0.45, std=0.225, dtype=self.compute_dtype)
    slow, fast = self.backbone(video)
    scale = slow.shape[2] / video.shape[2]  # cells a pixel
    boxes = jnp.where(given[..., None], jnp.clip(proposals, 0, 1), 0)
    means = slow.mean(1), fast.mean(1)
    pixels = boxes * jnp.tile(size[:, None, ::-1], 2)
    regions = roi_align(jnp.concatenate(means, -1), pixels, scale=scale, sampling_ratio=0)
    looking: dict[str, Array] = {}
    if self.context is None:
      features = largest(regions)
    else:
      features, looking = self.context(regions, means, fast, size * scale, rngs)
    logits = self.classifier(self.dropout(features, rngs=rngs))
    return {
      **looking,
      "slow": slow,
      "fast": fast,
      "regions": regions,
      "features": features,
      "boxes": boxes,
      "action_logits": logits.astype(jnp.promote_types(logits.dtype, jnp.float32)),
    }

  def costs(self, out: dict[str, Any], batch: Batch) -> None:
    """Nothing is matched."""

  def loss(self, out: dict[str, Any], batch: Batch, match: None) -> tuple[Array, dict[str, Array]]:
    """Mean sigmoid cross-entropy of the given boxes.

    Args:
      out: what the network returned.
      batch: uses ``proposals``, ``boxes``, ``labels`` and their masks, and ``key`` (rows of key -1 do not count).
      match: nothing.

    Returns:
      Scalar, and the same by name.
    """
    _, given = given_boxes(batch)
    wanted = proposal_labels(out["boxes"], batch["boxes"], batch["labels"], jnp.asarray(batch["box_mask"]))
    entropy = losses.binary_cross_entropy(out["action_logits"], wanted).mean(-1)
    loss = losses.masked_sum(entropy, given) / jnp.maximum(given.sum(), 1)
    return loss, {"loss_action": loss}

  def detections(self, out: dict[str, Any], batch: Batch) -> Detections:
    """The given boxes, their scores where the batch has them, else 1, and action probabilities."""
    _, given = given_boxes(batch)
    score = jnp.where(given, batch.get("proposal_score", 1.0), 0.0)
    return Detections(out["boxes"], score, jax.nn.sigmoid(out["action_logits"]), given)

  def maps(self, out: dict[str, Any], batch: Batch) -> dict[str, Array]:
    """Where in the scene each person looks, the mean of the person's tokens and of heads; nothing without context."""
    if self.context is None:
      return {}
    query, key, inside = (out[name] for name in ("query", "key", "inside"))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    logits = jnp.where(inside.reshape(len(inside), 1, 1, -1), logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    attention = jax.nn.softmax(logits).mean(1)
    return {"attention": attention.reshape(*out["boxes"].shape[:2], -1, *inside.shape[1:]).mean(2)[:, :, None]}


def given_boxes(batch: Batch) -> tuple[Array, Array]:
  """Proposals ``[B, P, 4]``, and which of them are no padding ``[B, P]``.

  Raises:
    ValueError: the batch has none.
  """
  if "proposals" not in batch or "proposal_mask" not in batch:
    raise ValueError("st_context classifies given boxes, and the batch has none: set config.max_proposals")
  return jnp.asarray(batch["proposals"]), jnp.asarray(batch["proposal_mask"]) & (jnp.asarray(batch["key"]) >= 0)[
    :, None
  ]


# --- Parts of the network -------------------------------------------------------------------------------------------


class Context(nnx.Module):
  """What actors know after they have attended to the scene (section 3.2), and the first of two linear layers."""

  def __init__(
    self,
    widths: tuple[int, int],
    sizes: Variant,
    *,
    temporal: bool,
    actor_grid: bool,
    positions: bool,
    dropout: float,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    slow, fast = widths

    def block(context_width: int) -> ContextBlock:
      return ContextBlock(sizes.width, context_width, sizes.heads, dropout, dtype=dtype, rngs=rngs)

    self.actor_grid, self.positions = actor_grid, positions
    self.project = nnx.Linear(slow + fast, sizes.width, dtype=dtype, rngs=rngs)
    self.spatial = block(slow if temporal else slow + fast)
    self.temporal = block(fast) if temporal else None
    self.hidden = nnx.Linear(sizes.width, sizes.width, dtype=dtype, rngs=rngs)

  def __call__(
    self, regions: Array, means: tuple[Array, Array], fast: Array, cells: Array, rngs: nnx.Rngs | None
  ) -> tuple[Array, dict[str, Array]]:
    """Runs the blocks.

    Args:
      regions: ``[B, P, 7, 7, C + C']`` of the actors.
      means: ``[B, h, w, C]`` and ``[B, h, w, C']``: the slow and the fast map, averaged over time.
      fast: ``[B, T, h, w, C']``.
      cells: ``[B, 2]`` height and width of the unpadded frame in cells.
      rngs: for dropout.

    Returns:
      ``[B, P, D]``, and what the spatial block compared, see ``SpatioTemporalContext``.
    """
    rows, count, *_, channels = regions.shape
    tokens = regions if self.actor_grid else largest(regions)
    x = self.project(tokens.reshape(rows, -1, channels))
    width = x.shape[-1]
    _, frames, h, w, _ = fast.shape
    down, across = (jnp.arange(side) < cells[:, axis, None] for axis, side in enumerate((h, w)))
    inside = down[:, :, None] & across[:, None]
    scene = jnp.concatenate(means, -1) if self.temporal is None else means[0]
    places = grid_positions(h, w, width) if self.positions else None
    x, (query, key) = self.spatial(x, scene.reshape(rows, h * w, -1), places, inside.reshape(rows, -1), rngs)
    if self.temporal is not None:
      moments = fast.mean((2, 3), where=inside[:, None, :, :, None])
      times = sincos_positions(frames, width) if self.positions else None
      x, _ = self.temporal(x, moments, times, None, rngs)
    features = jax.nn.relu(self.hidden(largest(x.reshape(rows, count, -1, width))))
    return features, {"query": query, "key": key, "inside": inside}


class ContextBlock(nnx.Module):
  """Tokens attend to a context, then pass a feed-forward part; each is added and normalised (Vaswani et al., 2017)."""

  def __init__(
    self, width: int, context_width: int, heads: int, dropout: float, *, dtype: jnp.dtype | None, rngs: nnx.Rngs
  ):
    def linear(inputs: int, outputs: int) -> nnx.Linear:
      return nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs)

    self.heads = heads
    self.query, self.key, self.value = linear(width, width), linear(context_width, width), linear(context_width, width)
    self.proj, self.fc1, self.fc2 = linear(width, width), linear(width, 4 * width), linear(4 * width, width)
    self.norm1, self.norm2 = (nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs) for _ in range(2))
    self.dropout = nnx.Dropout(dropout)

  def __call__(
    self, x: Array, context: Array, positions: Array | None, key_mask: Array | None, rngs: nnx.Rngs | None
  ) -> tuple[Array, tuple[Array, Array]]:
    """Runs the block.

    Args:
      x: ``[B, N, D]`` tokens.
      context: ``[B, L, C]`` what they attend to.
      positions: ``[L, D]`` to be added to its keys.
      key_mask: ``[B, L]`` bool, False where nobody may look.
      rngs: for dropout.

    Returns:
      ``[B, N, D]``; queries ``[B, N, heads, d]`` and keys ``[B, L, heads, d]``.
    """
    split = lambda tokens: tokens.reshape(*tokens.shape[:2], self.heads, -1)  # noqa: E731
    key = self.key(context)
    if positions is not None:
      key = key + jnp.asarray(positions, key.dtype)
    query, key, value = split(self.query(x)), split(key), split(self.value(context))
    found = attend(query, key, value, key_mask)
    x = self.norm1(x + self.dropout(self.proj(found.reshape(x.shape)), rngs=rngs))
    x = self.norm2(x + self.dropout(self.fc2(jax.nn.relu(self.fc1(x))), rngs=rngs))
    return x, (query, key)


def largest(x: Array) -> Array:
  """The largest ``[B, P, C]`` over the tokens of ``[B, P, ..., C]``; its gradient goes to one of them.

  That of ``jnp.max`` is divided by how many equal the largest, and a compiler that computes tokens twice, with other
  rounding, may find none: NaN.
  """
  tokens = x.reshape(*x.shape[:2], -1, x.shape[-1])
  return jnp.take_along_axis(tokens, jnp.argmax(tokens, 2, keepdims=True), axis=2)[:, :, 0]


def grid_positions(h: int, w: int, width: int) -> np.ndarray:
  """Sines and cosines ``[h * w, width]``: half of the channels tell the row, half the column."""
  rows, columns = (sincos_positions(n, width // 2) for n in (h, w))
  return np.concatenate([np.repeat(rows, w, axis=0), np.tile(columns, (h, 1))], axis=-1)


def proposal_labels(proposals: Array, boxes: Array, labels: Array, mask: Array) -> Array:
  """Labels of the annotated box that each given one overlaps most; none where that is less than ``_SAME_ACTOR``.

  Annotated boxes at the same place are one actor, who does all that they say.

  Args:
    proposals: ``[B, P, 4]``.
    boxes: ``[B, M, 4]``.
    labels: ``[B, M, K]``.
    mask: ``[B, M]`` bool, False for padding.

  Returns:
    ``[B, P, K]``.
  """
  # What stands in padded slots must not even reach the arithmetic: NaN times zero is NaN.
  boxes, labels = (jnp.where(mask[..., None], values, 0) for values in (boxes, labels))
  overlap = iou(proposals[:, :, None], boxes[:, None])
  same = (overlap >= _SAME_ACTOR) & (overlap == overlap.max(-1, keepdims=True))
  return jnp.minimum(jnp.einsum("bpm,bmk->bpk", same.astype(labels.dtype), labels), 1)


# --- Published weights ----------------------------------------------------------------------------------------------


def _names(backbone: Iterable[tuple[str, Any]], classifier: str) -> tuple[tuple[str, Any], ...]:
  return (
    *((rf"backbone\.{ours}", theirs) for ours, theirs in backbone),
    (r"classifier\.(weight|bias)", classifier),
  )


# (our path, published name), see vad_jax.convert, for context="none". PySlowFast's detector, and PyTorchVideo's:
REFERENCE_NAMES = _names(slowfast.REFERENCE_NAMES, r"head.projection.\1")
PYTORCHVIDEO_NAMES = _names(slowfast.PYTORCHVIDEO_NAMES, r"detection_head.proj.\1")


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for a published detector, from the shapes of its tensors.

  Raises:
    ValueError: no variant has these sizes.
  """
  wanted = slowfast.reference_arguments(shapes)
  fitting = [name for name, sizes in VARIANTS.items() if sizes.backbone == wanted]
  if not fitting:
    raise ValueError(f"no variant of st_context has a backbone of {wanted}")
  (num_classes,) = shapes.get("head.projection.bias") or shapes["detection_head.proj.bias"]
  return {"variant": fitting[0], "context": "none", "num_classes": num_classes}
