"""Drawing on frames: boxes with captions, ground truth beside detections, contact sheets.

Frames are ``[H, W, 3]`` uint8 RGB everywhere and are never modified; boxes are xyxy in [0, 1] of the frame.
"""

import colorsys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from vad_jax.batch import Detections

Color = tuple[int, int, int]

_PALETTE: list[Color] = [
  (255, 99, 88),
  (64, 169, 255),
  (120, 210, 90),
  (255, 190, 50),
  (186, 120, 255),
  (50, 210, 200),
  (255, 130, 190),
  (200, 160, 110),
  (150, 180, 255),
  (215, 225, 80),
]
_BACKGROUND = (24, 26, 31)
_TEXT = (236, 238, 242)
_MAP_SIDE = 360  # pixels of the short side of pictures of maps
_FONT = cv2.FONT_HERSHEY_SIMPLEX


class _Block(NamedTuple):
  """Caption lines that were fitted into a rectangle of this size, in pixels."""

  lines: list[str]
  scale: float
  width: int
  height: int
  line_height: int
  pad: int


def color_of(index: int) -> Color:
  """A colour for the index of an actor or class; neighbours are easy to tell apart, all are light."""
  if 0 <= index < len(_PALETTE):
    return _PALETTE[index]
  hue = (index * 0.618034) % 1.0  # steps of the golden ratio never come close to each other soon
  red, green, blue = colorsys.hsv_to_rgb(hue, 0.55, 1.0)
  return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
  frame: np.ndarray,
  boxes: np.ndarray,
  captions: Sequence[Sequence[str]],
  colors: Sequence[Color] | None = None,
  dashed: bool = False,
) -> np.ndarray:
  """Draws boxes with their captions on a copy of the frame.

  Line width and text grow with the frame. Captions stay inside the picture and keep off each other and
  off other boxes as far as there is room; a caption that cannot fit is made smaller, then cut.

  Args:
    frame: ``[H, W, 3]`` uint8 RGB.
    boxes: ``[N, 4]`` xyxy in [0, 1] of the frame; what lies outside is cut off.
    captions: for each box its lines, such as ``["walk 0.93", "talk to 0.71"]``; may be empty.
    colors: for each box; `color_of` its position by default.
    dashed: dashed outlines, for example for ground truth.

  Raises:
    ValueError: shapes do not agree, or a box is not finite.
  """
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  _check_frame(frame)
  if not len(boxes) == len(captions) == len(colors if colors is not None else boxes):
    raise ValueError(f"{len(boxes)} boxes, {len(captions)} captions and {colors and len(colors)} colors do not agree")
  if not np.isfinite(boxes).all():
    raise ValueError("boxes are not finite")
  colors = colors if colors is not None else [color_of(index) for index in range(len(boxes))]
  height, width = frame.shape[:2]
  image = frame.copy()
  corners = np.rint(np.clip(boxes, 0, 1) * [width - 1, height - 1, width - 1, height - 1]).astype(int)
  thickness = max(2, round(min(height, width) / 220))
  # Far boxes are usually small and high in the picture: drawn first, near ones lie on top.
  for index in np.argsort(corners[:, 3], kind="stable"):
    _outline(image, corners[index], colors[index], thickness, dashed)
  placed: list[tuple[int, int, int, int]] = []
  for index, lines in enumerate(captions):
    if not len(lines):
      continue
    block = _fit(lines, height, width)
    others = np.delete(corners, index, axis=0)
    area = _place(block, corners[index], placed, others, (height, width))
    placed.append(area)
    _write(image, block, area, colors[index])
  return image


def draw_map(frame: np.ndarray, heat: np.ndarray) -> np.ndarray:
  """Lays a map over a copy of the frame: dark where it is 0, bright where it is 1.

  Args:
    frame: ``[H, W, 3]`` uint8 RGB.
    heat: ``[h, w]``, or ``[h, w, 3]`` colours, in [0, 1], of the whole frame; its cells are shown as they are.
  """
  _check_frame(frame)
  height, width = frame.shape[:2]
  cells = np.rint(255 * np.clip(heat, 0, 1)).astype(np.uint8)
  cells = cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)
  colored = cells if cells.ndim == 3 else cv2.applyColorMap(cells, cv2.COLORMAP_INFERNO)[..., ::-1]
  grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)[..., None]
  return np.rint(0.4 * grey + 0.6 * colored).astype(np.uint8)


def draw_outlines(frame: np.ndarray, boxes: np.ndarray, strength: np.ndarray) -> np.ndarray:
  """Draws many boxes with thin lines on a dimmed copy of the frame, strong ones in bright colour on top.

  Args:
    frame: ``[H, W, 3]`` uint8 RGB.
    boxes: ``[N, 4]`` xyxy in [0, 1] of the frame.
    strength: ``[N]`` in [0, 1].
  """
  _check_frame(frame)
  height, width = frame.shape[:2]
  image = np.rint(0.35 * frame).astype(np.uint8)
  corners = np.rint(np.clip(boxes, 0, 1) * [width - 1, height - 1, width - 1, height - 1]).astype(int)
  weak, strong = np.array([80, 84, 92]), np.array(_PALETTE[3])
  for index in np.argsort(strength, kind="stable"):
    x1, y1, x2, y2 = corners[index].tolist()
    color = np.rint(weak + strength[index] * (strong - weak)).tolist()
    cv2.rectangle(image, (x1, y1), (x2, y2), color, 2 if strength[index] > 0.5 else 1, cv2.LINE_AA)
  return image


def map_sheet(
  frame: np.ndarray,
  maps: Mapping[str, np.ndarray],
  found: Detections,
  kept: np.ndarray,
  scores: np.ndarray,
  *,
  size: tuple[int, int],
  more: Sequence[Sequence[np.ndarray]] = (),
) -> np.ndarray:
  """What a model saw in a keyframe: its maps over the frame, all boxes by actor score, and those that were kept.

  Args:
    frame: ``[H, W, 3]`` uint8 RGB, which may be distorted.
    maps: see `draw_map`, by name.
    found: detections without a batch axis.
    kept: ``[n, 4]`` boxes.
    scores: ``[n]`` of these.
    size: height and width whose proportions the pictures get.
    more: further rows of pictures.
  """
  frame = _map_frame(frame, size)
  pictures = [draw_map(frame, heat) for heat in maps.values()]
  pictures.append(draw_outlines(frame, found.boxes[found.valid], found.actor_score[found.valid]))
  pictures.append(draw_detections(frame, kept, [[f"{score:.2f}"] for score in scores]))
  return contact_sheet([pictures, *(row for row in more if row)])


def attention_picture(
  frame: np.ndarray, attention: np.ndarray, box: np.ndarray, caption: str, color: Color, *, size: tuple[int, int]
) -> np.ndarray:
  """Where a model looked to judge one action of one person, bright where most, and the person's box.

  Args:
    frame: ``[H, W, 3]`` uint8 RGB, which may be distorted.
    attention: ``[h, w]``, not negative, of the whole frame.
    box: ``[4]`` xyxy in [0, 1] of the frame.
    caption: of the box.
    color: of the box.
    size: height and width whose proportions the picture gets.
  """
  picture = draw_map(_map_frame(frame, size), attention / max(attention.max(), np.finfo(np.float32).tiny))
  return draw_detections(picture, box[None], [[caption]], [color])


def _map_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A frame in the proportions and at the size of pictures of maps."""
  height, width = (round(side * _MAP_SIDE / min(size)) for side in size)
  return cv2.resize(frame, (width, height))


def upscale(frame: np.ndarray, min_short_side: int = 360) -> np.ndarray:
  """Enlarges a small frame, so that captions are readable; one that is large enough comes back as it is."""
  _check_frame(frame)
  factor = min_short_side / min(frame.shape[:2])
  if factor <= 1:
    return frame
  height, width = (round(side * factor) for side in frame.shape[:2])
  return cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], gap: int = 8) -> np.ndarray:
  """Rows of frames on one picture; small frames are centred in their cell, rows may differ in length.

  Raises:
    ValueError: there is no frame at all.
  """
  frames = [frame for row in rows for frame in row]
  if not frames:
    raise ValueError("no frames for a contact sheet")
  for frame in frames:
    _check_frame(frame)
  cell_height, cell_width = np.max([frame.shape[:2] for frame in frames], axis=0)
  num_columns = max(len(row) for row in rows)
  size = (len(rows) * (cell_height + gap) + gap, num_columns * (cell_width + gap) + gap, 3)
  sheet = np.full(size, _BACKGROUND, np.uint8)
  for r, row in enumerate(rows):
    for c, frame in enumerate(row):
      height, width = frame.shape[:2]
      top = gap + r * (cell_height + gap) + (cell_height - height) // 2
      left = gap + c * (cell_width + gap) + (cell_width - width) // 2
      sheet[top : top + height, left : left + width] = frame
  return sheet


def _check_frame(frame: np.ndarray) -> None:
  if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
    raise ValueError(f"a frame has shape {frame.shape} and type {frame.dtype}; expected [H, W, 3] uint8 RGB")


def _outline(image: np.ndarray, corners: np.ndarray, color: Color, thickness: int, dashed: bool) -> None:
  """A coloured rectangle on a dark edge, so that it shows on any background."""
  x1, y1, x2, y2 = (int(value) for value in corners)
  sides = [((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))]
  dash = 5 * thickness
  for pen, width in ((_BACKGROUND, thickness + 2), (color, thickness)):
    for begin, end in sides:
      length = abs(end[0] - begin[0]) + abs(end[1] - begin[1])
      steps = max(1, round(length / dash / 2)) if dashed else 1
      points = np.rint(np.linspace(begin, end, 2 * steps + 1)).astype(int).tolist()
      for start, stop in zip(points[0::2], points[1::2] if dashed else points[2::2], strict=False):
        cv2.line(image, start, stop, pen, width)


def _fit(lines: Sequence[str], height: int, width: int) -> _Block:
  """Finds the text size at which the lines fit the picture; cuts what does not fit at the smallest size."""
  short = min(height, width)
  scale, smallest = max(0.42, short / 820), 0.34
  while True:
    block = _measure(list(lines), scale)
    if (block.width <= width and block.height <= height / 2) or scale <= smallest:
      break
    scale = max(smallest, scale * 0.9)
  most = max(1, (height - 2 * block.pad) // block.line_height)
  return _measure([_shorten(line, scale, width - 4 * block.pad) for line in lines[:most]], scale)


def _measure(lines: list[str], scale: float) -> _Block:
  sizes = [cv2.getTextSize(line, _FONT, scale, _weight(scale))[0] for line in lines]
  tallest = cv2.getTextSize("Ag|", _FONT, scale, _weight(scale))
  line_height = round(1.12 * (tallest[0][1] + tallest[1]))
  pad = max(2, round(line_height / 5))
  return _Block(
    lines,
    scale,
    max(width for width, _ in sizes) + 4 * pad,
    len(lines) * line_height + 2 * pad,
    line_height,
    pad,
  )


def _weight(scale: float) -> int:
  return max(1, round(scale * 1.4))


def _shorten(line: str, scale: float, room: int) -> str:
  def too_wide(text: str) -> bool:
    return cv2.getTextSize(text, _FONT, scale, _weight(scale))[0][0] > room

  if not too_wide(line):
    return line
  while line and too_wide(line + ".."):
    line = line[:-1]
  return line + ".."


def _place(
  block: _Block,
  corners: np.ndarray,
  placed: list[tuple[int, int, int, int]],
  others: np.ndarray,
  size: tuple[int, int],
) -> tuple[int, int, int, int]:
  """Chooses where a caption covers least of other captions, then of other boxes: x1, y1, x2, y2 in pixels.

  Places are tried in the order in which a reader would look for them: above the box, inside its top, below
  it, inside its bottom, each at the left, then at the right, and at last beside it.
  """
  x1, y1, x2, y2 = (int(value) for value in corners)
  height, width = size
  lefts = (x1, x2 - block.width)
  tops = (y1 - block.height, y1, y2, y2 - block.height)
  spots = [(left, top) for top in tops for left in lefts]
  spots += [(left, top) for left in (x2, x1 - block.width) for top in (y1, y2 - block.height)]
  # When captions crowd, any free row at the box's left edge will do.
  spots += [(x1, top) for top in range(0, height, block.line_height)]
  best, least = (0, 0, 0, 0), None
  for rank, (left, top) in enumerate(spots):
    left = max(0, min(left, width - block.width))
    top = max(0, min(top, height - block.height))
    area = (left, top, min(width, left + block.width), min(height, top + block.height))
    cost = (
      sum(_shared_area(area, other) for other in placed),
      sum(_shared_area(area, other) for other in others) // 2 + rank * block.width * block.line_height // 12,
    )
    if least is None or cost < least:
      best, least = area, cost
  return best


def _shared_area(a: Sequence[int], b: Sequence[int]) -> int:
  width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
  return int(max(width, 0) * max(height, 0))


def _write(image: np.ndarray, block: _Block, area: tuple[int, int, int, int], color: Color) -> None:
  """Writes a caption on a plate of its box's colour."""
  x1, y1, x2, y2 = area
  plate = image[y1:y2, x1:x2]
  blended = np.rint(0.18 * plate + 0.82 * np.array(color)).astype(np.uint8)
  brightness = np.dot(color, (0.299, 0.587, 0.114))
  pen = (16, 18, 22) if brightness > 120 else (255, 255, 255)
  for index, line in enumerate(block.lines):
    baseline = block.pad + round((index + 0.78) * block.line_height)
    cv2.putText(blended, line, (2 * block.pad, baseline), _FONT, block.scale, pen, _weight(block.scale), cv2.LINE_AA)
  plate[:] = blended
