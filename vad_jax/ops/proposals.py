"""Training of box proposals in two-stage detectors: whose each box is, and a balanced random choice among them."""

import jax
import jax.numpy as jnp

from vad_jax.batch import Array
from vad_jax.ops.boxes import iou


def assign(
  boxes: Array, usable: Array, targets: Array, target_mask: Array, *, low: float, high: float, force: bool = False
) -> tuple[Array, Array, Array]:
  """Tells boxes of a target from background, as TensorFlow's object detection API does. No gradient flows.

  Args:
    boxes: ``[..., N, 4]`` xyxy.
    usable: ``[..., N]`` bool, False for boxes that are neither.
    targets: ``[..., M, 4]`` xyxy.
    target_mask: ``[..., M]`` bool, False for padding.
    low: a box is background where no target overlaps it by this IoU.
    high: a box is of the target that it overlaps most, if by this IoU or more.
    force: the box that overlaps a target most is of that target in any case (the first one of several targets), unless
      nothing overlaps it.

  Returns:
    Index ``[..., N]`` of the box's target (0 where it has none), and which boxes are of a target, and which background;
    both ``[..., N]`` bool.
  """
  boxes, targets = jax.lax.stop_gradient((boxes, targets))
  possible = usable[..., None] & target_mask[..., None, :]
  overlap = jnp.where(possible, iou(boxes[..., None, :], targets[..., None, :, :]), 0)  # [..., N, M]
  owner, most = overlap.argmax(-1), overlap.max(-1)
  positive = most >= high
  if force:
    best = (jnp.arange(overlap.shape[-2])[:, None] == overlap.argmax(-2)[..., None, :]) & (overlap > 0)
    owner = jnp.where(best.any(-1), best.argmax(-1), owner)
    positive |= best.any(-1)
  return jnp.where(positive, owner, 0), positive, usable & ~positive & (most < low)


def choose_balanced(positive: Array, negative: Array, priority: Array, *, count: int, positive_share: float) -> Array:
  """Chooses boxes to learn from: positive ones up to their share, and negative ones for all that is left.

  Args:
    positive: ``[..., N]`` bool.
    negative: the same.
    priority: ``[..., N]``, the lowest is chosen first (equal ones in order); random numbers for a random choice.
    count: how many to choose at most.
    positive_share: of them that may be positive.

  Returns:
    ``[..., N]`` bool.
  """

  def first(mask: Array, most: Array | int) -> Array:
    order = jnp.argsort(jnp.where(mask, priority, jnp.inf))
    return mask & (jnp.argsort(order) < most)

  chosen = first(positive, int(count * positive_share))
  return chosen | first(negative, count - chosen.sum(-1, keepdims=True))
