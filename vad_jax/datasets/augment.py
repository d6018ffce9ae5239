"""Augmentation of a clip with its boxes, and its placement on a canvas of static size. Numpy and OpenCV only.

An example is a dict with ``video`` ``[T, H, W, 3]`` uint8 RGB, ``boxes`` ``[n, 4]`` float32 xyxy in [0, 1]
and ``labels`` ``[n, K]``; whatever else it holds is passed on. All frames of a clip are changed alike. No
function changes its input.
"""

import dataclasses
from typing import Any

import cv2
import numpy as np

Example = dict[str, Any]

# A person of whom less than this part of the box is left in the crop is no target any more.
_LEAST_VISIBLE = 0.5


@dataclasses.dataclass(frozen=True)
class Augment:
  """How training clips are varied.

  Attributes:
    flip: probability of a horizontal flip.
    scale: range that the zoom is drawn from. Above 1 a random part of the frame is cut out and enlarged to
      the frame's size; below 1 the frame becomes smaller on its canvas.
    color: largest relative change of the gain of each colour channel, 0 for none.
  """

  flip: float = 0.5
  scale: tuple[float, float] = (1.0, 1.0)
  color: float = 0.0

  def __post_init__(self) -> None:
    low, high = self.scale
    if not 0 <= self.flip <= 1 or not 0 < low <= high or not 0 <= self.color < 1:
      raise ValueError(f"{self}: expected flip in [0, 1], 0 < scale[0] <= scale[1] and color in [0, 1)")


def augment(example: Example, options: Augment, rng: np.random.Generator) -> tuple[Example, float]:
  """Applies a random variation.

  Returns:
    The example, and the factor (at most 1) by which the frame has to be made smaller when it is placed.
  """
  # Always the same number of draws, so that switching one option leaves the others' draws as they were.
  flip, zoom, x, y, *gain = rng.uniform(size=7)
  scale = options.scale[0] + zoom * (options.scale[1] - options.scale[0])
  if scale > 1:
    example = crop(example, scale, (x, y))
  if flip < options.flip:
    example = flip_horizontal(example)
  if options.color:
    example = color_gain(example, 1 + options.color * (2 * np.array(gain) - 1))
  return example, min(scale, 1.0)


def flip_horizontal(example: Example) -> Example:
  """Mirrors frames and boxes."""
  boxes = example["boxes"]
  mirrored = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
  return {**example, "video": example["video"][:, :, ::-1], "boxes": mirrored}


def crop(example: Example, zoom: float, position: tuple[float, float]) -> Example:
  """Cuts out a window of the frame's shape; boxes are clipped, those mostly outside are dropped.

  Args:
    example: an example.
    zoom: at least 1; the window is 1 / zoom of the frame's height and width.
    position: x and y of the window, 0 at the left or top, 1 at the right or bottom.
  """
  height, width = example["video"].shape[1:3]
  crop_height, crop_width = max(round(height / zoom), 1), max(round(width / zoom), 1)
  left = round(position[0] * (width - crop_width))
  top = round(position[1] * (height - crop_height))
  video = example["video"][:, top : top + crop_height, left : left + crop_width]
  offset = np.array([left, top, left, top], np.float32)
  frame, window = np.array([width, height] * 2), np.array([crop_width, crop_height] * 2)
  boxes = (example["boxes"] * frame - offset) / window
  clipped = boxes.clip(0, 1)
  keep = _area(clipped) >= _LEAST_VISIBLE * _area(boxes)
  return {
    **example,
    "video": video,
    "boxes": clipped[keep].astype(np.float32),
    "labels": example["labels"][keep],
  }


def color_gain(example: Example, gain: np.ndarray) -> Example:
  """Multiplies each colour channel by its gain, ``[3]``."""
  table = np.clip(np.arange(256)[:, None] * gain + 0.5, 0, 255).astype(np.uint8)
  frames, height, width, _ = example["video"].shape
  flat = np.ascontiguousarray(example["video"]).reshape(frames * height, width, 3)
  return {**example, "video": cv2.LUT(flat, table[None]).reshape(example["video"].shape)}


def place_on_canvas(
  video: np.ndarray, canvas: tuple[int, int], short_side: float
) -> tuple[np.ndarray, tuple[int, int]]:
  """Resizes a clip, keeping its proportions, and places it top left on a black canvas.

  Args:
    video: ``[T, H, W, 3]`` uint8.
    canvas: height and width in pixels.
    short_side: length that the short side gets, if the canvas has room for the long one; else the clip fits
      the canvas.

  Returns:
    ``[T, *canvas, 3]`` uint8, and height and width of the clip on it.
  """
  height, width = video.shape[1:3]
  ratio = min(short_side / min(height, width), canvas[0] / height, canvas[1] / width)
  new_height = min(max(int(height * ratio + 0.5), 1), canvas[0])
  new_width = min(max(int(width * ratio + 0.5), 1), canvas[1])
  placed = np.zeros((len(video), *canvas, 3), np.uint8)
  for frame, target in zip(video, placed, strict=True):
    if (new_height, new_width) != (height, width):
      frame = cv2.resize(np.ascontiguousarray(frame), (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    target[:new_height, :new_width] = frame
  return placed, (new_height, new_width)


def _area(boxes: np.ndarray) -> np.ndarray:
  return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
