"""Positions and their resize; values against the reference are in tests/models/evad_parity_test.py."""

import numpy as np
import pytest

from tests import golden_files, seeded
from vad_jax.layers.position import bicubic_matrix, grid_box_bias, linear_matrix, sincos_positions, video_positions


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


def test_linear_resize_equals_pytorch() -> None:
  recorded = golden_files.load("mvit/relative_positions")
  table = seeded.seeded(recorded["input"]["key"], recorded["input"]["shape"])
  for length, tap in recorded["taps"].items():
    golden_files.assert_tap(linear_matrix(len(table), int(length)) @ table, tap, 1e-6, length)


@pytest.mark.parametrize("grid", ["16x16", "8x8", "14x14", "14x20", "18x18"])
def test_box_bias_equals_owl_vit(grid: str) -> None:
  bias = grid_box_bias(*map(int, grid.split("x"))).reshape(-1, 4)
  golden_files.assert_tap(bias, golden_files.load("mvit/grid_box_bias")[grid], 1e-6, grid)
