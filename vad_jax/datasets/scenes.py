"""Who does what, where and when in the synthetic set: scripts, and their staging on the picture.

Scripts are dealt from decks, so that every class has its share in any run of videos: a deck holds the casts
of `len(layout)` videos. A video's script follows from level, seed, split and index alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vad_jax.datasets import figures, places, poses

_STANCE_CLASSES = {  # of AVA
  1: "bend stoop",
  7: "jump",
  10: "run",
  11: "sit",
  12: "stand stride guard ready lunge",
  14: "walk",
}
_GESTURE_CLASSES = {
  15: "phone",
  17: "carry",
  36: "lift",
  47: "put_down",
  57: "text",
  58: "throw",
  64: "hit",
  67: "clap",
  68: "shake",
  69: "wave",
  79: "talk",
  80: "talk watch fists",  # who is turned to another person without touching
}
_BLEND = 0.2  # seconds from one act to the next, before and after the change
_MARGIN = 0.22  # of a person's height that is kept free between it and the picture's edge


class Act(NamedTuple):
  """What one person does: keys of `poses.STANCES` and `poses.GESTURES`."""

  stance: str
  gesture: str

  @property
  def classes(self) -> tuple[int, ...]:
    """AVA ids."""
    tables = ((_STANCE_CLASSES, self.stance), (_GESTURE_CLASSES, self.gesture))
    return tuple(class_id for table, name in tables for class_id, names in table.items() if name in names.split())


def _forms(stances: str, gestures: str) -> tuple[Act, ...]:
  """Forms of an act, one of which is played; names are separated by bars."""
  return tuple(Act(*names) for names in itertools.product(stances.split("|"), gestures.split("|")))


class Level(NamedTuple):
  """How hard a set is.

  Attributes:
    solos: acts of one person, each with its forms.
    pairs: acts of two who face each other, each with its forms.
    layout: number of single persons and of pairs in each video of a deck.
    heights: smallest and largest person, in heights of the picture.
    floor: where the floor may begin, in heights of the picture.
    tempo, vigour: ranges of speed and amplitude of motions.
    pan, shake: amplitude of the camera's slow and quick motion, in heights of the picture.
    things: most things that lie or move about.
    changes: whether acts change within a video, and things move.
  """

  solos: tuple[tuple[Act, ...], ...]
  pairs: tuple[tuple[tuple[Act, ...], ...], ...]
  layout: tuple[tuple[int, int], ...]
  heights: tuple[float, float]
  floor: tuple[float, float]
  tempo: tuple[float, float]
  vigour: tuple[float, float]
  pan: float
  shake: float
  things: int
  changes: bool


_TALKING = (_forms("stand|stand|sit", "talk"), _forms("stand|stand|sit", "watch"))
_SHAKING = (_forms("stand", "shake"),) * 2
_FIGHTING = (_forms("guard", "hit"),) * 2
_FACING = (_forms("stand|ready", "watch|fists"),) * 2
LEVELS = {
  "easy": Level(
    solos=(
      _forms("stand|stride", "idle|raised"),
      _forms("sit", "idle"),
      _forms("bend", "idle"),
      _forms("walk", "idle"),
      _forms("run", "idle"),
      _forms("jump", "idle"),
      _forms("stand|sit", "wave"),
      _forms("stand|sit|walk", "phone"),
      _forms("stand|walk", "carry"),
      _forms("stoop", "lift"),
      _forms("lunge", "throw"),
    ),
    pairs=(_SHAKING, _FIGHTING, _TALKING, _TALKING),
    layout=((1, 0),) * 10 + ((2, 0),) * 6 + ((0, 1),) * 4,
    heights=(0.56, 0.8),
    floor=(0.56, 0.7),
    tempo=(0.9, 1.1),
    vigour=(0.95, 1.15),
    pan=0.03,
    shake=0.0,
    things=1,
    changes=False,
  ),
  "full": Level(
    solos=(
      _forms("stand|stride|ready", "idle|raised|hand_at_ear"),
      _forms("sit", "idle|raised|hand_at_ear"),
      _forms("bend", "idle"),
      _forms("walk", "idle|raised"),
      _forms("run", "idle"),
      _forms("jump", "idle"),
      _forms("stand|sit|walk", "wave"),
      _forms("stand|sit|walk", "phone"),
      _forms("stand|sit|walk", "text"),
      _forms("stand|walk", "carry"),
      _forms("stand|sit", "clap"),
      _forms("stoop", "lift"),
      _forms("stoop", "put_down"),
      _forms("lunge", "throw"),
    ),
    pairs=(_SHAKING, _SHAKING, _FIGHTING, _FIGHTING, _TALKING, _TALKING, _FACING),
    layout=((1, 0), (2, 0), (0, 1), (1, 1)) * 3 + ((3, 0), (4, 0), (2, 1)) * 2 + ((1, 0), (2, 0)),
    heights=(0.36, 0.84),
    floor=(0.46, 0.6),
    tempo=(0.75, 1.25),
    vigour=(0.65, 1.1),
    pan=0.06,
    shake=0.006,
    things=3,
    changes=True,
  ),
}

Cast = list[list[Act]]  # of a group: for every person the acts in order


class Actor(NamedTuple):
  """One person of a scene.

  Attributes:
    look: its appearance.
    view: where its body is.
    boxes: ``[T, 4]`` xyxy pixels, unclipped.
    acts: the acts in order; `Scene.changes` says when one follows another.
    order: the larger, the nearer.
    things: what it handles.
    seats: chairs, painted before the person.
  """

  look: figures.Look
  view: figures.View
  boxes: np.ndarray
  acts: list[Act]
  order: float
  things: list[figures.Thing]
  seats: list[figures.Thing]


class Scene(NamedTuple):
  """All that a video shows.

  Attributes:
    actors: its people.
    changes: seconds at which acts change.
    backdrop: ``[h, w, 3]`` the place, larger than the picture.
    camera: ``[T, 2]`` pixels by which everything is shifted.
    things: things nobody handles, with their order.
  """

  actors: list[Actor]
  changes: Sequence[float]
  backdrop: np.ndarray
  camera: np.ndarray
  things: list[tuple[float, figures.Thing]]


def classes(level: str) -> list[int]:
  """AVA ids of all classes of a level, ascending."""
  forms = [*LEVELS[level].solos, *itertools.chain.from_iterable(LEVELS[level].pairs)]
  return sorted({class_id for act in itertools.chain.from_iterable(forms) for class_id in act.classes})


def script(level: Level, stream: Sequence[int], index: int, num_acts: int) -> list[Cast]:
  """The groups of video `index`: single persons and pairs, each with their acts.

  Args:
    level: how hard.
    stream: numbers that name the random stream (seed and split).
    index: of the video.
    num_acts: of each person.
  """
  deck, card = divmod(index, len(level.layout))
  rng = np.random.default_rng([*stream, 0, deck])
  solos, pairs = _dealt(rng, level.solos), _dealt(rng, level.pairs)
  layout = [level.layout[i] for i in rng.permutation(len(level.layout))]
  for num_solos, num_pairs in layout[: card + 1]:
    groups = [_cast(rng, solos, 1, num_acts) for _ in range(num_solos)]
    groups += [_cast(rng, pairs, 2, num_acts) for _ in range(num_pairs)]
  return groups


def _dealt(rng: np.random.Generator, acts: Sequence) -> Iterator:
  """Acts in random order, all of them before any comes again."""
  while True:
    for i in rng.permutation(len(acts)):
      yield acts[i]


def _cast(rng: np.random.Generator, acts: Iterator, size: int, num_acts: int) -> Cast:
  cast: Cast = [[] for _ in range(size)]
  for _ in range(num_acts):
    forms = next(acts)
    parts = [forms] if size == 1 else [forms[i] for i in rng.permutation(size)]
    for person, part in zip(cast, parts, strict=True):
      person.append(part[rng.integers(len(part))])
  return cast


def stage(
  level: Level, groups: list[Cast], times: np.ndarray, size: tuple[int, int], rng: np.random.Generator
) -> Scene:
  """Puts a script on the picture.

  Args:
    level: how hard.
    groups: of `script`.
    times: ``[T]`` seconds of the frames.
    size: height and width of the picture.
    rng: source of randomness.
  """
  height, width = size
  num_acts = len(groups[0][0])
  changes = [float(int(part * times[-1] / num_acts) + rng.integers(0, 2) + 0.5) for part in range(1, num_acts)]
  camera = _camera(level, times, height, rng)
  margin = int(np.abs(camera).max()) + 2
  floor = height * rng.uniform(*level.floor)
  backdrop = places.random_place(rng, height + 2 * margin, width + 2 * margin, floor + margin, busy=level.changes)
  film = _Film(times, _weights(times, changes), width, camera, backdrop.mean((0, 1)))
  actors: list[Actor] = []
  slots = _slots([len(cast) for cast in groups], rng)
  alone = sum(len(cast) for cast in groups) == 1
  for cast, slot in zip(groups, slots, strict=True):
    tall = min(height * rng.uniform(*level.heights), width * (0.66 if len(cast) == 1 else 0.58))
    spots = _spots(cast, slot * width, tall, 0.36 * height + 0.76 * tall, width, alone, rng)
    styles = _styles(level, cast, rng)
    for spot, acts, own_styles in zip(spots, cast, styles, strict=True):
      actors.append(_actor(film, spot, acts, own_styles, rng))
  return Scene(actors, changes, backdrop, camera, _litter(level, times, size, floor, camera, rng))


class _Film(NamedTuple):
  """What all people of a scene share.

  Attributes:
    times: ``[T]`` seconds.
    weights: ``[T, acts]`` share of each act.
    width: of the picture.
    camera: ``[T, 2]`` its shift.
    color: ``[3]`` mean of the place.
  """

  times: np.ndarray
  weights: np.ndarray
  width: int
  camera: np.ndarray
  color: np.ndarray


class _Spot(NamedTuple):
  """Where one person is to be; pixels, but for `reach` and `meet`: heights of the person.

  Attributes:
    x: where it stands or begins to walk.
    feet: y of the floor under it.
    tall: standing height.
    side: where it looks, -1 to the left or 1 to the right.
    paired: whether that is a partner.
    reach: half the distance to the partner.
    meet: height above the floor where hands meet.
  """

  x: float
  feet: float
  tall: float
  side: float
  paired: bool
  reach: float
  meet: float


def _spots(cast: Cast, center: float, tall: float, feet: float, width: int, alone: bool, rng) -> list[_Spot]:
  if len(cast) == 1:
    # In company one looks away from the middle: who is turned to others would be watching them.
    side = rng.choice([-1.0, 1.0]) if alone else np.sign(center - 0.5 * width)
    return [_Spot(center, feet, tall, side, False, 0.0, 0.0)]
  gestures = {act.gesture for acts in cast for act in acts}
  gap = tall * (rng.uniform(0.44, 0.5) if gestures & {"shake", "hit"} else rng.uniform(0.62, 0.9))
  room = 0.5 * gap + _MARGIN * tall
  center = float(np.clip(center, room, width - room))
  talls = tall * rng.uniform(0.95, 1.05, 2)
  return [
    _Spot(center - side * 0.5 * gap, feet, own, side, True, 0.5 * gap / own, 0.64 * talls.min() / own)
    for own, side in zip(talls, (1.0, -1.0), strict=True)
  ]


def _slots(sizes: list[int], rng: np.random.Generator) -> np.ndarray:
  """Centres of groups across the picture, by the room they need."""
  order = rng.permutation(len(sizes))
  room = np.array(sizes, float)[order]
  centers = (np.cumsum(room) - 0.5 * room) / room.sum()
  centers = 0.08 + 0.84 * centers + rng.uniform(-1, 1, len(sizes)) * (0.2 if len(sizes) == 1 else 0.05)
  if sum(sizes) == 2 and len(sizes) == 1:
    centers = 0.5 + 0.2 * (centers - 0.5)
  slots = np.empty(len(sizes))
  slots[order] = centers
  return slots


def _styles(level: Level, cast: Cast, rng: np.random.Generator) -> list[list[poses.Style]]:
  """How every act is performed; partners keep time."""
  columns = []
  for _ in cast[0]:
    style = poses.Style(
      tempo=rng.uniform(*level.tempo),
      vigour=rng.uniform(*level.vigour),
      phase=rng.uniform(0, 2 * np.pi),
      side=int(rng.integers(2)),
      variant=rng.random(),
    )
    columns.append([style._replace(variant=rng.random()) for _ in cast])
  return [list(row) for row in zip(*columns, strict=True)]


def _camera(level: Level, times: np.ndarray, height: int, rng: np.random.Generator) -> np.ndarray:
  frequency, phase = rng.uniform(0.06, 0.14, 2), rng.uniform(0, 2 * np.pi, 2)
  pan = np.sin(2 * np.pi * frequency * times[:, None] + phase) * [1.0, 0.3]
  jitter = rng.normal(0, 1, (len(times) + 4, 2))
  shake = sum(jitter[i : i + len(times)] for i in range(5)) / 5**0.5
  return height * (level.pan * pan + level.shake * shake)


def _weights(times: np.ndarray, changes: Sequence[float]) -> np.ndarray:
  """``[T, acts]`` share that each act has in the pose; one passes smoothly into the next."""
  steps = [np.clip((times - change) / (2 * _BLEND) + 0.5, 0, 1) for change in changes]
  begun = np.stack([np.ones_like(times), *(step * step * (3 - 2 * step) for step in steps), np.zeros_like(times)], -1)
  return begun[:, :-1] - begun[:, 1:]


def _actor(film: _Film, spot: _Spot, acts: list[Act], styles: list[poses.Style], rng) -> Actor:
  times, tall = film.times, spot.tall
  lag = 0.0 if spot.paired else rng.uniform(-0.08, 0.08)  # seconds off the beat; partners keep time
  speeds = [poses.travel_speed(act.stance, style) for act, style in zip(acts, styles, strict=True)]
  x, heading = _path(spot.x, tall * film.weights @ speeds, times, film.width, tall, rng)
  yaws = [_yaw(act, spot, heading, rng) for act in acts]
  body = np.zeros((len(times), poses.NUM_JOINTS, 3))
  for act, style, weight in zip(acts, styles, film.weights.T, strict=True):
    style = style._replace(reach=spot.reach, meet=spot.meet)
    if act.gesture == "hit" and spot.side < 0:
      style = style._replace(phase=style.phase + np.pi)  # they hit in turn
    body += weight[:, None, None] * poses.joints(act.stance, act.gesture, times + lag * (not spot.paired), style)
  yaw = np.sum(film.weights.T * yaws, 0)
  feet = np.stack([x, np.full(len(times), spot.feet)], -1)
  points, near = figures.project(body, yaw, feet, tall)
  look = figures.random_look(rng, film.color)
  view = figures.View(points, near, yaw, tall)
  things, seats = [], []
  for act, style, weight, act_yaw in zip(acts, styles, film.weights.T, yaws, strict=True):
    on = weight >= 0.5
    things += _handled(act, style, view, times + lag, on, film.camera, rng)
    if act.stance == "sit":
      where = np.broadcast_to(feet[on.argmax()], feet.shape)
      corners = np.broadcast_to(figures.chair_corners(), (len(times), 10, 3))
      corners, _ = figures.project(corners, act_yaw, where, tall)
      color = figures.random_look(rng, film.color).trousers
      seats.append(figures.Thing("chair", corners + film.camera[:, None], 0.025 * tall, color))
  view = view._replace(points=points + film.camera[:, None])
  return Actor(look, view, figures.body_boxes(view, look), acts, spot.feet, things, seats)


def _yaw(act: Act, spot: _Spot, heading: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """``[T]`` where somebody faces who goes along the heading or does something else."""
  if act.stance in ("walk", "run"):
    return heading * rng.uniform(1.1, 1.45)
  if spot.paired:
    angle = 1.4
  elif act.gesture in ("wave", "raised"):
    angle = rng.uniform(0.0, 0.6)
  elif act.stance in ("bend", "stoop", "lunge"):
    angle = rng.uniform(0.9, 1.5)
  else:
    angle = rng.uniform(0.4 if act.stance == "sit" else 0.1, 1.3)
  return np.full(len(heading), spot.side * angle)


def _path(
  start: float, speed: np.ndarray, times: np.ndarray, width: int, tall: float, rng
) -> tuple[np.ndarray, np.ndarray]:
  """To and fro between the picture's edges: ``[T]`` x and ``[T]`` heading in [-1, 1], 1 is right."""
  low, high = _MARGIN * tall, width - _MARGIN * tall
  span = max(high - low, 1.0)
  start = float(np.clip(start, low, high)) - low
  start = start if rng.random() < 0.5 else 2 * span - start
  gone = (start + np.cumsum(speed) * (times[1] - times[0])) % (2 * span)
  heading = np.where(gone < span, 1.0, -1.0)
  turn = max(3, round(0.16 / (times[1] - times[0])))
  heading = np.convolve(np.pad(heading, turn, mode="edge"), np.full(2 * turn + 1, 1 / (2 * turn + 1)), mode="valid")
  return low + np.where(gone < span, gone, 2 * span - gone), heading


def _handled(act: Act, style, view: figures.View, times, on, camera, rng) -> list[figures.Thing]:
  """The things of one act, seen while `on`."""
  tall = view.height
  hand = view.points[:, poses.HANDS][:, style.side]
  between = view.points[:, poses.HANDS].mean(1)
  color = [(226, 190, 120), (200, 60, 50), (60, 110, 200), (240, 220, 70), (240, 240, 240)][rng.integers(5)]
  if act.gesture == "carry":
    return [figures.Thing("box", between + camera, 0.12 * tall, color, on)]
  if act.gesture in ("phone", "text"):
    shade = [(18, 18, 22), (236, 238, 242)][rng.integers(2)]
    return [figures.Thing("phone", hand + np.array([0, -0.02 * tall]) + camera, 0.055 * tall, shade, on)]
  since = poses.event_phase(times)
  if act.gesture in ("lift", "put_down"):
    turning = np.where(on, np.abs(since), 1).argmin()
    held = (since >= 0) if act.gesture == "lift" else (since < 0)
    point = np.where(held[:, None], between, between[turning])
    return [figures.Thing("box", point + np.array([0, 0.05 * tall]) + camera, 0.12 * tall, color, on)]
  if act.gesture == "throw":
    release = np.where(on, np.abs(since), 1).argmin()
    flight = np.maximum(since, 0)[:, None]
    ahead = np.sin(view.yaw[release])
    flown = hand[release] + tall * (flight * [2.2 * ahead, -0.5] + flight**2 * [0, 2.2])
    point = np.where((since >= 0)[:, None], flown, hand)
    return [figures.Thing("ball", point + camera, 0.06 * tall, color, on & (since < 0.42))]
  return []


def _litter(level: Level, times, size, floor, camera, rng) -> list[tuple[float, figures.Thing]]:
  """Balls and boxes on the floor that nobody handles."""
  height, width = size
  things = []
  for _ in range(rng.integers(0, level.things + 1)):
    kind = ("ball", "box")[rng.integers(2)]
    radius = height * rng.uniform(0.03, 0.07)
    low = rng.uniform(floor + 0.05 * height, height)
    x = width * rng.uniform(0.05, 0.95) + np.zeros(len(times))
    bounce = np.zeros(len(times))
    if level.changes:
      x = (x + width * rng.uniform(-0.35, 0.35) * times + 0.2 * width) % (1.4 * width) - 0.2 * width
      if kind == "ball":
        bounce = height * rng.uniform(0, 0.25) * np.abs(np.sin(np.pi * rng.uniform(0.7, 1.4) * times))
    point = np.stack([x, low - radius - bounce], -1) + camera
    color = figures.random_look(rng, np.full(3, 128)).shirt
    things.append((low, figures.Thing(kind, point, radius, color)))
  return things
