"""Places behind the synthetic people: textured rooms, streets, parks and halls with furniture."""

import cv2
import numpy as np


def random_place(rng: np.random.Generator, height: int, width: int, floor: float, *, busy: bool) -> np.ndarray:
  """Paints a place.

  Args:
    rng: source of randomness.
    height: of the picture in pixels.
    width: of the picture.
    floor: where the floor begins, from the top in pixels.
    busy: full of things and strong texture, or calm.

  Returns:
    ``[height, width, 3]`` uint8 RGB.
  """
  place = np.zeros((height, width, 3), np.uint8)
  paint = (_room, _street, _park, _hall)[rng.integers(4)]
  paint(place, rng, int(floor), (2 if busy else 0) + int(rng.integers(0, 4 if busy else 3)))
  spots = rng.normal(0, 1, (max(2, height // 20), max(2, width // 20)))
  spots = cv2.resize(spots, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
  grain = rng.normal(0, 1, (height, width, 1))
  texture = (8 * spots + 4 * grain) if busy else (6 * spots + 1.5 * grain)
  return np.clip(place + texture, 0, 255).astype(np.uint8)


def _muted(rng, value=(120, 235), saturation=(10, 70)):
  hsv = np.array([[[rng.integers(0, 180), rng.integers(*saturation), rng.integers(*value)]]], np.uint8)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].tolist()


def _darker(color, factor):
  return [value * factor for value in color]


def _gradient(place, top, bottom, upper, lower):
  """Fills rows with colours that pass from one into another."""
  part = np.linspace(0, 1, max(bottom - top, 1))[:, None, None]
  place[top:bottom] = (np.array(upper) * (1 - part) + np.array(lower) * part)[: bottom - top]


def _ground(place, rng, floor, color, planks):
  """A floor, lighter towards the viewer, with joints that meet at the horizon."""
  height, width = place.shape[:2]
  _gradient(place, floor, height, _darker(color, 0.8), color)
  joint = _darker(color, 0.68)
  shift = rng.uniform(0, 1)
  for part in np.arange(-1.5, 2.5, 1 / planks):
    foot = round(width * (part + shift / planks))
    head = round(width * 0.5 + 0.35 * (foot - width * 0.5))
    cv2.line(place, (head, floor), (foot, height), joint, 1, cv2.LINE_AA)
  row = 4.0
  while floor + row < height:
    cv2.line(place, (0, floor + int(row)), (width, floor + int(row)), joint, 1)
    row *= 1.7


def _room(place, rng, floor, things):
  height, width = place.shape[:2]
  wall = _muted(rng)
  _gradient(place, 0, floor, wall, _darker(wall, 0.88))
  step = int(rng.integers(max(5, width // 28), max(6, width // 9)))
  if rng.random() < 0.5:
    for x in range(0, width, step):
      cv2.line(place, (x, 0), (x, floor), _darker(wall, 0.9), max(1, step // 4))
  _ground(place, rng, floor, _muted(rng, (100, 220), (20, 110)), rng.integers(5, 12))
  cv2.rectangle(place, (0, floor - max(2, height // 50)), (width, floor), _darker(wall, 0.6), -1)
  for _ in range(things):
    (_window, _picture, _cabinet, _shelf, _plant, _table)[rng.integers(6)](place, rng, floor)


def _hall(place, rng, floor, things):
  height, width = place.shape[:2]
  wall = _muted(rng)
  _gradient(place, 0, floor, _darker(wall, 0.8), wall)
  stripe = int(floor * rng.uniform(0.3, 0.7))
  cv2.rectangle(place, (0, stripe), (width, stripe + height // 16), _muted(rng, saturation=(60, 150)), -1)
  _ground(place, rng, floor, _muted(rng, (110, 200), (30, 120)), rng.integers(2, 5))
  for _ in range(things):
    (_window, _cabinet, _picture, _table)[rng.integers(4)](place, rng, floor)


def _street(place, rng, floor, things):
  height, width = place.shape[:2]
  _gradient(place, 0, floor, (150, 180, 215), (215, 220, 222))
  x = -int(rng.integers(0, width // 6))
  while x < width:
    wide = int(rng.integers(width // 6, width // 3))
    top = int(floor * rng.uniform(0.02, 0.45))
    color = _muted(rng, (80, 190))
    cv2.rectangle(place, (x, top), (x + wide, floor), color, -1)
    pitch, pane = max(5, height // 9), _darker(color, rng.choice([0.65, 1.2]))
    for y in range(top + pitch // 2, floor - pitch, pitch):
      for left in range(x + pitch // 3, x + wide - pitch // 2, pitch):
        cv2.rectangle(place, (left, y), (left + pitch // 2, y + pitch // 2), pane, -1)
    x += wide
  _ground(place, rng, floor, _muted(rng, (110, 180), (0, 25)), rng.integers(3, 7))
  for _ in range(things):
    (_lamp, _tree, _cabinet)[rng.integers(3)](place, rng, floor)


def _park(place, rng, floor, things):
  height, width = place.shape[:2]
  _gradient(place, 0, floor, (130, 175, 220), (205, 222, 228))
  xs = np.arange(width)
  for level, color in ((0.6, (120, 150, 130)), (0.8, (95, 130, 90))):
    bumps = np.sin(xs / width * rng.uniform(4, 12) + rng.uniform(0, 6)) + 0.5 * np.sin(xs / width * rng.uniform(12, 30))
    hill = (floor * level + 0.07 * floor * bumps).astype(int)
    place[:floor][np.arange(floor)[:, None] > hill] = color
  grass = _muted(rng, (110, 170), (60, 110))
  grass[1] = min(255, grass[1] + 35)
  _gradient(place, floor, height, _darker(grass, 0.8), grass)
  for _ in range(width // 2):
    x, y = int(rng.integers(width)), int(rng.integers(floor, height))
    cv2.line(place, (x, y), (x + 1, y - max(1, height // 60)), _darker(grass, rng.choice([0.8, 1.15])), 1)
  for _ in range(things + 1):
    (_tree, _tree, _lamp)[rng.integers(3)](place, rng, floor)


def _window(place, rng, floor):
  x, wide = _somewhere(place, rng, 0.12, 0.3)
  top, low = int(floor * 0.12), int(floor * rng.uniform(0.55, 0.75))
  cv2.rectangle(place, (x, top), (x + wide, low), (190, 215, 235), -1)
  for end in ((x + wide // 2, low), (x + wide, (top + low) // 2)):
    start = (end[0], top) if end[1] == low else (x, end[1])
    cv2.line(place, start, end, (235, 235, 230), max(1, wide // 18))
  cv2.rectangle(place, (x, top), (x + wide, low), (235, 235, 230), max(1, wide // 12))


def _picture(place, rng, floor):
  x, wide = _somewhere(place, rng, 0.08, 0.2)
  top = int(floor * rng.uniform(0.1, 0.4))
  low = top + int(wide * rng.uniform(0.6, 1.2))
  cv2.rectangle(place, (x, top), (x + wide, low), _muted(rng, (60, 230), (40, 150)), -1)
  cv2.circle(place, (x + wide // 2, (top + low) // 2), max(1, wide // 5), _muted(rng, (60, 230), (40, 150)), -1)
  cv2.rectangle(place, (x, top), (x + wide, low), (70, 50, 35), max(1, wide // 10))


def _cabinet(place, rng, floor):
  x, wide = _somewhere(place, rng, 0.12, 0.3)
  top = int(floor * rng.uniform(0.35, 0.7))
  low = floor + place.shape[0] // 24
  color = _muted(rng, (60, 170), (40, 130))
  cv2.rectangle(place, (x, top), (x + wide, low), color, -1)
  for part in range(1, int(rng.integers(2, 5))):
    y = top + part * (low - top) // 4
    cv2.line(place, (x, y), (x + wide, y), _darker(color, 0.6), max(1, wide // 30))
  cv2.rectangle(place, (x, top), (x + wide, low), _darker(color, 0.5), max(1, wide // 24))


def _shelf(place, rng, floor):
  x, wide = _somewhere(place, rng, 0.15, 0.3)
  y = int(floor * rng.uniform(0.3, 0.6))
  book = x
  while book < x + wide - 2:
    thick = max(2, int(rng.uniform(0.04, 0.1) * wide))
    tall = int(floor * rng.uniform(0.1, 0.2))
    cv2.rectangle(place, (book, y - tall), (book + thick, y), _muted(rng, (60, 220), (50, 170)), -1)
    book += thick + 1
  cv2.rectangle(place, (x, y), (x + wide, y + max(1, floor // 40)), (90, 64, 42), -1)


def _plant(place, rng, floor):
  x, wide = _somewhere(place, rng, 0.06, 0.14)
  low = floor + place.shape[0] // 20
  pot = low - wide
  for _ in range(9):
    tip = (int(x + wide * rng.uniform(-0.6, 1.6)), int(pot - wide * rng.uniform(0.5, 2.2)))
    cv2.line(place, (x + wide // 2, pot), tip, (50, int(rng.integers(90, 150)), 60), max(1, wide // 6), cv2.LINE_AA)
  cv2.rectangle(place, (x, pot), (x + wide, low), (150, 90, 60), -1)


def _table(place, rng, floor):
  x, wide = _somewhere(place, rng, 0.2, 0.4)
  top, low = int(floor * rng.uniform(0.72, 0.85)), floor + place.shape[0] // 16
  color = _muted(rng, (70, 160), (60, 140))
  for leg in (x + wide // 12, x + wide - wide // 12):
    cv2.line(place, (leg, top), (leg, low), _darker(color, 0.7), max(1, wide // 20))
  cv2.rectangle(place, (x, top), (x + wide, top + max(2, wide // 14)), color, -1)


def _lamp(place, rng, floor):
  x, _ = _somewhere(place, rng, 0.05, 0.1)
  thick = max(1, place.shape[1] // 90)
  top = int(floor * rng.uniform(0.05, 0.3))
  cv2.line(place, (x, top), (x, floor + place.shape[0] // 20), (60, 62, 66), thick)
  cv2.circle(place, (x, top), 3 * thick, (240, 232, 190), -1, cv2.LINE_AA)


def _tree(place, rng, floor):
  x, wide = _somewhere(place, rng, 0.12, 0.3)
  crown = int(floor * rng.uniform(0.2, 0.5))
  cv2.line(
    place,
    (x + wide // 2, crown),
    (x + wide // 2, floor + place.shape[0] // 30),
    (92, 70, 50),
    max(2, wide // 7),
  )
  for _ in range(8):
    center = (int(x + wide * rng.uniform(0.1, 0.9)), int(crown + wide * rng.uniform(-0.4, 0.35)))
    green = int(rng.integers(85, 140))
    cv2.circle(
      place,
      center,
      max(2, int(wide * rng.uniform(0.2, 0.35))),
      (green // 2, green, green // 2),
      -1,
      cv2.LINE_AA,
    )


def _somewhere(place, rng, least, most):
  """Left edge and width of a thing, from shares of the picture's width."""
  width = place.shape[1]
  wide = max(3, int(width * rng.uniform(least, most)))
  return int(rng.integers(-wide // 3, width - wide // 2)), wide
