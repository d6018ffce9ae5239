"""Box geometry against numbers worked out by hand, on numpy and JAX arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from vad_jax.ops import boxes


@pytest.mark.parametrize("xp", [np, jnp])
def test_by_hand(xp):
  a = xp.array([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
  b = xp.array([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 3.0, 3.0]])
  np.testing.assert_allclose(boxes.area(a), [4, 1])
  np.testing.assert_allclose(boxes.iou(a, b), [1 / 7, 0], rtol=1e-6)
  np.testing.assert_allclose(boxes.generalized_iou(a, b), [1 / 7 - 2 / 9, -7 / 9], rtol=1e-6)
  np.testing.assert_allclose(boxes.xyxy_to_cxcywh(b), [[2, 2, 2, 2], [2.5, 2.5, 1, 1]])
  np.testing.assert_allclose(boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(a)), a)
  assert isinstance(boxes.iou(a, b), np.ndarray) == (xp is np)


def test_empty_boxes_give_zero_not_nan():
  empty = np.zeros((1, 4))
  assert boxes.iou(empty, empty) == 0 and boxes.generalized_iou(empty, empty) == 0


def test_deltas():
  box = np.array([[10.0, 10.0, 20.0, 30.0]])
  moved = boxes.apply_deltas(box, np.array([[1.0, -1.0, np.log(2.0), 0.0]]), weights=(2, 2, 1, 1))
  np.testing.assert_allclose(moved, [[10, 0, 30, 20]])
  assert np.isfinite(boxes.apply_deltas(box, np.full((1, 4), 1e4), weights=(1, 1, 1, 1))).all()


@pytest.mark.parametrize("xp", [np, jnp])
def test_deltas_between_boxes(xp):
  anchors = xp.array([[0.0, 0, 10, 20], [100, 100, 300, 200], [0, 0, 8, 8]])
  targets = xp.array([[5.0, 0, 25, 20], [-50, 90, 20, 320], [4, 4, 4, 4]])
  deltas = boxes.box_deltas(anchors, targets, weights=(10, 10, 5, 5))
  np.testing.assert_allclose(deltas[0], [10, 0, 5 * np.log(2), 0], rtol=1e-6)
  assert np.isfinite(deltas).all()  # the last target is empty
  moved = boxes.apply_deltas(anchors, deltas, weights=(10, 10, 5, 5))
  np.testing.assert_allclose(moved, targets, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("xp", [np, jnp])
def test_clip(xp):
  given = xp.array([[[-1.0, 2, 30, 8], [9, 25, 12, 40]], [[-3, -3, -1, 50], [1, 1, 2, 2]]])
  clipped = boxes.clip_boxes(given, np.array([[20, 10], [5, 5]])[:, None])
  np.testing.assert_array_equal(clipped, [[[0, 2, 10, 8], [9, 20, 10, 20]], [[0, 0, 0, 5], [1, 1, 2, 2]]])
