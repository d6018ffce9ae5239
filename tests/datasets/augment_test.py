"""Boxes stay on their people, whatever is done to a clip."""

import cv2
import numpy as np
import pytest

from vad_jax.datasets.augment import (
  Augment,
  augment,
  choose_canvas,
  crop,
  flip_horizontal,
  jitter_color,
  place_on_canvas,
)

BOXES = np.array([[0.1, 0.2, 0.3, 0.6], [0.5, 0.4, 0.95, 0.9]], np.float32)


def example(boxes=BOXES, size=(120, 160)):
  """A dark clip with a bright rectangle for each box, each in a colour channel of its own."""
  height, width = size
  video = np.zeros((2, height, width, 3), np.uint8)
  for index, box in enumerate(boxes):
    x1, y1, x2, y2 = (box * [width, height, width, height]).round().astype(int)
    video[:, y1:y2, x1:x2, index] = 200
  labels, mask = np.eye(len(boxes), 3, dtype=np.float32), np.ones(len(boxes), bool)
  return {"video": video, "boxes": boxes, "labels": labels, "box_mask": mask, "key": 7}


def drawn_box(frame, channel, size):
  """Normalised box of what is bright in a channel of a frame of which `size` is real."""
  rows, columns = np.nonzero(frame[..., channel] > 100)
  height, width = size
  return np.array([columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height])


@pytest.mark.parametrize(
  "options",
  [
    Augment(1.0),
    Augment(0, (1.3, 1.3)),
    Augment(0.5, (0.5, 1.6)),
    Augment(0.5, (256 / 224, 320 / 224), square=True),
    Augment(0.5, (0.6, 1.2), 0.2, square=True, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
  ],
)
def test_boxes_follow_the_picture(options):
  checked = 0
  for seed in range(30):
    changed, scale = augment(example(), options, np.random.default_rng(seed))
    video, size = place_on_canvas(changed["video"], (96, 128), 90, scale)
    assert not options.square or size[0] == size[1]
    for box, label in zip(changed["boxes"][changed["box_mask"]], changed["labels"][changed["box_mask"]], strict=True):
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
  np.testing.assert_array_equal(cut["box_mask"], [True, True, False])
  np.testing.assert_allclose(cut["boxes"][:2], [[0, 0, 0.4, 1], [0.8, 0, 1, 1]], atol=1e-6)
  assert cut["video"].shape == (2, 60, 80, 3)


def test_gain_is_by_channel_and_saturates():
  clip = {"video": np.full((1, 2, 2, 3), (100, 200, 50), np.uint8)}
  np.testing.assert_array_equal(jitter_color(clip, np.array([1.1, 2.0, 0.5]))["video"][0, 0, 0], [110, 255, 25])


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


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"flip": 2.0}, "expected flip in"),
    ({"scale": (1.5, 1.0)}, "expected flip in"),
    ({"scale": (0.0, 1.0)}, "expected flip in"),
    ({"contrast": 1.0}, "expected color, brightness, contrast"),
    ({"hue": 0.6}, "expected hue"),
    ({"box_jitter": 0.5}, "expected hue in .* and box_jitter"),
  ],
)
def test_options_out_of_range_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    Augment(**wrong)


def test_contrast_keeps_the_mean_grey_and_saturation_the_grey_of_every_pixel():
  clip = {"video": np.random.default_rng(0).integers(60, 180, (2, 8, 8, 3), dtype=np.uint8)}
  luma = np.array([0.299, 0.587, 0.114])
  flat = jitter_color(clip, np.ones(3), contrast=0.5)["video"]
  assert (flat @ luma).mean() == pytest.approx((clip["video"] @ luma).mean(), abs=0.5)
  assert flat.std() == pytest.approx(clip["video"].std() / 2, rel=0.02)
  grey = jitter_color(clip, np.ones(3), saturation=0.0)["video"]
  np.testing.assert_allclose(grey, np.repeat((clip["video"] @ luma)[..., None], 3, -1), atol=1)


def test_hue_turns_colours_and_leaves_grey():
  colours = np.array([[200, 80, 80], [80, 200, 80], [90, 90, 90]], np.uint8)
  third = jitter_color({"video": colours[None, None]}, np.ones(3), hue=1 / 3)["video"][0, 0]
  np.testing.assert_allclose(third, [[80, 200, 80], [80, 80, 200], [90, 90, 90]], atol=1)


def test_box_jitter_stays_near_the_person_and_leaves_the_picture():
  options = Augment(0.0, box_jitter=0.1)
  for seed in range(50):
    changed, _ = augment(example(), options, np.random.default_rng(seed))
    size = np.tile(BOXES[:, 2:] - BOXES[:, :2], 2)
    assert (np.abs(changed["boxes"] - BOXES) <= 0.1 * size + 1e-6).all()
    assert changed["boxes"].min() >= 0 and changed["boxes"].max() <= 1
    assert (changed["boxes"] != BOXES).any()
    np.testing.assert_array_equal(changed["video"], example()["video"])


def test_tubes_and_proposals_move_with_the_picture():
  still = example()
  tubes = {
    **still,
    "boxes": np.stack([BOXES, BOXES]),
    "box_mask": np.array([[True, True], [False, True]]),
    "proposals": BOXES,
    "proposal_mask": np.ones(2, bool),
  }
  options = Augment(0.5, (0.8, 2.0), box_jitter=0.2)
  for seed in range(20):
    plain, _ = augment(still, options, np.random.default_rng(seed))
    moved, _ = augment(tubes, options, np.random.default_rng(seed))
    unshaken, _ = augment(still, Augment(0.5, (0.8, 2.0)), np.random.default_rng(seed))
    np.testing.assert_array_equal(moved["video"], plain["video"])
    np.testing.assert_array_equal(moved["boxes"], [plain["boxes"]] * 2)  # one shift for all frames of a tube
    np.testing.assert_array_equal(moved["box_mask"], tubes["box_mask"] & plain["box_mask"])
    np.testing.assert_array_equal(moved["proposals"], unshaken["boxes"])
    np.testing.assert_array_equal(moved["proposal_mask"], unshaken["box_mask"])


def test_a_square_is_cut_from_frames_of_any_shape():
  for size in ((120, 160), (160, 90)):
    cut = crop(example(size=size), 1.5, (1.0, 1.0), square=True)
    assert cut["video"].shape[1:3] == (round(min(size) / 1.5),) * 2
    np.testing.assert_array_equal(cut["video"][:, -1, -1], example(size=size)["video"][:, -1, -1])


def test_stretching_fills_the_canvas():
  video = np.full((2, 120, 160, 3), 200, np.uint8)
  placed, size = place_on_canvas(video, (96, 96), None)
  assert size == (96, 96) and (placed == 200).all()
  placed, size = place_on_canvas(video, (96, 96), None, 0.5)
  assert size == (48, 48) and not placed[:, 48:].any()


def test_the_canvas_that_a_video_fills_best_is_chosen():
  canvases = [(288, 512), (288, 384), (512, 288)]
  chosen = [choose_canvas(size, canvases, 288) for size in ((360, 640), (240, 320), (640, 360), (100, 240), (90, 90))]
  assert chosen == [(288, 512), (288, 384), (512, 288), (288, 512), (288, 384)]
