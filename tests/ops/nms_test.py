import numpy as np

from vad_jax.ops.nms import nms

BOXES = np.array([[0, 0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.02, 0, 0.42, 0.4], [0.2, 0, 0.6, 0.4]], np.float32)


def test_keeps_the_best_of_overlapping_boxes():
  # Box 2 is box 0 moved by a twentieth (IoU 0.90); box 3 overlaps both by about a third.
  assert nms(BOXES, np.array([0.8, 0.3, 0.9, 0.7]), 0.5).tolist() == [2, 3, 1]


def test_a_dropped_box_drops_nothing():
  # Box 3 overlaps box 2 by 0.38, but box 2 is gone when its turn comes; with box 0 its IoU is 0.33.
  assert nms(BOXES, np.array([0.9, 0.3, 0.8, 0.7]), 0.35).tolist() == [0, 3, 1]


def test_equal_scores_keep_input_order():
  assert nms(BOXES, np.ones(4), 1.0).tolist() == [0, 1, 2, 3]


def test_no_boxes():
  assert nms(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []
