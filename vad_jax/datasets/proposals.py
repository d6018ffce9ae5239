"""Boxes of people that a detector found beforehand, for systems that classify given boxes.

In a set they are ``annotations/<split>_proposals.csv``, an AVA result CSV with class 1:
``video_id,timestamp,x1,y1,x2,y2,1,score``.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vad_jax import annotations, safe_pickle
from vad_jax.annotations import AnnotationError, PathLike, Rows


def read(path: PathLike, *, threshold: float) -> dict[tuple[str, float], np.ndarray]:
  """Reads the proposals of a set.

  Args:
    path: ``annotations/<split>_proposals.csv``.
    threshold: least score of a box.

  Returns:
    Boxes by video and timestamp: ``[P, 4]`` float32 xyxy in [0, 1], best score first.

  Raises:
    AnnotationError: a row is malformed.
    FileNotFoundError: there is no such file.
  """
  rows = annotations.read_ava_csv(path)
  rows = rows.select(rows.extra >= threshold)
  rows = rows.select(np.argsort(-rows.extra, kind="stable"))
  boxes: dict[tuple[str, float], list[np.ndarray]] = {}
  for video, timestamp, box in zip(rows.video, rows.timestamp.tolist(), rows.boxes, strict=True):
    boxes.setdefault((video, timestamp), []).append(box)
  return {keyframe: np.array(found, np.float32) for keyframe, found in boxes.items()}


def read_published(path: PathLike) -> Rows:
  """Reads person boxes in one of the two forms that others use; the content tells which.

  * The CSV of PySlowFast, ``video,second,x1,y1,x2,y2,label,score``; the label may be empty. A box that stands there
    with several labels is one.
  * The pickle of mmaction2 and of long-term feature banks: ``{"video,second": [n, 5]}``, a box and a score in a row.

  Returns:
    A row for each box: action 1, ``extra`` the score. Nothing is dropped.

  Raises:
    AnnotationError: something is malformed; names the line or the key.
    ValueError: a pickle that holds more than data, or is damaged.
    FileNotFoundError: there is no such file.
  """
  with open(path, "rb") as file:
    is_text = file.read(1 << 12).isascii() and file.seek(0) == 0 and b"," in file.readline(1 << 12)
  return _rows(_boxes_of_csv(path) if is_text else _boxes_of_pickle(path))


def _boxes_of_csv(path: PathLike) -> list[tuple[str, float, list[float], float]]:
  best: dict[tuple[str, ...], float] = {}
  try:
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
  except UnicodeDecodeError:
    raise AnnotationError(f"{path}: not a text file; expected a CSV in UTF-8") from None
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        video, *place, _, score = line.split(",")
        box = tuple(place)
        values = [float(value) for value in (*box, score)]
      except ValueError:
        values = []
      if len(values) != 6 or not np.isfinite(values).all():
        raise AnnotationError(f"{path}:{number}: {line}; expected video,second,x1,y1,x2,y2,label,score with numbers")
      best[video, *box] = max(values[-1], best.get((video, *box), -np.inf))
  return [(video, float(second), [float(x) for x in box], score) for (video, second, *box), score in best.items()]


def _boxes_of_pickle(path: PathLike) -> list[tuple[str, float, list[float], float]]:
  content: Any = safe_pickle.load(path)
  if not isinstance(content, dict):
    raise AnnotationError(f"{path}: holds a {type(content).__name__}; expected a dict of arrays")
  boxes = []
  for key, value in content.items():
    try:
      video, second = str(key).rsplit(",", 1)
      time, table = float(second), np.asarray(value, np.float64).reshape(-1, 5)
    except (ValueError, TypeError):
      raise AnnotationError(
        f"{path}: {key!r}; expected 'video,second' and an array [n, 5] of boxes and scores"
      ) from None
    if not np.isfinite(table).all():
      raise AnnotationError(f"{path}: {key!r}: a box or score is not finite")
    boxes += [(video, time, row[:4], row[4]) for row in table.tolist()]
  return boxes


def _rows(boxes: list[tuple[str, float, list[float], float]]) -> Rows:
  video, time, box, score = zip(*boxes, strict=True) if boxes else ((),) * 4
  return Rows(
    np.array(video, object),
    np.array(time, np.float64),
    np.array(box, np.float64).reshape(-1, 4),
    np.ones(len(boxes), np.int32),
    np.array(score, np.float64),
  )
