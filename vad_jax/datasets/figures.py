"""Drawing people, things and places with OpenCV, cheaply enough for hundreds of frames a second.

Coordinates are pixels, y down; sizes of body parts are in standing heights of the person. All colours are
RGB.
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np

from vad_jax.datasets import poses

Color = tuple[int, int, int]

_BITS = 4  # OpenCV takes coordinates in 1/16 pixel
_ONE = 1 << _BITS
_TILT = 0.13  # the camera looks down a little: what is nearer stands lower

# Radii of the body's parts at its joints; they make both drawing and boxes.
_HEAD, _HAND, _TRUNK = 0.085, 0.034, 0.066
_RADII = np.empty(poses.NUM_JOINTS)
_RADII[[poses.HEAD, poses.NECK, poses.HIP]] = _HEAD, 0.03, _TRUNK
for _joint, _radius in (
  (poses.SHOULDERS, 0.05),
  (poses.ELBOWS, 0.033),
  (poses.HANDS, _HAND),
  (poses.HIPS, _TRUNK),
  (poses.KNEES, 0.045),
  (poses.ANKLES, 0.034),
  (poses.TOES, 0.024),
):
  _RADII[_joint] = _radius


class Look(NamedTuple):
  """How one person looks.

  Attributes:
    skin, hair, shirt, trousers, shoes: colours.
    build: multiplies the thickness of the body.
    sleeves: long (True) or short.
    legs: "long" trousers, "short" ones.
    cut: of the hair: "short", "long" or "bald".
  """

  skin: Color
  hair: Color
  shirt: Color
  trousers: Color
  shoes: Color
  build: float
  sleeves: bool
  legs: str
  cut: str


class View(NamedTuple):
  """Where a person is on the picture, by frame.

  Attributes:
    points: ``[T, NUM_JOINTS, 2]`` pixels.
    near: ``[T, NUM_JOINTS]`` how much nearer than the hips, in standing heights.
    yaw: ``[T]`` where the person faces: 0 the viewer, pi/2 right.
    height: of the person standing, in pixels.
  """

  points: np.ndarray
  near: np.ndarray
  yaw: np.ndarray
  height: float


def project(body: np.ndarray, yaw: np.ndarray, feet: np.ndarray, height: float) -> tuple[np.ndarray, np.ndarray]:
  """Points of the body's axes on the picture.

  Args:
    body: ``[T, P, 3]`` forward, up, left.
    yaw: ``[T]``.
    feet: ``[T, 2]`` pixels, where the body's origin is.
    height: pixels of one standing height.

  Returns:
    ``[T, P, 2]`` pixels and ``[T, P]`` nearness.
  """
  sin, cos = np.sin(yaw)[:, None], np.cos(yaw)[:, None]
  near = body[..., 0] * cos - body[..., 2] * sin
  right = body[..., 0] * sin + body[..., 2] * cos
  down = near * _TILT - body[..., 1]
  return feet[:, None] + height * np.stack([right, down], -1), near


def body_boxes(view: View, look: Look) -> np.ndarray:
  """``[T, 4]`` xyxy pixels around everything `draw_person` paints of a body."""
  radii = _RADII * look.build
  radii[poses.HEAD] = _HEAD
  margin = (view.height * radii)[:, None]
  return np.concatenate([(view.points - margin).min(1), (view.points + margin).max(1)], -1)


def random_look(rng: np.random.Generator, place: np.ndarray) -> Look:
  """Somebody whose clothes stand out from a place.

  Args:
    rng: source of randomness.
    place: ``[3]`` mean colour of the surroundings.
  """
  skin = np.array([(250, 218, 190), (232, 184, 148), (198, 140, 100), (142, 92, 62), (92, 60, 44)][rng.integers(5)])
  hairs = [(28, 22, 20), (70, 44, 26), (140, 90, 44), (214, 178, 104), (150, 148, 146), (150, 60, 30)]
  return Look(
    skin=_tuple(skin),
    hair=hairs[rng.integers(len(hairs))],
    shirt=_contrasting(rng, place),
    trousers=_contrasting(rng, place),
    shoes=_tuple(rng.integers(15, 70, 3)),
    build=float(rng.uniform(0.85, 1.25)),
    sleeves=bool(rng.random() < 0.6),
    legs="long" if rng.random() < 0.7 else "short",
    cut=("short", "long", "short", "bald")[rng.integers(4)],
  )


def _contrasting(rng: np.random.Generator, place: np.ndarray) -> Color:
  """The first of a few random colours that is far from the place's, or the farthest."""
  hsv = np.stack([rng.integers(0, 180, 6), rng.integers(60, 256, 6), rng.choice([50, 110, 190, 245], 6)], -1)
  colors = cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0].astype(int)
  return _tuple(colors[np.minimum(np.abs(colors - place).sum(1), 190).argmax()])


def _tuple(color) -> Color:
  red, green, blue = (int(value) for value in color)
  return red, green, blue


@functools.cache
def _shade(color: Color, factor: float) -> Color:
  """Darker (factor < 1) or towards white (> 1)."""
  if factor > 1:
    return _tuple(min(255, value + (255 - value) * (factor - 1)) for value in color)
  return _tuple(value * factor for value in color)


def _fixed(points: np.ndarray) -> list:
  return np.rint(points * _ONE).astype(int).tolist()


class PersonPainter:
  """Paints one person, frame by frame; what is the same in all frames is computed once."""

  def __init__(self, look: Look, view: View, talking: np.ndarray):
    """Prepares.

    Args:
      look: of the person.
      view: where the joints are.
      talking: ``[T]`` bool, where the mouth is open.
    """
    self._look = look
    self._points = _fixed(view.points)
    self._height = height = view.height
    self._talking = talking.tolist()
    self._sin, self._cos = np.sin(view.yaw).tolist(), np.cos(view.yaw).tolist()
    near = view.near
    self._hands_in_front = (near[:, poses.HANDS] + near[:, poses.ELBOWS] > 0.02).tolist()
    self._knees_in_front = (near[:, poses.KNEES].mean(1) > 0.12).tolist()
    self._left_near = (near[:, poses.HIPS.start] > near[:, poses.HIPS.start + 1]).tolist()
    self._width = {
      name: max(1, round(2 * radius * height * look.build))
      for name, radius in dict(
        arm=0.036, forearm=0.03, thigh=0.056, shin=0.042, trunk=_TRUNK, neck=0.03, foot=0.024
      ).items()
    }

  def paint(self, frame: np.ndarray, index: int, things: "list[Thing]") -> None:
    """Paints the person of one frame, and what it handles between trunk and nearer arm."""
    points = self._points[index]
    near, far = (0, 1) if self._left_near[index] else (1, 0)
    front = self._hands_in_front[index]
    arms_behind = [side for side in (far, near) if not front[side]]
    for side in arms_behind:
      self._arm(frame, points, side, side == far)
    if not self._knees_in_front[index]:
      self._leg(frame, points, far, True)
      self._leg(frame, points, near, False)
    self._trunk(frame, points)
    if self._knees_in_front[index]:
      self._leg(frame, points, far, True)
      self._leg(frame, points, near, False)
    self._head(frame, points, index)
    for thing in things:
      thing.paint(frame, index)
    for side in (far, near):
      if side not in arms_behind:
        self._arm(frame, points, side, side == far)

  def _limb(self, frame, start, end, color: Color, width: int) -> None:
    """A rounded limb, lit from the upper left."""
    cv2.line(frame, start, end, _shade(color, 0.72), width, cv2.LINE_AA, _BITS)
    if width > 2:
      shift = width * _ONE // 8
      start, end = (start[0] - shift, start[1] - shift // 2), (end[0] - shift, end[1] - shift // 2)
      cv2.line(frame, start, end, color, max(1, width * 5 // 9), cv2.LINE_AA, _BITS)

  def _leg(self, frame, points, side: int, far: bool) -> None:
    look, width = self._look, self._width
    shade = 0.75 if far else 1.0
    hip, knee, ankle, toe = (points[part.start + side] for part in (poses.HIPS, poses.KNEES, poses.ANKLES, poses.TOES))
    shin = look.trousers if look.legs == "long" else look.skin
    self._limb(frame, ankle, toe, _shade(look.shoes, shade), width["foot"] + 1)
    self._limb(frame, knee, ankle, _shade(shin, shade), width["shin"])
    self._limb(frame, hip, knee, _shade(look.trousers, shade), width["thigh"])

  def _arm(self, frame, points, side: int, far: bool) -> None:
    look, width = self._look, self._width
    shade = 0.75 if far else 0.92
    shoulder, elbow, hand = (points[part.start + side] for part in (poses.SHOULDERS, poses.ELBOWS, poses.HANDS))
    self._limb(frame, shoulder, elbow, _shade(look.shirt, shade), width["arm"])
    self._limb(frame, elbow, hand, _shade(look.shirt if look.sleeves else look.skin, shade), width["forearm"])
    radius = round(_HAND * self._height * self._look.build * _ONE)
    cv2.circle(frame, hand, radius, _shade(look.skin, 0.85 if far else 1.0), cv2.FILLED, cv2.LINE_AA, _BITS)

  def _trunk(self, frame, points) -> None:
    look, width = self._look, self._width["trunk"]
    left, right = points[poses.SHOULDERS]
    hip_left, hip_right = points[poses.HIPS]
    inset = 0.25  # the rounded ends reach out to where shoulders and hips are
    neck, hip = points[poses.NECK], points[poses.HIP]
    left, right = (_between(point, neck, inset) for point in (left, right))
    top_left, top_right = (_between(point, hip, 0.12) for point in (left, right))
    color = _shade(look.shirt, 0.72)
    cv2.line(frame, hip_left, hip_right, _shade(look.trousers, 0.85), width, cv2.LINE_AA, _BITS)
    waist_left, waist_right = _between(hip_left, top_left, 0.15), _between(hip_right, top_right, 0.15)
    quad = np.array([top_left, top_right, waist_right, waist_left], np.int32)
    cv2.fillConvexPoly(frame, quad, look.shirt, cv2.LINE_AA, _BITS)
    cv2.line(frame, top_right, waist_right, color, width, cv2.LINE_AA, _BITS)
    cv2.line(frame, top_left, waist_left, color, width, cv2.LINE_AA, _BITS)
    cv2.line(
      frame,
      _between(top_left, top_right, 0.5),
      _between(waist_left, waist_right, 0.5),
      look.shirt,
      max(1, width * 2 // 3),
      cv2.LINE_AA,
      _BITS,
    )
    cv2.line(frame, neck, points[poses.HEAD], _shade(look.skin, 0.8), self._width["neck"], cv2.LINE_AA, _BITS)

  def _head(self, frame, points, index: int) -> None:
    look = self._look
    sin, cos = self._sin[index], self._cos[index]
    x, y = points[poses.HEAD]
    radius = _HEAD * self._height * _ONE
    back = look.skin if look.cut == "bald" else look.hair
    if look.cut == "long":
      low = (int(x - 0.35 * radius * sin), int(y + 0.55 * radius))
      axes = (int(0.6 * radius), int(0.85 * radius))
      cv2.ellipse(frame, low, axes, 0, 0, 360, _shade(back, 0.85), cv2.FILLED, cv2.LINE_AA, _BITS)
    cv2.circle(
      frame,
      (x, y),
      int(radius * 0.96),
      _shade(back, 0.8 if look.cut == "bald" else 1.0),
      cv2.FILLED,
      cv2.LINE_AA,
      _BITS,
    )
    if cos < -0.35:
      return
    face = (int(x + 0.3 * radius * sin), int(y + 0.2 * radius))
    axes = (int(0.68 * radius), int(0.78 * radius))
    cv2.ellipse(frame, face, axes, 0, 0, 360, look.skin, cv2.FILLED, cv2.LINE_AA, _BITS)
    nose = (int(x + 0.82 * radius * sin), int(y + 0.22 * radius))
    cv2.circle(frame, nose, int(0.18 * radius), _shade(look.skin, 0.8), cv2.FILLED, cv2.LINE_AA, _BITS)
    dot = max(_ONE // 2, int(0.12 * radius))
    for side in (-0.3, 0.3):
      eye = (int(face[0] + radius * (0.25 * sin + side * max(cos, 0.15))), int(face[1] - 0.12 * radius))
      cv2.circle(frame, eye, dot, (30, 26, 26), cv2.FILLED, cv2.LINE_AA, _BITS)
    if self._talking[index]:
      mouth = (int(face[0] + 0.3 * radius * sin), int(face[1] + 0.38 * radius))
      cv2.ellipse(
        frame,
        mouth,
        (int(0.24 * radius), int(0.22 * radius)),
        0,
        0,
        360,
        (110, 20, 26),
        cv2.FILLED,
        cv2.LINE_AA,
        _BITS,
      )


def _between(start, end, part: float) -> tuple[int, int]:
  return int(start[0] + part * (end[0] - start[0])), int(start[1] + part * (end[1] - start[1]))


class Thing:
  """A ball, a box, a telephone or any polygons, moving over the picture."""

  def __init__(self, kind: str, points: np.ndarray, size: float, color: Color, visible: np.ndarray | None = None):
    """Prepares.

    Args:
      kind: "ball", "box", "phone" or "chair".
      points: ``[T, 2]`` centres in pixels; for a chair ``[T, 10, 2]``, the points of `chair_corners`.
      size: in pixels; radius of a ball, half the width of a box, half the length of a phone, width of a
        chair's legs.
      color: of it.
      visible: ``[T]`` bool; always, where None.
    """
    self._paint = {"ball": self._ball, "box": self._box, "phone": self._phone, "chair": self._chair}[kind]
    self._points = _fixed(points)
    self._visible = None if visible is None else visible.tolist()
    self._size = size
    self._color = color

  def paint(self, frame: np.ndarray, index: int) -> None:
    """Paints it, unless it is not to be seen."""
    if self._visible is None or self._visible[index]:
      self._paint(frame, self._points[index])

  def _ball(self, frame, point) -> None:
    radius = int(self._size * _ONE)
    light = (point[0] - radius // 4, point[1] - radius // 4)
    cv2.circle(frame, point, radius, _shade(self._color, 0.65), cv2.FILLED, cv2.LINE_AA, _BITS)
    cv2.circle(frame, light, int(radius * 0.65), self._color, cv2.FILLED, cv2.LINE_AA, _BITS)

  def _box(self, frame, point) -> None:
    half = int(self._size * _ONE)
    x, y = point
    low, top = y + half * 3 // 4, y - half * 3 // 4
    cv2.rectangle(frame, (x - half, top), (x + half, low), self._color, cv2.FILLED, cv2.LINE_AA, _BITS)
    cv2.rectangle(frame, (x - half, top), (x + half, low), _shade(self._color, 0.55), 1, cv2.LINE_AA, _BITS)
    cv2.line(frame, (x, top), (x, low), _shade(self._color, 1.5), max(1, int(self._size / 4)), cv2.LINE_AA, _BITS)

  def _phone(self, frame, point) -> None:
    half = int(self._size * _ONE)
    x, y = point
    width = max(2, round(self._size * 0.9))
    cv2.line(frame, (x, y - half), (x, y + half), self._color, width, cv2.LINE_AA, _BITS)

  def _chair(self, frame, points) -> None:
    width = max(1, round(self._size))
    dark = _shade(self._color, 0.6)
    for top, foot in zip(points[:4], points[6:10], strict=True):
      cv2.line(frame, top, foot, dark, width, cv2.LINE_AA, _BITS)
    back = np.array([points[0], points[1], points[5], points[4]], np.int32)
    cv2.fillConvexPoly(frame, back, _shade(self._color, 0.8), cv2.LINE_AA, _BITS)
    cv2.fillConvexPoly(frame, np.array(points[:4], np.int32), self._color, cv2.LINE_AA, _BITS)


def chair_corners() -> np.ndarray:
  """``[10, 3]`` in the sitter's axes: four corners of the seat, two upper ones of the back, four feet."""
  seat = [(-0.13, 0.22, 0.14), (-0.13, 0.22, -0.14), (0.15, 0.22, -0.14), (0.15, 0.22, 0.14)]
  back = [(-0.17, 0.52, 0.14), (-0.17, 0.52, -0.14)]
  return np.array(seat + back + [(x, 0.0, z) for x, _, z in seat])
