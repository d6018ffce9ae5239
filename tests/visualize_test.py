"""Drawing: nothing leaves the picture, nothing is written over, the input stays as it is."""

from unittest import mock

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vad_jax import visualize
from vad_jax.visualize import color_of, contact_sheet, draw_detections, draw_map, draw_outlines, upscale

_CAPTION = ["talk to (e.g., self, a person, a group) 0.71", "stand 0.98"]


def _frame(height=240, width=320, value=128):
  return np.full((height, width, 3), value, np.uint8)


def _captions(draw):
  """Draws; returns the areas of captions, and of each text its plate's size, origin, size and wording."""
  areas, texts = [], []
  place, put_text = visualize._place, cv2.putText

  def spy_place(*args):
    areas.append(place(*args))
    return areas[-1]

  def spy_text(image, text, origin, font, scale, color, weight, kind):
    texts.append((image.shape[:2], origin, cv2.getTextSize(text, font, scale, weight), text))
    return put_text(image, text, origin, font, scale, color, weight, kind)

  with mock.patch.object(visualize, "_place", spy_place), mock.patch.object(cv2, "putText", spy_text):
    draw()
  return areas, texts


def _assert_inside(areas, texts, height, width):
  for x1, y1, x2, y2 in areas:
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
  for (plate_height, plate_width), (x, y), ((text_width, text_height), below), text in texts:
    assert x >= 0, text
    assert x + text_width <= plate_width, text
    assert y - text_height >= 0, text
    assert y + below <= plate_height, text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  st.integers(90, 900),
  st.integers(90, 900),
  st.lists(st.tuples(*[st.floats(-0.5, 1.5)] * 4), max_size=6),
  st.integers(1, 4),
  st.booleans(),
)
def test_captions_stay_in_the_picture(height, width, boxes, num_lines, dashed):
  frame = _frame(height, width)
  boxes = np.array(boxes).reshape(-1, 4)
  captions = [(_CAPTION * 2)[:num_lines]] * len(boxes)
  areas, texts = _captions(lambda: draw_detections(frame, boxes, captions, dashed=dashed))
  assert len(areas) == len(boxes)
  _assert_inside(areas, texts, height, width)
  assert (frame == 128).all()


@pytest.mark.parametrize("size", [(16, 16), (40, 500), (500, 40)])
def test_very_small_frames(size):
  image = draw_detections(_frame(*size), np.array([[0.1, 0.1, 0.9, 0.9]]), [_CAPTION * 5])
  assert image.shape == (*size, 3)


def test_captions_of_neighbours_keep_apart():
  boxes = np.array([[0.1, 0.3, 0.3, 0.9], [0.12, 0.32, 0.33, 0.9], [0.2, 0.3, 0.4, 0.95], [0.1, 0.3, 0.3, 0.9]])
  areas, _ = _captions(lambda: draw_detections(_frame(480, 640), boxes, [["stand 0.98", "walk 0.5"]] * 4))
  for index, area in enumerate(areas):
    for other in areas[:index]:
      assert visualize._shared_area(area, other) == 0


def test_caption_stands_above_its_box_where_there_is_room():
  (area,), _ = _captions(lambda: draw_detections(_frame(480, 640), np.array([[0.25, 0.5, 0.5, 1]]), [["sit"]]))
  assert area[0] == round(0.25 * 639)
  assert area[3] == round(0.5 * 479)


def test_outline_is_where_the_box_is():
  boxes, red = np.array([[0.25, 0.5, 0.75, 1.0]]), (255, 0, 0)
  image = draw_detections(_frame(201, 401), boxes, [[]], [red])
  assert image[100, 200].tolist() == list(red)
  assert image[150, 100].tolist() == list(red)
  assert (image[:90] == 128).all()
  assert (image[110:190, 110:290] == 128).all()
  dashes = draw_detections(_frame(201, 401), boxes, [[]], [red], dashed=True)
  count = [int((picture == red).all(-1).sum()) for picture in (image, dashes)]
  assert 0.3 * count[0] < count[1] < 0.8 * count[0]


def test_text_grows_with_the_frame():
  heights = []
  for scale in (1, 3):
    _, texts = _captions(
      lambda s=scale: draw_detections(_frame(360 * s, 640 * s), np.array([[0.2, 0.2, 0.6, 0.9]]), [["walk 0.9"]])
    )
    heights.append(texts[0][2][0][1])
  assert heights[1] > 2 * heights[0]


def test_input_is_not_modified_and_output_is_no_view():
  frame = _frame()
  frame.setflags(write=False)
  boxes = np.array([[0.1, 0.1, 0.5, 0.5]], np.float32)
  image = draw_detections(frame, boxes, [["walk"]])
  assert not np.shares_memory(image, frame)
  assert (image != frame).any()
  assert np.array_equal(draw_detections(frame, np.zeros((0, 4)), []), frame)
  upscale(frame)


def test_bad_input_is_named():
  box = np.array([[0.1, 0.1, 0.5, 0.5]])
  with pytest.raises(ValueError, match="1 boxes, 2 captions"):
    draw_detections(_frame(), box, [[], []])
  with pytest.raises(ValueError, match="2 colors"):
    draw_detections(_frame(), box, [[]], [(0, 0, 0)] * 2)
  with pytest.raises(ValueError, match="not finite"):
    draw_detections(_frame(), box * np.nan, [[]])
  with pytest.raises(ValueError, match=r"float32; expected \[H, W, 3\] uint8"):
    draw_detections(_frame().astype(np.float32), box, [[]])
  with pytest.raises(ValueError, match="no frames"):
    contact_sheet([])


def test_colors_are_light_and_differ():
  colors = [color_of(index) for index in range(40)]
  assert len(set(colors)) == 40
  assert all(0 <= value <= 255 for color in colors for value in color)
  assert all(max(color) >= 200 for color in colors)
  assert color_of(3) == color_of(3)


def test_map_is_laid_over_the_frame():
  frame = _frame(value=100)
  drawn = draw_map(frame, np.array([[0.0, 1.0], [0.5, 2.0]]))
  corners = drawn[[0, 0, -1, -1], [0, -1, 0, -1]].sum(-1, dtype=int)
  assert drawn.shape == frame.shape and (frame == 100).all()
  assert corners[0] < corners[2] < corners[1] == corners[3]
  assert (drawn[:120, :160] == drawn[0, 0]).all(), "cells are not smoothed"


def test_map_of_colours_keeps_them():
  drawn = draw_map(_frame(value=100), np.array([[[1.0, 0.0, 0.0], [0.0, 0.5, 1.0]]]))
  np.testing.assert_array_equal(drawn[0, [0, -1]], [[193, 40, 40], [40, 117, 193]])


def test_strong_outlines_are_bright_and_on_top():
  frame = _frame(value=100)
  boxes = np.array([[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.9, 0.9]])
  for order in ([0, 1], [1, 0]):
    drawn = draw_outlines(frame, boxes[order], np.array([1.0, 0.0])[order]).sum(-1, dtype=int)
    assert drawn[24, 64] > drawn[24, 224] > drawn[100, 200] > 0
  assert (frame == 100).all() and (draw_outlines(frame, np.empty((0, 4)), np.empty(0)) == 35).all()


def test_upscale():
  assert upscale(_frame(90, 160)).shape == (360, 640, 3)
  assert upscale(_frame(160, 90), 180).shape == (320, 180, 3)
  large = _frame(360, 400)
  assert upscale(large) is large


def test_contact_sheet_places_frames_of_all_sizes():
  sheet = contact_sheet([[_frame(10, 20, 200), _frame(8, 8, 201)], [_frame(4, 30, 202)]], gap=2)
  assert sheet.shape == (2 * (10 + 2) + 2, 2 * (30 + 2) + 2, 3)
  for value, size in ((200, 200), (201, 64), (202, 120)):
    assert (sheet == value).all(-1).sum() == size
