"""RoIAlign by hand; the comparison with the reference is in tests/models/evad_parity_test.py."""

import jax
import jax.numpy as jnp
import numpy as np

from vad_jax.ops.roi_align import box_levels, pyramid_roi_align, roi_align


def test_ramp():
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
