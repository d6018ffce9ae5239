"""Non-maximum suppression by hand, and of many boxes against a plain version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vad_jax.ops.nms import batched_nms, nms

BOXES = np.array([[0, 0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.02, 0, 0.42, 0.4], [0.2, 0, 0.6, 0.4]], np.float32)


def on_host(boxes, scores, threshold):
  return nms(np.asarray(boxes, np.float32), np.asarray(scores, np.float32), threshold).tolist()


def compiled(boxes, scores, threshold):
  boxes = np.asarray(boxes, np.float32)
  kept, valid = batched_nms(boxes, np.asarray(scores, np.float32), iou_threshold=threshold, count=len(boxes) + 1)
  assert not kept[~valid].any() and not valid[valid.sum() :].any()
  return kept[valid].tolist()


@pytest.mark.parametrize("suppress", [on_host, compiled])
class TestBoth:
  def test_keeps_the_best_of_overlapping_boxes(self, suppress):
    # Box 2 is box 0 moved by a twentieth (IoU 0.90); box 3 overlaps both by about a third.
    assert suppress(BOXES, [0.8, 0.3, 0.9, 0.7], 0.5) == [2, 3, 1]

  def test_a_dropped_box_drops_nothing(self, suppress):
    # Box 3 overlaps box 2 by 0.38, but box 2 is gone when its turn comes; with box 0 its IoU is 0.33.
    assert suppress(BOXES, [0.9, 0.3, 0.8, 0.7], 0.35) == [0, 3, 1]

  def test_equal_scores_keep_input_order(self, suppress):
    assert suppress(BOXES, np.ones(4), 1.0) == [0, 1, 2, 3]
    assert suppress(BOXES[[2, 0, 1, 0]], np.ones(4), 0.5) == [0, 2]

  def test_an_overlap_of_just_the_threshold_is_kept(self, suppress):
    assert suppress([[0, 0, 1, 1], [0, 0, 1, 0.5], [0, 0, 1, 0.625]], [3, 2, 1], 0.5) == [0, 1]

  def test_negative_scores(self, suppress):
    assert suppress(BOXES, [-5, -2, -3, -4], 0.5) == [1, 2, 3]

  def test_degenerate_boxes_are_never_kept_and_drop_nothing(self, suppress):
    nan, inf = np.nan, np.inf
    bad = [[0, 0, 0, 0], [0.4, 0, 0, 0.4], [0.4, 0.4, 0, 0], [0, 0, nan, 1], [-inf, -inf, inf, inf], *BOXES[[0, 0, 0]]]
    assert suppress([*bad, *BOXES], [9] * 5 + [nan, inf, -inf] + [1, 2, 3, 4], 0.5) == [11, 10, 9]


def test_no_boxes():
  assert nms(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


def plain_nms(boxes, scores, threshold):
  """All overlaps, one by one."""
  kept = []
  for i in sorted(np.flatnonzero(np.isfinite(scores)), key=lambda i: (-scores[i], i)):
    x1, y1, x2, y2 = boxes[i]
    overlaps = []
    for a1, b1, a2, b2 in boxes[kept]:
      overlap = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
      overlaps.append(overlap / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - overlap))
    if x2 > x1 and y2 > y1 and all(value <= threshold for value in overlaps):
      kept.append(i)
  return kept


@pytest.mark.parametrize("levels", [7, 1000])
def test_many_boxes(levels):
  """Whole coordinates and few levels of scores make equal, touching and empty boxes, and ties."""
  rng = np.random.default_rng(levels)
  corner = rng.integers(0, 12, (3, 200, 2))
  boxes = np.concatenate([corner, corner + rng.integers(0, 9, (3, 200, 2))], -1).astype(np.float32)
  scores = rng.integers(0, levels, (3, 200)).astype(np.float32)
  scores[:, :20] = -np.inf  # padding
  kept, valid = jax.jit(lambda *x: batched_nms(*x, iou_threshold=0.45, count=40))(boxes, scores)
  assert kept.shape == valid.shape == (3, 40) and kept.dtype == jnp.int32
  for image in range(3):
    expected = plain_nms(boxes[image], scores[image], 0.45)
    assert len(expected) > 20
    assert nms(boxes[image], scores[image], 0.45).tolist() == expected
    assert kept[image][valid[image]].tolist() == expected[:40]
