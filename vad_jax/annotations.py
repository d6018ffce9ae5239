"""AVA-format files: annotation and result CSVs, label maps. The one place that reads and writes them.

A row of an AVA CSV is ``video_id,timestamp,x1,y1,x2,y2,action_id,extra``: one box with one action at one
keyframe. The timestamp is in seconds from the start of the movie, the box normalised xyxy, the action id
1-based, and ``extra`` the person id of an annotation or the score of a detection (it may be absent: then 1).
A row ``video_id,timestamp`` alone says that a keyframe was annotated and holds nobody.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

PathLike = str | os.PathLike[str]

_LABELS = Path(__file__).parent / "datasets" / "labels"
# The 60 classes that AVA is scored on, and all 80; ids and names are those of versions 2.1 and 2.2.
LABEL_MAPS = {"ava_60": _LABELS / "ava_v2.2.pbtxt", "ava_80": _LABELS / "ava_80.pbtxt"}

_CHUNK = 1 << 20  # characters of a CSV that are parsed at once, so that memory stays near the size of the result


class AnnotationError(ValueError):
  """A file of annotations or results that cannot be read; the message names file and line."""


class Rows(NamedTuple):
  """An AVA CSV in columns; one entry a row, in file order.

  Attributes:
    video: ``[R]`` str (object array).
    timestamp: ``[R]`` float64, seconds.
    boxes: ``[R, 4]`` float64 xyxy in [0, 1]; NaN where the row only names a keyframe.
    action: ``[R]`` int32 action id, 1-based; 0 where the row only names a keyframe.
    extra: ``[R]`` float64 person id of an annotation, score of a detection.
  """

  video: np.ndarray
  timestamp: np.ndarray
  boxes: np.ndarray
  action: np.ndarray
  extra: np.ndarray

  def select(self, index: np.ndarray) -> "Rows":
    """Rows at the given indices, or where a mask is true."""
    return Rows(*(column[index] for column in self))


class Keyframe(NamedTuple):
  """One annotated keyframe with all its actors.

  Attributes:
    video: name of the video.
    timestamp: seconds.
    boxes: ``[n, 4]`` float32 xyxy in [0, 1].
    labels: ``[n, K]`` float32 multi-hot.
    person_ids: ``[n]`` int64.
  """

  video: str
  timestamp: float
  boxes: np.ndarray
  labels: np.ndarray
  person_ids: np.ndarray


def read_ava_csv(path: PathLike) -> Rows:
  """Reads an annotation or result CSV.

  Raises:
    AnnotationError: a row is malformed; names the file, the line and what is wrong with it.
    FileNotFoundError: there is no such file.
  """
  empty = Rows(np.empty(0, object), np.empty(0), np.empty((0, 4)), np.empty(0, np.int32), np.empty(0))
  columns = [list(column) for column in zip(empty, *iterate_ava_csv(path), strict=True)]
  return Rows(*(_join(column) for column in columns))


def iterate_ava_csv(path: PathLike) -> Iterator[Rows]:
  """Reads a CSV like `read_ava_csv`, part by part in flat memory.

  Yields:
    some rows; rows of one keyframe that stand together in the file come together.
  """
  names: dict[str, str] = {}  # keeps one string for each video instead of one for each row
  number = 1
  try:
    with open(path, encoding="utf-8-sig") as file:
      for lines in _chunks(file):
        # Rows of several kinds, or with something wrong, are read one by one.
        yield _parse_full_rows(lines, names) or _parse_rows(lines, names, path, number)
        number += len(lines)
  except UnicodeDecodeError:
    raise AnnotationError(f"{path}: not a text file; expected a CSV in UTF-8") from None


def read_excluded(path: PathLike) -> set[tuple[str, float]]:
  """Reads a list of keyframes to leave out: rows ``video_id,timestamp``.

  Returns:
    video and timestamp, in seconds, of each.

  Raises:
    AnnotationError: a row is malformed.
    FileNotFoundError: there is no such file.
  """
  rows = read_ava_csv(path)
  if rows.action.any():
    raise AnnotationError(f"{path}: a row holds a box; expected only rows video_id,timestamp (excluded keyframes)")
  return set(zip(rows.video.tolist(), rows.timestamp.tolist(), strict=True))


def read_detections_json(path: PathLike) -> tuple[Rows, Rows]:
  """Reads the detections that ``vad_jax.predict`` writes as JSON.

  Returns:
    one row for each box and action, and one row for each box, with the actor score and action 1.

  Raises:
    AnnotationError: it is not such a file; names what is missing.
    FileNotFoundError: there is no such file.
  """
  try:
    content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    video = Path(content["video"]).stem.replace(",", "_")  # as in the CSV beside it
    actors = [(frame["time"], actor) for frame in content["keyframes"] for actor in frame["actors"]]
    persons = [(time, actor["box"], 1, actor["score"]) for time, actor in actors]
    actions = [
      (time, actor["box"], action["id"], action["score"]) for time, actor in actors for action in actor["actions"]
    ]
    return _same_video(video, actions), _same_video(video, persons)
  except json.JSONDecodeError as error:
    raise AnnotationError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
  except KeyError as error:
    raise AnnotationError(f"{path}: not detections of vad_jax.predict: {error} is missing") from None
  except (TypeError, ValueError) as error:
    raise AnnotationError(f"{path}: not detections of vad_jax.predict: {error}") from None


def write_ava_csv(path: PathLike, rows: Rows, *, extra_format: str = "%.9g") -> None:
  """Writes rows; timestamps as AVA does (``0902``; sub-second ones with decimals).

  Args:
    path: the CSV.
    rows: annotations or detections; boxes are written to six digits.
    extra_format: of the last column. The default keeps whole numbers whole and float32 scores exact: rounding
      would make equal scores, and with them another mAP.
  """
  with open(path, "w", encoding="utf-8") as file:
    for video, timestamp, box, action, extra in zip(*rows, strict=True):
      time = f"{int(timestamp):04d}" if timestamp == int(timestamp) else f"{timestamp:.6f}".rstrip("0")
      if action == 0:
        file.write(f"{video},{time}\n")
      else:
        coordinates = ",".join(f"{value:.6g}" for value in box)
        file.write(f"{video},{time},{coordinates},{action},{extra_format % extra}\n")


def keyframes(rows: Rows, num_classes: int) -> list[Keyframe]:
  """Merges the rows of a box into one multi-label actor, and the actors of a keyframe into one entry.

  Rows belong to one actor when their keyframe, coordinates and person id agree. Keyframes and actors keep the
  order of their first appearance.

  Args:
    rows: annotations.
    num_classes: ``K``; class id ``k`` becomes index ``k - 1``.

  Raises:
    AnnotationError: an action id is larger than ``num_classes``.
  """
  if len(rows.action) and rows.action.max() > num_classes:
    raise AnnotationError(f"action id {rows.action.max()} does not fit {num_classes} classes")
  frames: dict[tuple[str, float], dict[tuple, np.ndarray]] = {}
  for video, timestamp, box, action, person in zip(*rows, strict=True):
    actors = frames.setdefault((video, float(timestamp)), {})
    if action:
      actors.setdefault((*box, person), np.zeros(num_classes, np.float32))[action - 1] = 1
  return [
    Keyframe(
      video,
      timestamp,
      np.array([actor[:4] for actor in actors], np.float32).reshape(-1, 4),
      np.array(list(actors.values()), np.float32).reshape(-1, num_classes),
      np.array([actor[4] for actor in actors], np.int64),
    )
    for (video, timestamp), actors in frames.items()
  ]


def read_label_map(path: PathLike) -> dict[int, str]:
  """Reads an AVA label map (``.pbtxt``): class id to name.

  Args:
    path: the file, or one of the names in `LABEL_MAPS`.

  Raises:
    AnnotationError: no class was found, a block lacks its name or id, or an id is 0 or stands twice.
    FileNotFoundError: there is no such file.
  """
  names: dict[int, str] = {}
  path = LABEL_MAPS.get(str(path), path)
  try:
    text = Path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError:
    raise AnnotationError(f"{path}: not a text file; expected a label map (.pbtxt)") from None
  for item in re.finditer(r"\b(?:item|label)\s*\{([^{}]*)\}", text):
    place = f"{path}:{text.count(chr(10), 0, item.start()) + 1}"
    name = re.search(r'\bname:\s*"([^"]*)"', item[1])
    number = re.search(r"\b(?:label_)?id:\s*(\d+)", item[1])
    if name is None or number is None:
      raise AnnotationError(f'{place}: this item lacks its name or id; expected name: "..." and id: N')
    index = int(number[1])
    if index < 1:
      raise AnnotationError(f"{place}: class id 0; ids count from 1")
    if index in names:
      raise AnnotationError(f"{place}: class id {index} stands twice")
    names[index] = name[1]
  if not names:
    raise AnnotationError(f"{path}: no class found; expected blocks `item {{ name: ... id: ... }}`")
  return names


def write_label_map(path: PathLike, names: dict[int, str]) -> None:
  """Writes an AVA label map (``.pbtxt``)."""
  blocks = [f'item {{\n  name: "{name}"\n  id: {index}\n}}\n' for index, name in sorted(names.items())]
  Path(path).write_text("".join(blocks), encoding="utf-8")


def _same_video(video: str, rows: list[tuple[float, list[float], int, float]]) -> Rows:
  time, boxes, action, score = zip(*rows, strict=True) if rows else ((),) * 4
  return Rows(
    np.full(len(rows), video, object),
    np.array(time, np.float64),
    np.array(boxes, np.float64).reshape(-1, 4),
    np.array(action, np.int32),
    np.array(score, np.float64),
  )


def _chunks(file: TextIO) -> Iterator[list[str]]:
  """Lines of a file, some at a time; lines of one keyframe that follow each other stay together."""
  held: list[str] = []
  while lines := file.readlines(_CHUNK):
    lines = held + lines
    keyframe, cut = lines[-1].split(",", 2)[:2], len(lines)
    while cut and lines[cut - 1].split(",", 2)[:2] == keyframe:
      cut -= 1
    held = lines[cut:]
    if cut:
      yield lines[:cut]
  if held:
    yield held


def _join(parts: list[np.ndarray]) -> np.ndarray:
  """Joins arrays and forgets them, so that no more than one column is in memory twice."""
  joined = np.concatenate(parts)
  parts.clear()
  return joined


def _parse_full_rows(lines: list[str], names: dict[str, str]) -> Rows | None:
  """Parses rows of eight columns at once; None where any row is not like that."""
  text = "".join(lines)
  # Below, rows with too few columns are noticed; as many commas as that takes leave no row with more.
  if text.count(",") != 7 * len(lines) or text.startswith(",") or "\n," in text:
    return None
  # The rows of a box differ in their last two columns only: the others are parsed once.
  places, tails = [], []
  for line in lines:
    cut = line.rfind(",", 0, line.rfind(","))
    places.append(line[:cut])
    tails.append(line[cut + 1 :])
  number = {place: index for index, place in enumerate(dict.fromkeys(places))}
  try:
    table = np.loadtxt(list(number), delimiter=",", usecols=range(1, 6), comments=None, ndmin=2)
    action, extra = np.loadtxt(tails, delimiter=",", comments=None, ndmin=2, unpack=True)
  except ValueError:
    return None
  # Comparisons with NaN are false.
  whole = ((action >= 1) & (action < 2**31) & (action == np.floor(action))).all()
  if not whole or np.isnan(extra).any() or not np.isfinite(table).all():
    return None
  fields = [place.partition(",")[0] for place in number]
  video = np.array(list(map(names.setdefault, fields, fields)), object)
  index = np.fromiter(map(number.__getitem__, places), np.intp, len(lines))
  return Rows(video[index], table[index, 0], table[index, 1:], action.astype(np.int32), extra.copy())


def _parse_rows(lines: list[str], names: dict[str, str], path: PathLike, first: int) -> Rows:
  """Parses rows of any kind; the first has this line number."""
  rows = [(line, _parse_row(line, f"{path}:{n}")) for n, line in enumerate(lines, first) if not line.isspace()]
  fields = [line.partition(",")[0] for line, _ in rows]
  table = np.array([values for _, values in rows], np.float64).reshape(-1, 7)
  video = np.array(list(map(names.setdefault, fields, fields)), object)
  return Rows(video, table[:, 0].copy(), table[:, 1:5].copy(), table[:, 5].astype(np.int32), table[:, 6].copy())


def _parse_row(line: str, place: str) -> list[float]:
  """Timestamp, box, action and extra of one row."""
  video, *fields = line.rstrip("\r\n").split(",")
  if len(fields) not in (1, 6, 7):
    expected = "video_id,timestamp,x1,y1,x2,y2,action_id[,score or person_id]"
    raise AnnotationError(f"{place}: {len(fields) + 1} columns; expected {expected}")
  if not video:
    raise AnnotationError(f"{place}: the video id is empty")
  values = []
  for field in fields:
    try:
      values.append(float(field))
    except ValueError:
      raise AnnotationError(f"{place}: {field!r} is not a number") from None
  if not np.isfinite(values[:5]).all():
    raise AnnotationError(f"{place}: box or timestamp is not finite")
  if len(values) == 1:
    return [*values, *[np.nan] * 4, 0.0, 1.0]
  if not 1 <= values[5] < 2**31 or values[5] != int(values[5]):
    raise AnnotationError(f"{place}: action id {fields[5]} is not a whole number from 1 up")
  if np.isnan(values[-1]):
    raise AnnotationError(f"{place}: score or person id is not a number")
  return values if len(values) == 7 else [*values, 1.0]
