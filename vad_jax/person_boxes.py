"""People at the keyframes of one video: boxes given from elsewhere, and who is who from one keyframe to the next."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from vad_jax import annotations
from vad_jax.annotations import AnnotationError, PathLike
from vad_jax.datasets import proposals
from vad_jax.datasets.loader import clip_boxes
from vad_jax.datasets.video import nearest
from vad_jax.ops.boxes import iou

_SAME_MOMENT = 0.05  # seconds; less than two frames
_SAME_PERSON_IOU = 0.2
_LONGEST_GAP = 2.05  # seconds in which a person may go unseen; time stamps of frames are rounded
_SLOTS = 8  # the number of boxes in a batch is a multiple of this, so that few programs are compiled


class PersonBoxes(NamedTuple):
  """Boxes of people, for systems that classify given ones.

  Attributes:
    source: where they come from.
    times: ``[n]`` seconds, rising.
    boxes: at each time ``[p, 4]`` float32 xyxy in [0, 1].
    scores: at each time ``[p]`` float32.
  """

  source: str
  times: np.ndarray
  boxes: Sequence[np.ndarray]
  scores: Sequence[np.ndarray]

  def index(self, time: float) -> int | None:
    """Index of a time; None where nothing is known within 0.05 seconds of it."""
    index = nearest(self.times, time) if len(self.times) else 0
    return index if len(self.times) and abs(self.times[index] - time) <= _SAME_MOMENT else None

  def batch(self, times: Sequence[float], rows: int) -> dict[str, np.ndarray]:
    """Proposals of a `Batch`, one row for each time; the rest of the rows is padding."""
    most = max(map(len, self.scores), default=0)
    slots = max(-(-most // _SLOTS), 1) * _SLOTS
    boxes, scores = np.zeros((rows, slots, 4), np.float32), np.zeros((rows, slots), np.float32)
    mask = np.zeros((rows, slots), bool)
    for row, index in enumerate(map(self.index, times)):
      if index is not None:
        count = len(self.scores[index])
        boxes[row, :count], scores[row, :count], mask[row, :count] = self.boxes[index], self.scores[index], True
    return {"proposals": boxes, "proposal_mask": mask, "proposal_score": scores}


def read(path: PathLike, video: str, *, threshold: float = 0.0) -> PersonBoxes:
  """Reads the people of a video.

  Args:
    path: JSON of ``vad_jax.predict``, or what `proposals.read_published` takes: an AVA CSV, with scores or with the
      person ids of annotations, or a pickle of mmaction2.
    video: its name there: that of the file without suffix.
    threshold: least score; people without one have 1.

  Raises:
    AnnotationError: something is malformed, or the video has no boxes.
    FileNotFoundError: there is no such file.
  """
  if not Path(path).is_file():
    raise FileNotFoundError(f"{path}: neither a checkpoint nor a file of person boxes")
  is_json = Path(path).suffix == ".json"
  every = annotations.read_detections_json(path)[1] if is_json else proposals.read_published(path)
  rows = every.select(every.video == video)
  if not len(rows.video):
    names = sorted(set(every.video))
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
    raise AnnotationError(f"{path}: no boxes of {video!r}; the videos in it are: {listed}")
  if (every.extra == np.floor(every.extra)).all():
    rows = rows._replace(extra=np.ones(len(rows.extra)))  # of annotations, which have person ids instead
  boxes, in_frame = clip_boxes(rows.boxes.astype(np.float32))
  if not in_frame.any():
    raise AnnotationError(f"{path}: no box of {video!r} lies in the frame; expected x1, y1, x2, y2 in [0, 1]")
  kept = np.flatnonzero(in_frame & (rows.extra >= threshold))
  kept = kept[np.argsort(-rows.extra[kept], kind="stable")]
  times, place = np.unique(rows.timestamp, return_inverse=True)
  kept = kept[np.argsort(place[kept], kind="stable")]
  cuts = np.searchsorted(place[kept], np.arange(1, len(times)))
  scores = rows.extra[kept].astype(np.float32)
  return PersonBoxes(str(path), times, np.split(boxes[kept], cuts), np.split(scores, cuts))


def link(now: np.ndarray, then: np.ndarray) -> np.ndarray:
  """Finds the people of one moment in another, one to one, by how much their boxes overlap.

  Args:
    now: ``[n, 4]`` boxes.
    then: ``[m, 4]`` those of the other moment.

  Returns:
    ``[n]`` for each box of ``now`` its index in ``then``, or -1.
  """
  overlap = iou(now[:, None], then)
  overlap[overlap < _SAME_PERSON_IOU] = 0
  links = np.full(len(now), -1)
  rows, columns = linear_sum_assignment(-overlap)
  same = overlap[rows, columns] > 0
  links[rows[same]] = columns[same]
  return links


class Tracker:
  """Numbers people from 1, keyframe by keyframe, so that each keeps the number through the video.

  Who is missed for up to two seconds, or in no keyframe between, is the same person still.
  """

  def __init__(self) -> None:
    self._last: dict[int, tuple[float, np.ndarray]] = {}  # when and where each was seen last
    self._time = -np.inf  # of the keyframe before
    self._new = itertools.count(1)

  def number(self, time: float, boxes: np.ndarray) -> np.ndarray:
    """Numbers the people of the next keyframe.

    Args:
      time: seconds; they rise.
      boxes: ``[n, 4]``.

    Returns:
      ``[n]`` int32.
    """
    since = min(self._time, time - _LONGEST_GAP)
    self._last = {number: seen for number, seen in self._last.items() if seen[0] >= since}
    known = list(self._last)
    links = link(boxes, np.array([box for _, box in self._last.values()], np.float32).reshape(-1, 4))
    numbers = np.array([known[index] if index >= 0 else next(self._new) for index in links], np.int32)
    self._last |= {int(number): (time, box) for number, box in zip(numbers, boxes, strict=True)}
    self._time = time
    return numbers
