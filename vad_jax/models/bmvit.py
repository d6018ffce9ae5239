"""BMViT: the tokens of a video transformer are the detections. No queries, no decoder, no proposals.

Paper: Ntinou et al., "Multiscale Vision Transformers meet Bipartite Matching for efficient single-stage Action
Localization", CVPR 2024 (Figure 2).

    video [B, T, H, W, 3] -> backbone -> tokens [B, t, h, w, C]
      detection tokens [B, N, C] -> box head -> boxes [B, N, 4], each near the place of its token
                                 -> actor head -> actor or not [B, N, 2]
      action tokens    [B, N, C] -> action head -> action logits [B, N, K]
    training matches tokens to actors one to one

Detection and action tokens correspond one to one, but need not be the same (section 3.2): by default the two time
slices around the keyframe say where actors are, and the means over the past and over the future what they do.

No code was ever published. What the paper leaves open is decided here:

* The last pooling of MViTv2-S is left out where queries are pooled; keys and values of its last two blocks keep the
  stride of one that published weights have. Only this reading gives the cost in Table 1a.
* Heads have three linear layers of the tokens' width with GELU between them, as in OWL-ViT; the last one of the box
  head starts at zero, so that training starts from boxes of one patch.
* The keyframe lies in time slice ``t // 2``; its partner is the slice before.
* Equation 3 is a sum over all tokens. We divide it by the number of actors in the batch; cross-entropies of actions are
  means over the classes. Tokens without actor shall have no action, as printed. The cost of a match (equation 1) has
  the same terms and weights, for the boxes that exist.
* The score of an action is its own probability; actors below 0.2 are dropped (see ``evaluate``). There is no NMS.

The input is best a fixed square, whatever the shape of the video (Table 1c). Padded frames work too: tokens in the
padding are neither matched nor detected, but the others may attend to them.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vad_jax.backbones import hiera, mvit
from vad_jax.backbones.hiera import Hiera
from vad_jax.backbones.mvit import MViT
from vad_jax.backbones.vit import ViT
from vad_jax.batch import Array, Batch, Detections
from vad_jax.layers.attention import attend
from vad_jax.layers.position import grid_box_bias
from vad_jax.models._options import check_options
from vad_jax.ops import boxes as box_ops
from vad_jax.ops import losses
from vad_jax.ops.pixels import normalize

Selection = Literal["centre", "2(c+t)", "tubelet", "singleton", "max_class"]
SELECTIONS = ("centre", "2(c+t)", "tubelet", "singleton", "max_class")


class Variant(NamedTuple):
  """A backbone and what belongs to it.

  Attributes:
    backbone: its class.
    sizes: arguments of its constructor.
    tokens: which tokens are used.
    attend: the action tokens are the detection tokens after they have attended to all of the clip (section 6.1).
    pixel_mean, pixel_std: of RGB in [0, 1].
  """

  backbone: type[Any]
  sizes: Mapping[str, Any]
  tokens: Selection = "2(c+t)"
  attend: bool = False
  pixel_mean: tuple[float, ...] = (0.45, 0.45, 0.45)
  pixel_std: tuple[float, ...] = (0.225, 0.225, 0.225)


_IMAGENET = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
VARIANTS = {
  "mvitv2_s": Variant(MViT, mvit.VARIANTS["mvitv2_s"]),
  "vit_b": Variant(ViT, {"width": 768, "depth": 12, "heads": 12}, "centre", attend=True, **_IMAGENET),
  "hiera_l": Variant(Hiera, hiera.VARIANTS["large"]),
  "tiny": Variant(MViT, {**mvit.VARIANTS["tiny"], "trained_size": (8, 96, 96)}),
  "tiny_vit": Variant(ViT, {"width": 128, "depth": 4, "heads": 4, "stem": "convolution"}, "centre", attend=True),
}


class BMViT(nnx.Module):
  """The detector; see the module's docstring. Parameters live in backbone, box, actor, action (and attention)."""

  class_parameters = r"action\.layers\.2\..*"

  def __init__(
    self,
    *,
    num_classes: int = 80,
    variant: str = "mvitv2_s",
    tokens: Selection | None = None,
    last_pool: bool = False,
    action_weight: float = 6.0,
    drop_path: float = 0.2,
    remat: bool = False,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      num_classes: ``K``.
      variant: one of ``VARIANTS``.
      tokens: which tokens detect and which classify (Table 1b); None takes the variant's.
      last_pool: keep the last pooling of a hierarchical backbone (Table 1a).
      action_weight: of the cross-entropy of actions, in loss and matching (section 4).
      drop_path: stochastic depth of the backbone's last block.
      remat: recompute blocks in the backward pass instead of storing their activations.
      dtype: computation type, "float32" or "bfloat16"; parameters and losses stay float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an option has a value that does not exist.
    """
    check_options(
      variant=(variant, VARIANTS),
      tokens=(tokens, (None, *SELECTIONS)),
      dtype=(dtype, ("float32", "bfloat16")),
    )
    sizes = VARIANTS[variant]
    compute = jnp.bfloat16 if dtype == "bfloat16" else None
    self.num_classes, self.action_weight, self.compute_dtype = num_classes, action_weight, compute
    self.tokens: Selection = tokens or sizes.tokens
    self.pixels = sizes.pixel_mean, sizes.pixel_std
    pooling: dict[str, Any] = {} if sizes.backbone is ViT else {"last_pool": last_pool}
    self.backbone = sizes.backbone(**sizes.sizes, **pooling, drop_path=drop_path, remat=remat, dtype=compute, rngs=rngs)
    width = self.backbone.width
    self.box = Head(width, 4, dtype=compute, rngs=rngs)
    self.actor = Head(width, 2, bias=(_RARE, 0.0), dtype=compute, rngs=rngs)
    self.action = Head(width, num_classes, bias=_RARE, dtype=compute, rngs=rngs)
    self.attention = CrossAttention(width, width // 64, dtype=compute, rngs=rngs) if sizes.attend else None

  def __call__(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> dict[str, Any]:
    """Runs the network.

    Args:
      batch: uses ``video`` and ``video_size``.
      rngs: stream ``dropout``; needed for drop path in training.

    Returns:
      ``boxes`` ``[B, N, 4]`` xyxy in [0, 1] of the unpadded frame (they may leave it), ``actor_logits`` ``[B, N, 2]``
      (actor first), ``action_logits`` ``[B, N, K]``, ``token_mask`` ``[B, N]`` (False in the padding), ``actor_map``
      ``[B, s, h, w]`` (probability of an actor at every token that detects), and the tokens of every step.
    """
    mean, std = self.pixels
    video, _ = normalize(batch["video"], batch["video_size"], mean=mean, std=std, dtype=self.compute_dtype)
    features = self.backbone(video, rngs)
    detecting, acting = select_tokens(features, self.tokens)
    count, slices, h, w, width = detecting.shape
    flat = detecting.reshape(count, -1, width)
    exact = jnp.promote_types(flat.dtype, jnp.float32)
    boxes = self.box(flat).astype(exact) + jnp.tile(jnp.asarray(grid_box_bias(h, w), exact).reshape(-1, 4), (slices, 1))
    actor_logits = self.actor(flat).astype(exact)
    if self.attention is not None:
      acting = self.attention(flat, features.reshape(count, -1, width)).reshape(detecting.shape)
    action_logits = self.action(acting).astype(exact)
    if self.tokens == "max_class":
      action_logits = action_logits.max(1)

    padded = jnp.array(video.shape[2:4])
    share = jnp.maximum(jnp.asarray(batch["video_size"]), 1) / padded  # [B, 2] of height and width that is real
    y, x = ((jnp.arange(n) + 0.5) / n < share[:, axis, None] for axis, n in enumerate((h, w)))
    return {
      "features": features,
      "detection_tokens": detecting,
      "action_tokens": acting,
      "boxes": box_ops.cxcywh_to_xyxy(jax.nn.sigmoid(boxes)) / jnp.tile(share[:, None, ::-1], 2).astype(exact),
      "actor_logits": actor_logits,
      "action_logits": action_logits.reshape(count, -1, self.num_classes),
      "token_mask": jnp.tile((y[:, :, None] & x[:, None]).reshape(count, -1), (1, slices)),
      "actor_map": jax.nn.softmax(actor_logits)[..., 0].reshape(count, slices, h, w),
    }

  def costs(self, out: dict[str, Any], batch: Batch) -> Array:
    """Matching costs ``[B, N, M]`` of equation 1."""
    labels = jnp.asarray(batch["labels"])
    l1, giou = box_distances(out["boxes"], jnp.asarray(batch["boxes"]))
    actor = losses.binary_cross_entropy(_odds(out["actor_logits"]), 1.0)[..., None]
    action = jax.nn.softplus(out["action_logits"]).sum(-1, keepdims=True)
    action = (action - jnp.einsum("bnk,bmk->bnm", out["action_logits"], labels)) / self.num_classes
    cost = _L1 * l1 + _GIOU * (1 - giou) + _ACTOR * actor + self.action_weight * action
    return jnp.where(out["token_mask"][..., None], cost, _NEVER)

  def loss(self, out: dict[str, Any], batch: Batch, match: Array) -> tuple[Array, dict[str, Array]]:
    """Equation 3, over the number of actors.

    Args:
      out: what the network returned.
      batch: uses ``boxes``, ``labels``, ``box_mask`` and ``key`` (rows of key -1 do not count).
      match: ``[B, N, M]`` bool, which token is which actor.

    Returns:
      Scalar, and its weighted terms by name.
    """
    real = jnp.asarray(batch["key"]) >= 0
    actors = jnp.asarray(batch["box_mask"]) & real[:, None]
    # What stands in padded slots must not even reach the arithmetic: NaN times zero is NaN in the gradient.
    targets = jnp.where(actors[..., None], batch["boxes"], 0.5)
    labels = jnp.where(actors[..., None], batch["labels"], 0)
    match = match & real[:, None, None]
    tokens = out["token_mask"] & real[:, None]
    count = jnp.maximum(actors.sum(), 1)

    l1, giou = box_distances(out["boxes"], targets)
    actor = losses.binary_cross_entropy(_odds(out["actor_logits"]), match.any(-1))
    wanted = jnp.einsum("bnm,bmk->bnk", match.astype(labels.dtype), labels)
    action = losses.binary_cross_entropy(out["action_logits"], wanted).mean(-1)
    terms = {
      "loss_box": _L1 * losses.masked_sum(l1, match) / count,
      "loss_giou": _GIOU * losses.masked_sum(1 - giou, match) / count,
      "loss_actor": _ACTOR * losses.masked_sum(actor, tokens) / count,
      "loss_action": self.action_weight * losses.masked_sum(action, tokens) / count,
    }
    return jnp.asarray(sum(terms.values())), terms

  def detections(self, out: dict[str, Any], batch: Batch) -> Detections:
    """All tokens outside the padding: boxes clipped to the frame, actor and action probabilities."""
    return Detections(
      jnp.clip(out["boxes"], 0, 1),
      jax.nn.softmax(out["actor_logits"])[..., 0],
      jax.nn.sigmoid(out["action_logits"]),
      out["token_mask"] & (jnp.asarray(batch["key"])[:, None] >= 0),
    )

  def maps(self, out: dict[str, Any], batch: Batch) -> dict[str, Array]:
    """Where the network sees actors: the highest probability of the tokens at a place (Figure 3)."""
    return {"actor": out["actor_map"].max(1)}


# --- Parts of the network -------------------------------------------------------------------------------------------


def select_tokens(features: Array, selection: Selection) -> tuple[Array, Array]:
  """Chooses what detects and what classifies (section 3.2, Table 1b).

  Args:
    features: ``[B, t, h, w, C]``.
    selection: one of ``SELECTIONS``.

  Returns:
    Detection tokens ``[B, s, h, w, C]``, and action tokens of the same shape ("max_class" keeps all slices of these).
  """
  keyframe = features.shape[1] // 2
  center, mean = features[:, keyframe : keyframe + 1], features.mean(1, keepdims=True)
  if selection == "centre":
    return center, mean
  if selection == "tubelet":
    return mean, mean
  if selection == "singleton":
    return features, features
  if selection == "max_class":
    return center, features
  past, future = features[:, :keyframe].mean(1), features[:, keyframe:].mean(1)
  return features[:, keyframe - 1 : keyframe + 1], jnp.stack([past, future], 1)


class Head(nnx.Module):
  """Three linear layers with GELU between them: ``[..., C]`` to ``[..., size]``."""

  def __init__(self, width: int, size: int, *, bias: Any = 0.0, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    self.layers = nnx.List([nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(2)])
    start = nnx.initializers.zeros_init()
    first = lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(bias, dtype), shape)  # noqa: E731
    self.layers.append(nnx.Linear(width, size, kernel_init=start, bias_init=first, dtype=dtype, rngs=rngs))

  def __call__(self, x: Array) -> Array:
    """What the head says of every token."""
    for layer in self.layers[:-1]:
      x = jax.nn.gelu(layer(x), approximate=False)
    return self.layers[-1](x)


class CrossAttention(nnx.Module):
  """Plain multi-head attention of some tokens to others, without a feed-forward part."""

  def __init__(self, width: int, heads: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    self.heads = heads
    self.query, self.key, self.value, self.proj = (nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4))

  def __call__(self, x: Array, context: Array) -> Array:
    """``[B, N, C]`` that attends to ``[B, L, C]``, added to itself."""
    split = lambda tokens: tokens.reshape(*tokens.shape[:2], self.heads, -1)  # noqa: E731
    found = attend(split(self.query(x)), split(self.key(context)), split(self.value(context)))
    return x + self.proj(found.reshape(x.shape))


_GIOU, _L1, _ACTOR = 2.0, 5.0, 2.0  # weights of equations 1 and 3
_NEVER = 1e6  # cost of a token that must not be matched
_RARE = -math.log(99)  # logit of 1 %: what the network first thinks of every actor and action


def box_distances(predicted: Array, targets: Array) -> tuple[Array, Array]:
  """L1 distance of centre and size, and GIoU, of xyxy boxes ``[B, N, 4]`` to ``[B, M, 4]``; both ``[B, N, M]``."""
  _, giou = losses.box_costs(predicted, targets)
  a, b = box_ops.xyxy_to_cxcywh(predicted), box_ops.xyxy_to_cxcywh(targets)
  return jnp.abs(a[:, :, None] - b[:, None]).sum(-1), giou


def _odds(logits: Array) -> Array:
  """Logit of the probability that a softmax gives to the first of two."""
  return logits[..., 0] - logits[..., 1]
