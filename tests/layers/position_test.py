"""Positions and their resize; values against the reference are in tests/models/evad_parity_test.py."""

import numpy as np
import pytest

from tests import golden_files, seeded
from vad_jax.layers.position import (
  bicubic_matrix,
  grid_box_bias,
  linear_matrix,
  sincos_positions,
  video_positions,
  volume_positions,
)


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


def test_volume_positions_equal_the_official_ones() -> None:
  recorded = golden_files.load("class_query/positions")
  mask = np.ones((2, *recorded["pos3d"]["thw"][1:]), bool)
  h, w = recorded["pos3d"]["masked_sample"]["valid_hw"]
  mask[1, h:], mask[1, :, w:] = False, False
  positions = np.moveaxis(volume_positions(mask, 2, 256), -1, 1)
  for sample in range(2):
    golden_files.assert_tap(positions[sample], recorded["pos3d"][f"sample{sample}"], 2e-6, f"sample {sample}")
  full = np.array(recorded["pos3d_32"]["value_full_sample0"])
  small = volume_positions(mask[:1], 2, 32)
  assert small.dtype == np.float32
  np.testing.assert_allclose(np.moveaxis(small[0], -1, 0), full, atol=1e-6)
  with pytest.raises(ValueError, match="multiple of 8 channels, not 36"):
    volume_positions(mask, 2, 36)
