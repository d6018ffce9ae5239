"""Losses against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from vad_jax.ops import losses


def test_focal_loss():
  logits, labels = jnp.array([0.0, 2.0]), jnp.array([1.0, 0.0])
  p = 1 / (1 + np.exp(-2))
  np.testing.assert_allclose(
    losses.focal_loss(logits, labels), [0.25 * 0.25 * np.log(2), -0.75 * p**2 * np.log(1 - p)], rtol=1e-6
  )


def test_masked_sum_ignores_nan_forward_and_backward():
  def total(x):
    return losses.masked_sum(jnp.sqrt(x), jnp.array([True, False]))

  value, gradient = jax.value_and_grad(total)(jnp.array([4.0, 1.0]))
  assert value == 2 and gradient.tolist() == [0.25, 0]


def test_dense_loss_is_lowest_for_the_right_answer():
  boxes = jnp.array([[[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 16.0, 16.0]]])
  labels = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
  mask = jnp.array([[True, True]])
  right = np.full((1, 2, 4, 7), -9.0, np.float32)
  for row in range(2):
    for column in range(2):
      small = row == column == 0
      side = 16 if small else 32
      center = np.array([column * 16 + 8, row * 16 + 8])
      right[0, row, column, 0] = 9
      right[0, row, column, 1:5] = np.log(np.concatenate([center, side - center]) / 16)
      right[0, row, column, 5 + small] = 9
  loss = losses.dense_detection_loss(jnp.array(right), boxes, labels, mask, stride=16)
  assert loss < 2e-3
  for change in ((0, 0, 0, 0), (0, 1, 1, 2), (0, 0, 1, 6), (0, 1, 3, 0)):
    wrong = right.copy()
    wrong[change] = -wrong[change] if change[3] != 2 else wrong[change] + 1
    assert losses.dense_detection_loss(jnp.array(wrong), boxes, labels, mask, stride=16) > loss + 0.02
  assert losses.dense_detection_loss(jnp.array(right), boxes, labels, ~mask, stride=16) > 1
