"""RoIAlign and RoIPool by hand, and against Detectron2 and TensorFlow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_files, seeded
from vad_jax.ops.roi_align import box_levels, crop_and_resize, pyramid_roi_align, roi_align, roi_pool


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("bins", [7, 14])
@pytest.mark.parametrize("aligned", [True, False])
def test_equals_detectron2(aligned: bool, sampling_ratio: int, bins: int):
  """0 samples a bin means as many as it has cells."""
  recorded = golden_files.load("ops/roi_align")
  image, boxes = np.split(np.array(recorded["rois_batchidx_x1y1x2y2"]), [1], axis=1)
  tap = recorded["taps"][f"aligned={aligned},sampling_ratio={sampling_ratio},out={bins}x{bins}"]
  with jax.enable_x64(True):
    features = jnp.asarray(seeded.seeded(**recorded["feature"]), jnp.float64).transpose(0, 2, 3, 1)
    pooled = roi_align(
      features[image[:, 0].astype(int)],
      jnp.asarray(boxes)[:, None],
      scale=recorded["spatial_scale"],
      output_size=(bins, bins),
      sampling_ratio=sampling_ratio,
      aligned=aligned,
    )
    golden_files.assert_tap(pooled[:, 0].transpose(0, 3, 1, 2), tap, 1e-6)


def test_crop_and_resize_equals_tensorflow():
  recorded = golden_files.load("ops/crop_and_resize")
  features = seeded.seeded(recorded["feature"]["key"], recorded["feature"]["shape"])[recorded["box_index"]]
  boxes = jnp.array(recorded["boxes_y1x1y2x2_normalized"])[:, None, [1, 0, 3, 2]]
  crop = crop_and_resize(features, boxes, tuple(recorded["crop"]))
  golden_files.assert_tap(crop[:, 0], recorded["taps"]["crop14"], 2e-4)
  golden_files.assert_tap(roi_pool(features, boxes)[:, 0], recorded["taps"]["pool7"], 2e-4)


def test_crop_and_resize_by_hand():
  ramp = jnp.arange(9.0)[None, None, :, None] + 10 * jnp.arange(5.0)[None, :, None, None]
  crop = crop_and_resize(ramp, jnp.array([[[0.25, 0, 1, 0.5], [-0.5, 0, 0.5, 1]]]), (2, 3))[0, ..., 0]
  np.testing.assert_allclose(crop, [[[2, 5, 8], [22, 25, 28]], [[0, 0, 4], [0, 40, 44]]], rtol=1e-6)
  np.testing.assert_allclose(crop_and_resize(ramp, jnp.array([[[0.0, 0, 1, 1]]]), (1, 1)), 24)


def test_boxes_that_end_on_the_border_keep_their_last_samples():
  starts = jnp.linspace(0, 0.99, 500)
  boxes = jnp.stack([starts, starts, jnp.ones(500), jnp.ones(500)], -1)[None]
  for run in (crop_and_resize, jax.jit(crop_and_resize, static_argnums=2)):
    np.testing.assert_allclose(run(jnp.ones((1, 25, 19, 1)), boxes, (14, 14)), 1, rtol=1e-5)


def test_roi_align_by_hand():
  ramp = jnp.arange(8.0)[None, None, :, None] + 10 * jnp.arange(6.0)[None, :, None, None]
  box = jnp.array([[[2.0, 1.0, 6.0, 5.0]]])
  pooled = roi_align(ramp, box, scale=1.0, output_size=(2, 2))[0, 0, :, :, 0]
  # The centre of cell i is at i + 0.5: a bin of a ramp has the value at its centre.
  np.testing.assert_allclose(pooled, [[2.5 + 15, 4.5 + 15], [2.5 + 35, 4.5 + 35]], rtol=1e-6)


def test_far_outside_is_zero():
  ones = jnp.ones((1, 4, 4, 1))
  inside, outside, half = roi_align(ones, jnp.array([[[0.0, 0, 4, 4], [9, 9, 12, 12], [0, -8, 4, 8]]]), scale=1.0)[0]
  assert (inside == 1).all() and (outside == 0).all() and 0 < half.mean() < 1


def test_no_gradient_to_boxes():
  gradient = jax.grad(lambda box: roi_align(jnp.ones((1, 4, 4, 1)), box, scale=1.0).sum())(
    jnp.array([[[0.0, 0, 9, 9]]])
  )
  assert not gradient.any()


def test_levels_come_from_their_own_map():
  pyramid = [jnp.full((1, 64 // 2**level, 64 // 2**level, 1), float(level)) for level in range(4)]
  boxes = jnp.array([[[0.0, 0, 30, 30], [0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 500, 500]]])
  pooled, levels = pyramid_roi_align(pyramid, boxes, strides=(4, 8, 16, 32))
  assert levels.tolist() == [[0, 1, 2, 3]]
  assert pooled[0, :2].mean((1, 2, 3)).tolist() == [0, 1]
  assert box_levels(jnp.array([10.0, 10, 5, 20]), 4) == 0  # an inverted box has no size
