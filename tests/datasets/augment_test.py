"""Boxes stay on their people, whatever is done to a clip."""

import cv2
import numpy as np
import pytest

from vad_jax.datasets.augment import Augment, augment, color_gain, crop, flip_horizontal, place_on_canvas

BOXES = np.array([[0.1, 0.2, 0.3, 0.6], [0.5, 0.4, 0.95, 0.9]], np.float32)


def example(boxes=BOXES, size=(120, 160)):
  """A dark clip with a bright rectangle for each box, each in a colour channel of its own."""
  height, width = size
  video = np.zeros((2, height, width, 3), np.uint8)
  for index, box in enumerate(boxes):
    x1, y1, x2, y2 = (box * [width, height, width, height]).round().astype(int)
    video[:, y1:y2, x1:x2, index] = 200
  return {"video": video, "boxes": boxes, "labels": np.eye(len(boxes), 3, dtype=np.float32), "key": 7}


def drawn_box(frame, channel, size):
  """Normalised box of what is bright in a channel of a frame of which `size` is real."""
  rows, columns = np.nonzero(frame[..., channel] > 100)
  height, width = size
  return np.array([columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height])


@pytest.mark.parametrize("options", [Augment(1.0), Augment(0, (1.3, 1.3)), Augment(0.5, (0.5, 1.6))])
def test_boxes_follow_the_picture(options):
  checked = 0
  for seed in range(30):
    changed, scale = augment(example(), options, np.random.default_rng(seed))
    video, size = place_on_canvas(changed["video"], (96, 128), 90 * scale)
    for box, label in zip(changed["boxes"], changed["labels"], strict=True):
      found = drawn_box(video[1], label.argmax(), size)
      np.testing.assert_allclose(box, found, atol=0.03)
      checked += 1
  assert checked > 30


def test_flipping_twice_changes_nothing():
  once = flip_horizontal(example())
  twice = flip_horizontal(once)
  np.testing.assert_allclose(once["boxes"][0], [0.7, 0.2, 0.9, 0.6], atol=1e-6)
  np.testing.assert_allclose(twice["boxes"], BOXES, atol=1e-6)
  np.testing.assert_array_equal(twice["video"], example()["video"])


def test_people_mostly_outside_the_crop_are_dropped():
  left = np.array([[0.0, 0.0, 0.2, 1.0], [0.4, 0.2, 0.55, 0.8], [0.4, 0.2, 0.7, 0.8]], np.float32)
  cut = crop(example(left), 2.0, (0.0, 0.5))  # the left half: all, two thirds and one third of them
  np.testing.assert_array_equal(cut["labels"].argmax(1), [0, 1])
  np.testing.assert_allclose(cut["boxes"], [[0, 0, 0.4, 1], [0.8, 0, 1, 1]], atol=1e-6)
  assert cut["video"].shape == (2, 60, 80, 3)


def test_gain_is_by_channel_and_saturates():
  clip = {"video": np.full((1, 2, 2, 3), (100, 200, 50), np.uint8)}
  np.testing.assert_array_equal(color_gain(clip, np.array([1.1, 2.0, 0.5]))["video"][0, 0, 0], [110, 255, 25])


def test_the_input_is_left_alone_and_chance_decides():
  original = example()
  before = original["video"].copy()
  options = Augment(0.5, (0.7, 1.4), 0.3)
  first, again, other = (augment(original, options, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
  np.testing.assert_array_equal(original["video"], before)
  np.testing.assert_array_equal(first["video"], again["video"])
  assert first["video"].shape != other["video"].shape or (first["video"] != other["video"]).any()
  assert first["key"] == 7
  flips = [augment(original, Augment(0.25), np.random.default_rng(seed))[0]["boxes"][0, 0] > 0.5 for seed in range(400)]
  assert 0.18 < np.mean(flips) < 0.32
  same, scale = augment(original, Augment(0.0), np.random.default_rng(0))
  assert same["video"] is original["video"] and scale == 1


def test_switching_one_option_leaves_the_other_draws():
  plain, _ = augment(example(), Augment(0.5, (1.2, 1.8)), np.random.default_rng(3))
  coloured, _ = augment(example(), Augment(0.5, (1.2, 1.8), 0.2), np.random.default_rng(3))
  np.testing.assert_array_equal(plain["boxes"], coloured["boxes"])


@pytest.mark.parametrize(
  ("size", "canvas", "short_side", "expected"),
  [
    ((240, 320), (288, 512), 288, (288, 384)),
    ((320, 240), (512, 288), 288, (384, 288)),
    ((200, 800), (288, 512), 288, (128, 512)),  # the canvas has no room for the long side
    ((360, 641), (288, 544), 288, (288, 513)),  # 512.8
    ((96, 128), (96, 128), 96, (96, 128)),
  ],
)
def test_size_on_the_canvas(size, canvas, short_side, expected):
  video = np.full((2, *size, 3), 200, np.uint8)
  placed, found = place_on_canvas(video, canvas, short_side)
  assert found == expected and placed.shape == (2, *canvas, 3)
  assert (placed[:, : found[0], : found[1]] == 200).all()
  assert not placed[:, found[0] :].any() and not placed[:, :, found[1] :].any()


def test_resizing_is_bilinear():
  video = np.random.default_rng(0).integers(0, 255, (1, 48, 64, 3), dtype=np.uint8)
  placed, _ = place_on_canvas(video, (96, 128), 96)
  np.testing.assert_array_equal(placed[0], cv2.resize(video[0], (128, 96), interpolation=cv2.INTER_LINEAR))


@pytest.mark.parametrize("wrong", [{"flip": 2.0}, {"scale": (1.5, 1.0)}, {"scale": (0.0, 1.0)}, {"color": 1.0}])
def test_options_out_of_range_are_refused(wrong):
  with pytest.raises(ValueError, match="expected flip in"):
    Augment(**wrong)
