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
