"""EVAD: efficient video action detection with token dropout and context refinement.

Paper: Chen et al., "Efficient Video Action Detection with Token Dropout and Context Refinement", ICCV 2023 (Figure 2).

    video [B, T, H, W, 3] -> ViT blocks, dropping tokens of other frames than the keyframe at a few of them
      keyframe tokens [B, h, w, C] of four blocks -> FPN -> six localisation layers on N proposals -> boxes [B, N, 4]
      kept tokens [B, n, C] -> narrower map [B, t, h, w, D] -> actor features in the extended boxes [B, N, D]
      [kept tokens, actor features] -> context refinement decoder -> action logits [B, N, K]

Where paper and official code differ, the default follows the code, so that its released weights work:

* Token order. The code keeps tokens in the order of their importance, but puts them back into the map (and gives them
  positions in the decoder) in the order of their places; tokens of other frames than the keyframe thus land in
  each other's places. ``token_order="paper"`` puts each token back where it came from.
* Empty places of the map hold a learnt token, not zeros; tokens are narrowed before the map is rebuilt, and positions
  of that width are added to all of it.
* A block keeps ``ceil(rate * tokens)`` tokens, those of the keyframe included, not ``rate * tokens``.
* Extended boxes follow the "+1" pixel convention and are clipped to the frame; the score of an action is not multiplied
  by that of the person; persons below 0.7 are dropped unless that leaves nobody (see ``evaluate``).
* "3D RoIAlign" is RoIAlign of each time slice, the maximum over the bins, the mean over time.

Padded pixels take part in attention, as in the code; ``mask_padding=True`` keeps them out.

The paper always starts from VideoMAE weights. Ours alone is what lets the small variants learn from nothing
(``Variant.from_scratch``): a stem of convolutions, initial boxes spread over the frame, rare actors and actions assumed
at first, and a training loss that asks every keyframe token for its actor. How tokens become detections is the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.backbones import vit
from vad_jax.batch import Array, Batch, Detections
from vad_jax.layers.attention import Block, SelfAttention
from vad_jax.layers.fpn import FeaturePyramid
from vad_jax.layers.from_scratch import RARE, dense_head, spread_boxes
from vad_jax.layers.position import video_positions
from vad_jax.models._options import check_options
from vad_jax.ops import boxes as box_ops
from vad_jax.ops import losses
from vad_jax.ops.pixels import normalize
from vad_jax.ops.roi_align import pyramid_roi_align, roi_align


class Variant(NamedTuple):
  """Sizes of a model; defaults are those shared by the published ones."""

  width: int
  depth: int
  heads: int
  prune_at: tuple[int, ...]  # blocks that drop tokens, from 0
  fpn_at: tuple[int, ...]  # blocks whose keyframe tokens feed the pyramid, finest level first
  decoder_width: int
  decoder_heads: int
  decoder_depth: int
  trained_side: int = 14
  head_width: int = 256
  head_hidden: int = 2048
  head_layers: int = 6
  head_dynamic: int = 64
  classifier_width: int = 2048
  num_queries: int = 100
  canonical_size: float = 224.0  # side in pixels of a box that is pooled from the map of the ViT's own stride
  from_scratch: bool = False  # see the module's docstring


VARIANTS = {
  "vit_s": Variant(384, 12, 6, (3, 6, 9), (2, 5, 8, 11), 192, 3, 6),
  "vit_b": Variant(768, 12, 12, (3, 6, 9), (2, 5, 8, 11), 384, 6, 6),
  "vit_l": Variant(1024, 24, 16, (6, 12, 18), (5, 11, 17, 23), 512, 8, 12),
  "tiny": Variant(96, 8, 3, (2, 4, 6), (1, 3, 5, 7), 48, 3, 2, 4, 256, 128, 2, 16, 64, 20),
  "quickstart": Variant(128, 4, 4, (1, 2), (0, 1, 2, 3), 128, 4, 2, 6, 64, 192, 2, 16, 128, 10, 64.0, True),
}

PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of RGB in [0, 1], all channels


class EVAD(nnx.Module):
  """The detector; see the module's docstring. Parameters live in backbone, fpn, proposals, head and decoder."""

  class_parameters = r"decoder\.classifiers\.\d+\.logits\..*|dense\..*"

  def __init__(
    self,
    *,
    num_classes: int = 80,
    variant: str = "vit_b",
    keep_rate: float = 0.7,
    prune_at: tuple[int, ...] | None = None,
    pruning: Literal["keyframe", "unified", "random"] = "keyframe",
    keyframe_weight: float = 1.0,
    token_order: Literal["official", "paper"] = "official",
    decoder_tokens: Literal["kept", "all"] = "kept",
    decoder_depth: int | None = None,
    roi_extension: tuple[float, float] = (0.4, 0.2),
    num_queries: int | None = None,
    drop_path: float = 0.1,
    mask_padding: bool = False,
    action_loss: float = 12.0,
    remat: bool = False,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      num_classes: ``K``.
      variant: one of ``VARIANTS``.
      keep_rate: share of its tokens that a pruning block keeps, the keyframe's included (Table 2).
      prune_at: blocks, from 0, that prune; None takes the variant's.
      pruning: by attention, with all keyframe tokens kept; the same without that protection (Table 1c); or at random
        before the first block (Table 1b).
      keyframe_weight: weight of the keyframe's queries in the importance (Table 1g; 4 is best at keep rate 0.6).
      token_order: see the module's docstring.
      decoder_tokens: what the decoder attends to; "all" brings dropped tokens back as they were (Table 1d).
      decoder_depth: blocks of the decoder (Table 1e); 0 is the linear head on actor features (Table 1a); None takes the
        variant's.
      roi_extension: growth of boxes in width and height before actor features are taken (Table 1f).
      num_queries: ``N``, number of learnt proposals; None takes the variant's.
      drop_path: stochastic depth of the last block, in encoder and decoder.
      mask_padding: keep padded tokens out of attention and pruning.
      action_loss: weight of the action loss: 12; the published ViT-L took 6.
      remat: recompute blocks in the backward pass instead of storing their activations.
      dtype: computation type, "float32" or "bfloat16"; parameters, norms' statistics and losses stay float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an option has a value that does not exist.
    """
    check_options(
      variant=(variant, VARIANTS),
      pruning=(pruning, ("keyframe", "unified", "random")),
      token_order=(token_order, ("official", "paper")),
      decoder_tokens=(decoder_tokens, ("kept", "all")),
      dtype=(dtype, ("float32", "bfloat16")),
    )
    if not 0 < keep_rate <= 1:
      raise ValueError(f"keep_rate must be in (0, 1], not {keep_rate}")
    sizes = VARIANTS[variant]
    compute = jnp.bfloat16 if dtype == "bfloat16" else None
    self.sizes, self.num_classes, self.keep_rate = sizes, num_classes, keep_rate
    self.prune_at = sizes.prune_at if prune_at is None else tuple(prune_at)
    self.pruning, self.keyframe_weight = pruning, keyframe_weight
    self.token_order, self.decoder_tokens = token_order, decoder_tokens
    self.roi_extension, self.mask_padding, self.remat = roi_extension, mask_padding, remat
    self.compute_dtype, self.action_loss = compute, action_loss

    self.backbone = vit.ViT(
      width=sizes.width,
      depth=sizes.depth,
      heads=sizes.heads,
      trained_side=sizes.trained_side,
      stem="convolution" if sizes.from_scratch else "patch",
      drop_path=drop_path,
      dtype=compute,
      rngs=rngs,
    )
    self.fpn = FeaturePyramid(sizes.width, sizes.head_width, dtype=compute, rngs=rngs)
    self.proposals = Proposals(num_queries or sizes.num_queries, sizes, rngs=rngs)
    self.head = nnx.List([LocalisationLayer(sizes, dtype=compute, rngs=rngs) for _ in range(sizes.head_layers)])
    depth = sizes.decoder_depth if decoder_depth is None else decoder_depth
    self.decoder = ContextDecoder(sizes, depth, num_classes, drop_path, dtype=compute, rngs=rngs)
    if sizes.from_scratch:
      self.dense = dense_head(sizes.width, num_classes, rngs)

  def __call__(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> dict[str, Any]:
    """Runs the network.

    Args:
      batch: uses ``video`` (sides multiples of 32) and ``video_size``.
      rngs: stream ``dropout``; needed for drop path in training and for another random pruning each step.

    Returns:
      ``boxes`` ``[L, B, N, 4]`` xyxy in input pixels and ``person_logits`` ``[L, B, N, 2]`` (person first) of all
      localisation layers, ``action_logits`` ``[L', B, N, K]`` of all decoder blocks, ``frame_size`` ``[B, 4]`` (width,
      height, width, height); ``block_tokens``, ``kept`` (list of the places of kept tokens after each pruning,
      ``[B, n]``, counted without the keyframe unless pruning is unified), ``survivors`` (with it), and what is between.
    """
    side = 2 * self.backbone.patch[1]
    if batch["video"].shape[2] % side or batch["video"].shape[3] % side:
      raise ValueError(f"video {batch['video'].shape}: height and width must be multiples of {side}")
    video, pixel_mask = normalize(
      batch["video"], batch["video_size"], mean=PIXEL_MEAN, std=PIXEL_STD, dtype=self.compute_dtype
    )
    size = jnp.asarray(batch["video_size"])[:, ::-1]
    frame_size = jnp.maximum(jnp.concatenate([size, size], -1), 1).astype(jnp.promote_types(video.dtype, jnp.float32))

    out: dict[str, Any] = {"frame_size": frame_size}
    tokens, places, maps = self.encode(video, pixel_mask, rngs, out)
    out["fpn"] = self.fpn(maps)
    boxes = self.localise(out["fpn"], frame_size, out)
    self.classify(tokens, places, boxes, rngs, out)
    if self.sizes.from_scratch:
      out["dense"] = self.dense(maps[-1])
    return out

  def encode(
    self, video: Array, pixel_mask: Array, rngs: nnx.Rngs | None, out: dict[str, Any]
  ) -> tuple[Array, "Places", list[Array]]:
    """ViT with keyframe-centric token pruning (section 3.2).

    Returns:
      Normed tokens ``[B, n, C]``, protected ones first; their places; keyframe maps ``[B, h, w, C]`` for the pyramid.
    """
    embedded = self.backbone.embed(video)
    batch, t, h, w, _ = embedded.shape
    x = keyframe_first(embedded)
    _, ph, pw = self.backbone.patch
    real = pixel_mask[:, ::ph, ::pw].reshape(batch, h * w) if self.mask_padding else jnp.ones((batch, h * w), bool)
    protected = 0 if self.pruning == "unified" else h * w
    places = Places(jnp.tile(real, (1, t)), (t, h, w), protected)
    if self.pruning == "random" and self.keep_rate < 1:
      key = rngs.dropout() if rngs is not None else jax.random.key(0)
      count = h * w + (t - 1) * num_kept(h * w, self.keep_rate)  # of every slice but the keyframe's
      x = places.keep(x, jax.random.uniform(key, (batch, t * h * w)), count)

    out.update(tokens_in=x, block_tokens=[], kept=places.history, importance=[], dropped_tokens=places.dropped)
    maps = []
    for index, block in enumerate(self.backbone.blocks):
      prune = index in self.prune_at and self.keep_rate < 1 and self.pruning != "random"
      weight = jnp.ones(x.shape[1]).at[:protected].set(self.keyframe_weight) if prune else None
      mask = places.mask if self.mask_padding else None
      x, importance = self.maybe_remat(Block.attention)(block, x, rngs, mask, weight)
      if prune:
        out["importance"].append(importance)
        x = places.keep(x, importance, num_kept(x.shape[1], self.keep_rate))
      x = self.maybe_remat(Block.feed_forward)(block, x, rngs)
      out["block_tokens"].append(x)
      if index in self.sizes.fpn_at:
        maps.append(places.keyframe_map(x))
    out["survivors"] = places.place
    if self.decoder_tokens == "all":
      x = places.bring_back(x)
    out["tokens"] = self.backbone.norm(x)
    return out["tokens"], places, maps

  def localise(self, pyramid: list[Array], frame_size: Array, out: dict[str, Any]) -> Array:
    """Sparse R-CNN layers on the keyframe (section 3.3): boxes ``[B, N, 4]`` of the last one, in input pixels."""
    boxes = box_ops.cxcywh_to_xyxy(self.proposals.boxes[...]) * frame_size[:, None]
    features = jnp.broadcast_to(self.proposals.features[...], (*boxes.shape[:2], self.sizes.head_width))
    features = features.astype(pyramid[0].dtype)
    strides = tuple(self.backbone.patch[1] / scale for scale in (4, 2, 1, 0.5))
    layers = []
    for layer in self.head:
      roi, level = pyramid_roi_align(pyramid, boxes, strides=strides, canonical_size=self.sizes.canonical_size)
      found = layer(features, roi, jax.lax.stop_gradient(boxes) if layers else boxes)
      layers.append({**found, "boxes_in": boxes, "level": level, "roi": roi})
      features, boxes = found["feature"], found["boxes"]
    out["head"] = layers
    out["boxes"] = jnp.stack([layer["boxes"] for layer in layers])
    out["person_logits"] = jnp.stack([layer["logits"] for layer in layers])
    return boxes

  def classify(self, tokens: Array, places: "Places", boxes: Array, rngs: nnx.Rngs | None, out: dict[str, Any]) -> None:
    """Actor features from the rebuilt map, refined by the decoder (section 3.4)."""
    narrow = self.decoder.proj(tokens)
    slots = places.slots(sort=self.token_order == "official" and self.decoder_tokens == "kept")
    positions = video_positions(narrow.shape[-1], places.grid, self.sizes.trained_side)
    positions = keyframe_first(jnp.asarray(positions, narrow.dtype)[None])[0]
    restored = places.restore(narrow, slots, self.decoder.mask_token[...].astype(narrow.dtype))
    restored = keyframe_back(restored + positions, places.grid)  # [B, t, h, w, D]

    extended = box_ops.extend_boxes(jax.lax.stop_gradient(boxes), self.roi_extension, out["frame_size"])
    batch, t, h, w, dim = restored.shape
    slices = restored.transpose(0, 2, 3, 1, 4).reshape(batch, h, w, t * dim)
    pooled = roi_align(slices, extended, scale=1 / self.backbone.patch[1])
    actors = pooled.reshape(*pooled.shape[:4], t, dim).max((2, 3)).mean(2)
    x = jnp.concatenate([narrow + positions[slots], actors.astype(narrow.dtype)], axis=1)
    out.update(narrow_tokens=narrow, restored=restored, extended_boxes=extended, actor_features=actors, decoder_in=x)

    mask = None
    if self.mask_padding:
      mask = jnp.concatenate([places.mask, jnp.ones(actors.shape[:2], bool)], axis=1)
    logits, out["decoder_tokens"] = [], []
    for block in self.decoder.blocks:
      x = self.maybe_remat(Block.__call__)(block, x, rngs, mask)
      out["decoder_tokens"].append(x)
    sources = out["decoder_tokens"] or [x]
    for source, classifier in zip(sources, self.decoder.classifiers, strict=True):
      logits.append(classifier(source[:, -actors.shape[1] :]))
    out["action_logits"] = jnp.stack(logits)

  def maybe_remat(self, function: Any) -> Any:
    """The function itself, or one that recomputes its activations in the backward pass."""
    return nnx.remat(function) if self.remat else function

  def costs(self, out: dict[str, Any], batch: Batch) -> Array:
    """Matching costs ``[L, B, N, M]``: 5 L1 - 2 p(person) - 2 GIoU (section 3.5)."""
    l1, giou = losses.box_costs(out["boxes"] / out["frame_size"][:, None], jnp.asarray(batch["boxes"])[None])
    person = jax.nn.softmax(out["person_logits"].astype(l1.dtype), -1)[..., :1]
    return 5 * l1 - 2 * person - 2 * giou

  def loss(self, out: dict[str, Any], batch: Batch, match: Array) -> tuple[Array, dict[str, Array]]:
    """Set prediction loss of every localisation layer and action loss of every decoder block (section 3.5).

    The total is the sum of the weighted terms over their number, as in the official code.

    Args:
      out: what the network returned.
      batch: uses ``boxes``, ``labels``, ``box_mask`` and ``key`` (rows of key -1 do not count).
      match: ``[L, B, N, M]`` bool, which proposal is which actor.

    Returns:
      Scalar, and the weighted terms by name; ``_i`` marks those of earlier layers.
    """
    real = jnp.asarray(batch["key"]) >= 0
    actors = jnp.asarray(batch["box_mask"]) & real[:, None]
    # What stands in padded slots must not even reach the arithmetic: NaN times zero is NaN in the gradient.
    targets = jnp.where(actors[..., None], batch["boxes"], 0)
    labels = jnp.where(actors[..., None], batch["labels"], 0)
    num_actors = jnp.maximum(actors.sum(), 1)
    match = match & real[:, None, None]
    l1, giou = losses.box_costs(out["boxes"] / out["frame_size"][:, None], targets[None])
    terms = {}
    last = out["boxes"].shape[0] - 1
    for layer in range(last + 1):
      suffix = "" if layer == last else f"_{layer}"
      person = losses.person_cross_entropy(out["person_logits"][layer], match[layer].any(-1), real[:, None])
      terms["loss_person" + suffix] = 2 * person
      terms["loss_box" + suffix] = 5 * losses.masked_sum(l1[layer], match[layer]) / num_actors
      terms["loss_giou" + suffix] = 2 * losses.masked_sum(1 - giou[layer], match[layer]) / num_actors
    matched = match[last].any(-1)
    wanted = jnp.einsum("bnm,bmk->bnk", match[last].astype(labels.dtype), labels)
    last = len(out["action_logits"]) - 1
    for layer, logits in enumerate(out["action_logits"]):
      entropy = losses.binary_cross_entropy(logits, wanted)
      mean = losses.masked_sum(entropy, matched[..., None]) / (jnp.maximum(matched.sum(), 1) * self.num_classes)
      terms["loss_action" + ("" if layer == last else f"_{layer}")] = self.action_loss * mean
    total = sum(terms.values()) / len(terms)
    if self.sizes.from_scratch:
      terms["loss_dense"] = losses.dense_detection_loss(
        out["dense"], targets * out["frame_size"][:, None], labels, actors, stride=self.backbone.patch[1]
      )
      total = total + terms["loss_dense"]
    return jnp.asarray(total), terms

  def detections(self, out: dict[str, Any], batch: Batch) -> Detections:
    """Boxes of the last layer clipped to the frame, person probability, action probabilities."""
    frame = out["frame_size"][:, None]
    boxes = jnp.clip(out["boxes"][-1], 0, frame - 1) / frame
    exact = jnp.promote_types(out["action_logits"].dtype, jnp.float32)
    person = jax.nn.softmax(out["person_logits"][-1].astype(exact), -1)[..., 0]
    real = jnp.broadcast_to(jnp.asarray(batch["key"])[:, None] >= 0, person.shape)
    return Detections(boxes, person, jax.nn.sigmoid(out["action_logits"][-1].astype(exact)), real)

  def maps(self, out: dict[str, Any], batch: Batch) -> dict[str, Array]:
    """Of how many of the clip's slices the tokens of each place outlive all prunings: 1 where all do (Figure 4)."""
    count, slices, h, w, _ = out["restored"].shape
    kept = jax.nn.one_hot(out["survivors"] % (h * w), h * w).sum(1) / slices
    return {"kept": kept.reshape(count, h, w)}


# --- Parts of the network -------------------------------------------------------------------------------------------


def num_kept(tokens: int, rate: float) -> int:
  """How many of so many tokens a pruning keeps."""
  return math.ceil(rate * tokens)


class Places:
  """Where each token of the stream came from, while tokens are dropped.

  The stream holds ``protected`` tokens that are never dropped (the keyframe's), then the rest.

  Attributes:
    place: ``[B, n]`` place of every token of the stream in the keyframe-first sequence.
    mask: ``[B, n]`` bool, False for padded tokens.
    history: places of the rest after each pruning, counted from the first of them.
    dropped: tokens, places and mask that each pruning took out.
  """

  def __init__(self, mask: Array, grid: tuple[int, int, int], protected: int):
    self.grid, self.protected, self.mask = grid, protected, mask
    self.key_tokens, self.total = grid[1] * grid[2], math.prod(grid)
    self.place = jnp.broadcast_to(jnp.arange(self.total), mask.shape)
    self.history: list[Array] = []
    self.dropped: list[tuple[Array, ...]] = []

  def keep(self, x: Array, importance: Array, count: int) -> Array:
    """Keeps ``count`` tokens: the protected ones, then the most important others in descending order."""
    count = max(count, self.protected)
    if count < x.shape[1]:
      ranked = jnp.where(self.mask, importance, -1)[:, self.protected :]
      order = descending(ranked) + self.protected
      first = jnp.broadcast_to(jnp.arange(self.protected), (len(x), self.protected))
      order = jnp.concatenate([first, order], axis=1)
      stream = (x, self.place, self.mask)
      self.dropped.append(tuple(_take(values, order[:, count:]) for values in stream))
      x, self.place, self.mask = (_take(values, order[:, :count]) for values in stream)
    self.history.append(self.place[:, self.protected :] - self.protected)
    return x

  def bring_back(self, x: Array) -> Array:
    """Appends every dropped token as it was when it was dropped."""
    streams = zip((x, self.place, self.mask), *self.dropped, strict=True)
    x, self.place, self.mask = (jnp.concatenate(values, axis=1) for values in streams)
    return x

  def slots(self, *, sort: bool) -> Array:
    """Slot ``[B, n]`` of every token in the whole sequence: its place, or with ``sort`` the official mix-up."""
    first, rest = self.place[:, : self.protected], self.place[:, self.protected :]
    return jnp.concatenate([first, jnp.sort(rest, axis=1)], axis=1) if sort else self.place

  def restore(self, x: Array, slots: Array, fill: Array) -> Array:
    """Puts tokens ``[B, n, C]`` into their slots of the whole sequence ``[B, N, C]``, ``fill`` elsewhere."""
    full = jnp.broadcast_to(fill, (x.shape[0], self.total, x.shape[-1]))
    return jax.vmap(lambda row, slot, tokens: row.at[slot].set(tokens))(full, slots, x)

  def keyframe_map(self, x: Array) -> Array:
    """Tokens of the keyframe ``[B, h, w, C]``; zeros where they were dropped."""
    if self.protected < self.key_tokens:
      x = self.restore(x, self.slots(sort=False), jnp.zeros((), x.dtype))
    return x[:, : self.key_tokens].reshape(x.shape[0], *self.grid[1:], x.shape[-1])


def descending(importance: Array) -> Array:
  """Places ``[B, n]`` of tokens by importance, best first. ``top_k`` would gather the batch from all devices."""
  return jnp.argsort(-importance, axis=1)


def _take(values: Array, index: Array) -> Array:
  """Rows ``[B, k, ...]`` of ``[B, n, ...]``."""
  return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)


def keyframe_first(x: Array) -> Array:
  """``[B, t, h, w, C]`` to ``[B, N, C]`` with the slice ``t // 2`` moved to the front."""
  middle = x.shape[1] // 2
  x = jnp.concatenate([x[:, middle : middle + 1], x[:, :middle], x[:, middle + 1 :]], axis=1)
  return x.reshape(x.shape[0], -1, x.shape[-1])


def keyframe_back(x: Array, grid: tuple[int, int, int]) -> Array:
  """Undoes ``keyframe_first``."""
  x = x.reshape(x.shape[0], *grid, x.shape[-1])
  middle = grid[0] // 2
  return jnp.concatenate([x[:, 1 : middle + 1], x[:, :1], x[:, middle + 1 :]], axis=1)


class Proposals(nnx.Module):
  """Learnt boxes (normalised cxcywh) and features. Boxes start as the whole frame, or spread over it in two sizes."""

  def __init__(self, count: int, sizes: Variant, *, rngs: nnx.Rngs):
    boxes = np.tile([0.5, 0.5, 1.0, 1.0], (count, 1))
    if sizes.from_scratch:
      boxes = spread_boxes(count)
    self.boxes = nnx.Param(jnp.asarray(boxes, jnp.float32))
    self.features = nnx.Param(rngs.params.normal((count, sizes.head_width)))


class LocalisationLayer(nnx.Module):
  """Sparse R-CNN layer (Sun et al., CVPR 2021): proposals see each other, then their own region, then move."""

  def __init__(self, sizes: Variant, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    dim, hidden = sizes.head_width, sizes.head_dynamic

    def linear(inputs: int, outputs: int, use_bias: bool = True) -> nnx.Linear:
      return nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=_XAVIER, dtype=dtype, rngs=rngs)

    def norm(features: int) -> nnx.LayerNorm:
      return nnx.LayerNorm(features, epsilon=1e-5, dtype=dtype, rngs=rngs)

    self.self_attn = SelfAttention(dim, 8, key_bias=True, dtype=dtype, rngs=rngs)
    self.dynamic_layer = linear(dim, 2 * dim * hidden)
    self.dynamic_norm1, self.dynamic_norm2, self.dynamic_norm3 = norm(hidden), norm(dim), norm(dim)
    self.out_layer = linear(49 * dim, dim)
    self.linear1, self.linear2 = linear(dim, sizes.head_hidden), linear(sizes.head_hidden, dim)
    self.norm1, self.norm2, self.norm3 = norm(dim), norm(dim), norm(dim)
    self.person = nnx.List([linear(dim, dim, use_bias=False), norm(dim)])
    self.person_logits = linear(dim, 2)
    self.box = nnx.List([part for _ in range(3) for part in (linear(dim, dim, use_bias=False), norm(dim))])
    self.box_deltas = linear(dim, 4)

  def __call__(self, x: Array, roi: Array, boxes: Array) -> dict[str, Array]:
    """One refinement.

    Args:
      x: ``[B, N, C]`` proposal features.
      roi: ``[B, N, 7, 7, C]`` region features.
      boxes: ``[B, N, 4]`` xyxy in input pixels.

    Returns:
      New ``feature``, person ``logits`` ``[B, N, 2]`` (person first), new ``boxes``; ``dynamic``, what the region told.
    """
    x = self.norm1(x + self.self_attn(x)[0])
    dynamic = self.interact(x, roi)
    x = self.norm2(x + dynamic)
    x = self.norm3(x + self.linear2(jax.nn.relu(self.linear1(x))))
    person, box = x, x
    for linear, norm in zip(self.person[::2], self.person[1::2], strict=True):
      person = jax.nn.relu(norm(linear(person)))
    for linear, norm in zip(self.box[::2], self.box[1::2], strict=True):
      box = jax.nn.relu(norm(linear(box)))
    boxes = box_ops.apply_deltas(boxes, self.box_deltas(box), weights=(2, 2, 1, 1))
    return {"dynamic": dynamic, "feature": x, "logits": self.person_logits(person), "boxes": boxes}

  def interact(self, x: Array, roi: Array) -> Array:
    """Dynamic convolution: two linear layers, made from the proposal, over the bins of its region."""
    batch, count, dim = x.shape
    first, second = jnp.split(self.dynamic_layer(x), 2, axis=-1)
    bins = roi.reshape(batch, count, -1, dim)
    bins = jnp.einsum("bnsc,bncd->bnsd", bins, first.reshape(batch, count, dim, -1))
    bins = jax.nn.relu(self.dynamic_norm1(bins))
    bins = jnp.einsum("bnsd,bndc->bnsc", bins, second.reshape(batch, count, -1, dim))
    bins = jax.nn.relu(self.dynamic_norm2(bins))
    return jax.nn.relu(self.dynamic_norm3(self.out_layer(bins.reshape(batch, count, -1))))


class ContextDecoder(nnx.Module):
  """Narrowing projection, learnt empty token, blocks over tokens and actors, a classifier after each block."""

  def __init__(
    self,
    sizes: Variant,
    depth: int,
    num_classes: int,
    drop_path: float,
    *,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    dim = sizes.decoder_width
    self.proj = nnx.Linear(sizes.width, dim, use_bias=False, kernel_init=_XAVIER, dtype=dtype, rngs=rngs)
    self.mask_token = nnx.Param(_XAVIER(rngs.params(), (1, dim))[0])
    rates = np.linspace(0, drop_path, depth) if depth else ()
    self.blocks = nnx.List(
      [Block(dim, sizes.decoder_heads, drop_path=float(rate), dtype=dtype, rngs=rngs) for rate in rates]
    )
    self.classifiers = nnx.List(
      [ActionClassifier(sizes, num_classes, dtype=dtype, rngs=rngs) for _ in range(max(depth, 1))]
    )


class ActionClassifier(nnx.Module):
  """Linear, LayerNorm, ReLU, Linear: ``[..., D]`` to ``[..., K]``."""

  def __init__(self, sizes: Variant, num_classes: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    dim, hidden = sizes.decoder_width, sizes.classifier_width
    bias = nnx.initializers.constant(RARE if sizes.from_scratch else 0.0)
    self.hidden = nnx.Linear(dim, hidden, use_bias=False, kernel_init=_XAVIER, dtype=dtype, rngs=rngs)
    self.norm = nnx.LayerNorm(hidden, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.logits = nnx.Linear(hidden, num_classes, kernel_init=_XAVIER, bias_init=bias, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """Action logits."""
    return self.logits(jax.nn.relu(self.norm(self.hidden(x))))


_XAVIER = nnx.initializers.xavier_uniform()


# --- Published weights ----------------------------------------------------------------------------------------------

# (our path, official name) as regular expressions; leaves are renamed and transposed by kind (see vad_jax.convert).
REFERENCE_NAMES = (
  *((rf"backbone\.{ours}", theirs) for ours, theirs in vit.REFERENCE_NAMES),
  (r"fpn\.(lateral|output)\.(\d+)\.(.*)", lambda m: f"fpn_{m[1]}{int(m[2]) + 2}.{m[3]}"),
  (r"proposals\.(boxes|features)", r"init_proposal_\1.weight"),
  (r"head\.(\d+)\.self_attn\.qkv\.(.*)", r"det_head.s0_headseries.\1.self_attn.in_proj_\2"),
  (r"head\.(\d+)\.self_attn\.proj\.(.*)", r"det_head.s0_headseries.\1.self_attn.out_proj.\2"),
  (r"head\.(\d+)\.(dynamic_layer|out_layer)\.(.*)", r"det_head.s0_headseries.\1.inst_interact.\2.\3"),
  (r"head\.(\d+)\.dynamic_(norm\d)\.(.*)", r"det_head.s0_headseries.\1.inst_interact.\2.\3"),
  (r"head\.(\d+)\.person\.(\d)\.(.*)", r"det_head.s0_headseries.\1.cls_module.\2.\3"),
  (
    r"head\.(\d+)\.box\.(\d)\.(.*)",
    lambda m: f"det_head.s0_headseries.{m[1]}.reg_module.{int(m[2]) // 2 * 3 + int(m[2]) % 2}.{m[3]}",
  ),
  (r"head\.(\d+)\.person_logits\.(.*)", r"det_head.s0_headseries.\1.class_logits.\2"),
  (r"head\.(\d+)\.box_deltas\.(.*)", r"det_head.s0_headseries.\1.bboxes_delta.\2"),
  (r"head\.(.*)", r"det_head.s0_headseries.\1"),
  (r"decoder\.proj\.(.*)", r"det_head.encoder_to_decoder.\1"),
  (r"decoder\.mask_token", r"det_head.mask_token"),
  (r"decoder\.classifiers\.(\d+)\.hidden\.(.*)", r"det_head.decoder.blocks.\1.act_module.0.\2"),
  (r"decoder\.classifiers\.(\d+)\.norm\.(.*)", r"det_head.decoder.blocks.\1.act_module.1.\2"),
  (r"decoder\.classifiers\.(\d+)\.logits\.(.*)", r"det_head.decoder.blocks.\1.action_logits.\2"),
  (r"decoder\.(blocks\..*)", r"det_head.decoder.\1"),
)


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for official weights, from the shapes of their tensors.

  Raises:
    ValueError: no variant has these sizes.
  """
  backbone = vit.reference_arguments(shapes)
  narrow, _ = shapes["det_head.encoder_to_decoder.weight"]
  wanted = (backbone["width"], backbone["depth"], narrow)
  fitting = [name for name, v in VARIANTS.items() if (v.width, v.depth, v.decoder_width) == wanted]
  if not fitting:
    raise ValueError(f"no variant of EVAD has width {wanted[0]}, depth {wanted[1]} and decoder width {wanted[2]}")
  num_classes = shapes["det_head.decoder.blocks.0.action_logits.weight"][0]
  return {"variant": fitting[0], "num_classes": num_classes, "num_queries": shapes["init_proposal_features.weight"][0]}
