"""Positions and their resize; values against the reference are in tests/models/evad_parity_test.py."""

import numpy as np

from vad_jax.layers.position import bicubic_matrix, sincos_positions, video_positions


def test_sine_and_cosine():
  table = sincos_positions(10, 6)
  assert table.dtype == np.float32
  np.testing.assert_allclose(
    table[3], [np.sin(3), np.cos(3), *(f(3 / 10000 ** (i / 6)) for i in (2, 4) for f in (np.sin, np.cos))], rtol=1e-6
  )


def test_bicubic():
  np.testing.assert_allclose(bicubic_matrix(5, 5), np.eye(5), atol=1e-12)
  for target in (3, 9, 14):
    np.testing.assert_allclose(bicubic_matrix(14, target).sum(1), 1)


def test_other_grids_are_resized_unless_the_count_agrees():
  assert video_positions(8, (2, 6, 6), 4).shape == (2, 6, 6, 8)
  same_count = video_positions(8, (2, 2, 8), 4)
  np.testing.assert_array_equal(same_count.reshape(32, 8), sincos_positions(32, 8))
