"""AVA-format files: annotation and result CSVs, label maps. The one place that reads and writes them.

A row of an AVA CSV is ``video_id,timestamp,x1,y1,x2,y2,action_id,extra``: one box with one action at one keyframe. The
timestamp is in seconds from the start of the movie, the box normalised xyxy, the action id 1-based, and ``extra`` the
person id of an annotation or the score of a detection (it may be absent: then 1). A row ``video_id,timestamp`` alone
says that a keyframe was annotated and holds nobody.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

PathLike = str | os.PathLike[str]


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
  video, numbers = [], []
  for line, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
    if not text.strip():
      continue
    fields = text.split(",")
    if len(fields) not in (2, 7, 8):
      raise AnnotationError(
        f"{path}:{line}: {len(fields)} columns; expected video_id,timestamp,x1,y1,x2,y2,action_id[,score or person_id]"
      )
    try:
      values = [float(field) for field in fields[1:]]
    except ValueError:
      bad = next(field for field in fields[1:] if not _is_number(field))
      raise AnnotationError(f"{path}:{line}: {bad!r} is not a number") from None
    if len(values) == 1:
      values += [np.nan] * 4 + [0.0]
    elif values[5] != int(values[5]) or values[5] < 1:
      raise AnnotationError(f"{path}:{line}: action id {fields[6]} is not a whole number from 1 up")
    elif not np.isfinite(values[:6]).all():
      raise AnnotationError(f"{path}:{line}: box or timestamp is not finite")
    video.append(fields[0])
    numbers.append(values if len(values) == 7 else [*values, 1.0])
  table = np.array(numbers, np.float64).reshape(-1, 7)
  return Rows(np.array(video, object), table[:, 0], table[:, 1:5], table[:, 5].astype(np.int32), table[:, 6])


def write_ava_csv(path: PathLike, rows: Rows, *, extra_format: str = "%.4f") -> None:
  """Writes rows; timestamps as AVA does (``0902``; sub-second ones with decimals)."""
  with open(path, "w", encoding="utf-8") as file:
    for video, timestamp, box, action, extra in zip(*rows, strict=True):
      time = "%04d" % timestamp if timestamp == int(timestamp) else f"{timestamp:.6f}".rstrip("0")
      if action == 0:
        file.write(f"{video},{time}\n")
      else:
        coordinates = ",".join(f"{value:.4f}" for value in box)
        file.write(f"{video},{time},{coordinates},{action},{extra_format % extra}\n")


def keyframes(rows: Rows, num_classes: int) -> list[Keyframe]:
  """Merges the rows of one box into one multi-label actor, and the actors of one keyframe into one entry.

  Rows belong to one actor when their keyframe, coordinates and person id agree. Order: first appearance in the file.

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

  Raises:
    AnnotationError: no class was found, or one id stands twice.
  """
  names: dict[int, str] = {}
  text = Path(path).read_text(encoding="utf-8")
  for item in re.finditer(r'name:\s*"([^"]*)"\s*(?:id|label_id):\s*(\d+)', text):
    if int(item[2]) in names:
      raise AnnotationError(f"{path}: class id {item[2]} stands twice")
    names[int(item[2])] = item[1]
  if not names:
    raise AnnotationError(f"{path}: no class found; expected blocks `item {{ name: ... id: ... }}`")
  return names


def write_label_map(path: PathLike, names: dict[int, str]) -> None:
  """Writes an AVA label map (``.pbtxt``)."""
  blocks = [f'item {{\n  name: "{name}"\n  id: {index}\n}}\n' for index, name in sorted(names.items())]
  Path(path).write_text("".join(blocks), encoding="utf-8")


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True
