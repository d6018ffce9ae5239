import numpy as np

from vad_jax.ops.anchors import anchor_boxes
from vad_jax.ops.boxes import area, xyxy_to_cxcywh


def test_order():
  """Cells row by row, in each all scales of the first ratio before those of the next."""
  anchors = xyxy_to_cxcywh(anchor_boxes((2, 3))).reshape(2, 3, 12, 4)
  np.testing.assert_allclose(anchors[1, 2, :, :2], [[32, 16]] * 12, atol=1e-4)
  np.testing.assert_allclose(anchors[0, 1, 4:8, 2:], [[64, 64], [128, 128], [256, 256], [512, 512]], rtol=1e-6)
  tall, wide = [45.254834, 90.509668], [90.509668, 45.254834]
  np.testing.assert_allclose(anchors[0, 0, [0, 8], 2:], [tall, wide], rtol=1e-6)


def test_detector_at_400_pixels():
  anchors = anchor_boxes((25, 25))
  assert anchors.shape == (7500, 4) and anchors.dtype == np.float32
  np.testing.assert_allclose(anchors[5], [-64, -64, 64, 64])
  np.testing.assert_allclose(
    area(anchors).reshape(625, 3, 4), np.broadcast_to([64**2, 128**2, 256**2, 512**2], (625, 3, 4)), rtol=1e-4
  )


def test_other_sizes():
  anchors = anchor_boxes((1, 2), stride=8, base=10, scales=(1, 2), ratios=(4,))
  np.testing.assert_allclose(anchors, [[-10, -2.5, 10, 2.5], [-20, -5, 20, 5], [-2, -2.5, 18, 2.5], [-12, -5, 28, 5]])
