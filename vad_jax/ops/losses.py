"""Losses and matching costs shared by the systems; static shapes, padded targets never count."""

import jax
import jax.numpy as jnp
import optax

from vad_jax.batch import Array
from vad_jax.ops import boxes as box_ops


def binary_cross_entropy(logits: Array, labels: Array) -> Array:
  """Element-wise sigmoid cross-entropy, computed in at least float32."""
  return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), labels)


def focal_loss(logits: Array, labels: Array, *, alpha: float = 0.25, gamma: float = 2.0) -> Array:
  """Element-wise sigmoid focal loss (Lin et al., ICCV 2017)."""
  probability = jax.nn.sigmoid(logits)
  wrong = labels * (1 - probability) + (1 - labels) * probability
  weight = labels * alpha + (1 - labels) * (1 - alpha)
  return weight * wrong**gamma * binary_cross_entropy(logits, labels)


def box_costs(predicted: Array, targets: Array) -> tuple[Array, Array]:
  """L1 distance and generalised IoU of every prediction to every target.

  Args:
    predicted: ``[..., N, 4]`` normalised xyxy.
    targets: ``[..., M, 4]`` normalised xyxy; leading shapes broadcast.

  Returns:
    L1 summed over the coordinates, and GIoU; both ``[..., N, M]``.
  """
  a, b = predicted[..., :, None, :], targets[..., None, :, :]
  return jnp.abs(a - b).sum(-1), box_ops.generalized_iou(a, b)


def masked_sum(values: Array, mask: Array, axis: tuple[int, ...] | int | None = None) -> Array:
  """Sum of the entries where the mask (broadcastable) is true; what is masked out may be NaN, its gradient is zero."""
  return jnp.where(mask, values, 0).sum(axis)


def dense_detection_loss(predicted: Array, boxes: Array, labels: Array, mask: Array, *, stride: int) -> Array:
  """Loss of a map whose every cell says whether it is an actor's, where that actor is and what it does.

  A cell belongs to the smallest actor whose box holds its centre, and predicts the distances to that box's sides (as in
  FCOS, Tian et al., ICCV 2019): nothing has to be matched, so it teaches a network that starts from scratch.

  Args:
    predicted: ``[B, h, w, 1 + 4 + K]`` actor logit, log distances to the sides in strides, action logits.
    boxes: ``[B, M, 4]`` xyxy in pixels.
    labels: ``[B, M, K]``.
    mask: ``[B, M]`` bool, False for padded actors.
    stride: pixels per cell.

  Returns:
    Focal loss of all cells, plus GIoU loss and summed cross-entropy of actions, over the number of actors' cells.
  """
  rows, columns = jnp.meshgrid(jnp.arange(predicted.shape[1]), jnp.arange(predicted.shape[2]), indexing="ij")
  center = (jnp.stack([columns, rows], -1)[:, :, None] + 0.5) * stride  # [h, w, 1, 2]
  boxes = boxes[:, None, None]  # [B, 1, 1, M, 4]
  inside = ((center > boxes[..., :2]) & (center < boxes[..., 2:])).all(-1) & mask[:, None, None]
  owner = jnp.argmin(jnp.where(inside, box_ops.area(boxes), jnp.inf), -1)[..., None, None]
  actor = inside.any(-1)
  count = jnp.maximum(actor.sum(), 1)

  target = jnp.take_along_axis(boxes, owner, axis=3)[..., 0, :]
  distance = jnp.exp(jnp.clip(predicted[..., 1:5], -5, 5)) * stride
  box = jnp.concatenate([center[:, :, 0] - distance[..., :2], center[:, :, 0] + distance[..., 2:]], -1)
  actions = jnp.take_along_axis(labels[:, None, None], owner, axis=3)[..., 0, :]
  entropy = binary_cross_entropy(predicted[..., 5:], actions).sum(-1)
  per_actor = masked_sum(1 - box_ops.generalized_iou(box, target) + entropy, actor)
  return (focal_loss(predicted[..., 0], actor.astype(predicted.dtype)).sum() + per_actor) / count


def person_cross_entropy(logits: Array, person: Array, real: Array) -> Array:
  """Softmax cross-entropy ``[B, N, 2]``, background weighing 0.1, over the sum of weights; ``real`` ``[B, 1]``."""
  log_probability = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -1)
  weight = jnp.where(person, 1.0, 0.1) * real
  entropy = -jnp.where(person, log_probability[..., 0], log_probability[..., 1])
  return (weight * entropy).sum() / jnp.maximum(weight.sum(), 1e-6)
