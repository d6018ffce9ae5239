"""Augmentation of a clip with its boxes, and its placement on a canvas of static size. Numpy and OpenCV only.

An example is a dict with ``video`` ``[T, H, W, 3]`` uint8 RGB, ``boxes`` ``[n, 4]`` float32 xyxy in [0, 1], ``labels``
``[n, K]`` and ``box_mask`` ``[n]``, which is False for boxes that are none; tubes have ``boxes`` ``[T, n, 4]``,
``labels`` ``[T, n, K]`` and ``box_mask`` ``[T, n]``. It may have ``proposals`` ``[p, 4]`` with their ``proposal_mask``
``[p]``; whatever else it holds is passed on. All frames of a clip are changed alike. No function changes its input.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

Example = dict[str, Any]

# A person of whom less than this part of the box is left in the crop is no target any more.
_LEAST_VISIBLE = 0.5
_LUMA = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue in a grey picture


@dataclasses.dataclass(frozen=True)
class Augment:
  """How training clips are varied; one draw for all frames of a clip. Zero switches off.

  Attributes:
    flip: probability of a horizontal flip.
    scale: range that the zoom is drawn from. Above 1 a random part of the frame is cut out and enlarged to
      the frame's size; below 1 the frame becomes smaller on its canvas. Scale jitter of the short side between 256 and
      320 with crops of 224 is a zoom from 256 / 224 to 320 / 224.
    square: cut out squares, whatever the frame's proportions; at zoom 1 as large as the short side.
    color: largest relative change of the gain of each colour channel.
    brightness: largest relative change, below 1.
    contrast: largest relative change, below 1: how far colours are from the clip's mean grey.
    saturation: largest relative change, below 1: how far colours are from the grey of the same pixel.
    hue: largest turn of the colour circle, which is 1 around, up to 0.5.
    box_jitter: largest distance that a side of a target moves, relative to the box's width or height, below 0.5.
  """

  flip: float = 0.5
  scale: tuple[float, float] = (1.0, 1.0)
  color: float = 0.0
  square: bool = False
  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  box_jitter: float = 0.0

  def __post_init__(self) -> None:
    low, high = self.scale
    if not 0 <= self.flip <= 1 or not 0 < low <= high:
      raise ValueError(f"{self}: expected flip in [0, 1] and 0 < scale[0] <= scale[1]")
    if not all(0 <= x < 1 for x in (self.color, self.brightness, self.contrast, self.saturation)):
      raise ValueError(f"{self}: expected color, brightness, contrast and saturation in [0, 1)")
    if not 0 <= self.hue <= 0.5 or not 0 <= self.box_jitter < 0.5:
      raise ValueError(f"{self}: expected hue in [0, 0.5] and box_jitter in [0, 0.5)")


def augment(example: Example, options: Augment, rng: np.random.Generator) -> tuple[Example, float]:
  """Applies a random variation.

  Returns:
    The example, and the factor (at most 1) by which the frame has to be made smaller when it is placed.
  """
  # Always the same draws, so that switching one option leaves the others' as they were.
  flip, zoom, x, y, *colors = rng.uniform(size=11)
  shifts = rng.uniform(-1, 1, (example["boxes"].shape[-2], 4))
  scale = options.scale[0] + zoom * (options.scale[1] - options.scale[0])
  if scale > 1 or options.square:
    example = crop(example, max(scale, 1.0), (x, y), square=options.square)
  if flip < options.flip:
    example = flip_horizontal(example)
  most = np.array([options.color] * 3 + [options.brightness, options.contrast, options.saturation, options.hue])
  if most.any():
    *gain, brightness, contrast, saturation, hue = most * (2 * np.array(colors) - 1)
    example = jitter_color(
      example, (1 + np.array(gain)) * (1 + brightness), contrast=1 + contrast, saturation=1 + saturation, hue=hue
    )
  if options.box_jitter:
    example = {**example, "boxes": jitter_boxes(example["boxes"], options.box_jitter * shifts)}
  return example, min(scale, 1.0)


def flip_horizontal(example: Example) -> Example:
  """Mirrors frames and boxes."""

  def mirror(boxes: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x1, y1, x2, y2 = np.moveaxis(boxes, -1, 0)
    return np.stack([1 - x2, y1, 1 - x1, y2], axis=-1), mask

  return {**_move_boxes(example, mirror), "video": example["video"][:, :, ::-1]}


def crop(example: Example, zoom: float, position: tuple[float, float], *, square: bool = False) -> Example:
  """Cuts out a window; boxes are clipped, those mostly outside are masked.

  Args:
    example: an example.
    zoom: at least 1; the window is 1 / zoom of the frame's height and width, or of its short side.
    position: x and y of the window, 0 at the left or top, 1 at the right or bottom.
    square: a square window rather than one of the frame's shape.
  """
  height, width = example["video"].shape[1:3]
  sides = (min(height, width),) * 2 if square else (height, width)
  crop_height, crop_width = (max(round(side / zoom), 1) for side in sides)
  left = round(position[0] * (width - crop_width))
  top = round(position[1] * (height - crop_height))
  offset = np.array([left, top, left, top], np.float32)
  frame, window = np.array([width, height] * 2), np.array([crop_width, crop_height] * 2)

  def cut(boxes: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    boxes = (boxes * frame - offset) / window
    clipped = boxes.clip(0, 1)
    return clipped.astype(np.float32), mask & (area(clipped) >= _LEAST_VISIBLE * area(boxes))

  video = example["video"][:, top : top + crop_height, left : left + crop_width]
  return {**_move_boxes(example, cut), "video": video}


def jitter_color(
  example: Example, gain: np.ndarray, *, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> Example:
  """Changes colours by one linear map, which is one pass over the clip.

  Args:
    example: an example.
    gain: ``[3]`` factors of red, green and blue.
    contrast: factor of the distance from the clip's mean grey.
    saturation: factor of the distance from the pixel's own grey.
    hue: turn around the grey axis of the colour space, 1 is all around.
  """
  pixels = np.ascontiguousarray(example["video"]).reshape(-1, example["video"].shape[2], 3)
  mean = _LUMA @ (gain * cv2.mean(pixels)[:3])
  rotation = cv2.Rodrigues(np.full(3, 2 * np.pi * hue / np.sqrt(3)))[0]
  matrix = rotation @ (saturation * np.eye(3) + (1 - saturation) * _LUMA) @ np.diag(contrast * gain)
  # The other two maps leave grey as it is.
  matrix = np.column_stack([matrix, np.full(3, (1 - contrast) * mean)])
  return {**example, "video": cv2.transform(pixels, matrix).reshape(example["video"].shape)}


def jitter_boxes(boxes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
  """Moves the sides of boxes.

  Args:
    boxes: ``[n, 4]`` or, for tubes, ``[T, n, 4]``.
    shifts: ``[n, 4]`` of x1, y1, x2, y2 relative to width and height, within (-0.5, 0.5).
  """
  size = boxes[..., 2:] - boxes[..., :2]
  return (boxes + shifts * np.concatenate([size, size], axis=-1)).clip(0, 1).astype(np.float32)


def place_on_canvas(
  video: np.ndarray, canvas: tuple[int, int], short_side: float | None, scale: float = 1.0
) -> tuple[np.ndarray, tuple[int, int]]:
  """Resizes a clip and places it top left on a black canvas.

  Args:
    video: ``[T, H, W, 3]`` uint8.
    canvas: height and width in pixels.
    short_side: length that the short side gets, if the canvas has room for the long one; else the clip fits
      the canvas. None fills the canvas without keeping proportions.
    scale: at most 1; how much smaller than that the clip becomes.

  Returns:
    ``[T, *canvas, 3]`` uint8, and height and width of the clip on it.
  """
  size = video.shape[1:3]
  height, width = (max(int(side * scale + 0.5), 1) for side in _placed_size(size, canvas, short_side))
  if (height, width) == size == tuple(canvas):
    return video, size
  placed = np.zeros((len(video), *canvas, 3), np.uint8)
  for frame, target in zip(video, placed, strict=True):
    target = target[:height, :width]
    if (height, width) == size:
      target[:] = frame
    else:
      cv2.resize(np.ascontiguousarray(frame), (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
  return placed, (height, width)


def choose_canvas(
  size: tuple[int, int], canvases: Sequence[tuple[int, int]], short_side: float | None
) -> tuple[int, int]:
  """The canvas on which a clip of a height and width becomes largest; among equals the smallest one."""

  def merit(canvas: tuple[int, int]) -> tuple[int, int]:
    height, width = _placed_size(size, canvas, short_side)
    return round(height) * round(width), -canvas[0] * canvas[1]

  return max(canvases, key=merit)


def area(boxes: np.ndarray) -> np.ndarray:
  """Of boxes ``[..., 4]`` xyxy."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _placed_size(size: tuple[int, int], canvas: tuple[int, int], short_side: float | None) -> tuple[float, float]:
  if short_side is None:
    return canvas
  height, width = size
  ratio = min(short_side / min(size), canvas[0] / height, canvas[1] / width)
  return min(height * ratio, canvas[0]), min(width * ratio, canvas[1])


def _move_boxes(example: Example, move: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Example:
  """Applies a function of boxes and mask to targets and proposals."""
  moved = dict(example)
  for boxes, mask in (("boxes", "box_mask"), ("proposals", "proposal_mask")):
    if boxes in example:
      moved[boxes], moved[mask] = move(example[boxes], example[mask])
  return moved
