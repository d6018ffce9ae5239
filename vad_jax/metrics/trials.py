"""A bench on which repairs of detections and ground truth are tried, on a sample of keyframes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vad_jax import annotations
from vad_jax.annotations import AnnotationError, PathLike, Rows
from vad_jax.metrics.frame_map import best_overlaps, frame_map, keyframe_ids, person_ap

_SAMPLE_ROWS = 120_000  # detections that a repair is tried on, about
_LEAST_KEYFRAMES = 300


class File(NamedTuple):
  """A CSV in AVA's format, read as far as it can be.

  Attributes:
    path: where it is.
    names: ``[V]`` str (object array), videos in order of appearance.
    rows: its rows; ``video`` is an index of `names`, and class ids and scores may be any.
    skipped: number of rows that make no sense.
    complaint: what `annotations.read_ava_csv` says about the file; empty where it takes it.
  """

  path: str
  names: np.ndarray
  rows: Rows
  skipped: int = 0
  complaint: str = ""


class Repair(NamedTuple):
  """A way to undo a mistake.

  Attributes:
    name: the mistake.
    evidence: the numbers that speak for it.
    fix: makes rows as they should be.
    filters: shell commands that repair the lines of the file of detections and of ground truth; empty where a file
      is right as it is.
    of_truth: `fix` is for the ground truth.
    simpler: a repair that does less and must be beaten.
    certain: the numbers speak for it even where mAP is no better without it.
    advice: what to know about the cure.
  """

  name: str
  evidence: str
  fix: Callable[[Rows], Rows]
  filters: tuple[str, str]
  of_truth: bool = False
  simpler: "Repair | None" = None
  certain: bool = False
  advice: str = ""


class Plan(NamedTuple):
  """Repairs that are applied together, in this order."""

  names: Repair | None = None
  clock: Repair | None = None
  boxes: Repair | None = None
  labels: Repair | None = None
  scores: Repair | None = None


def read(path: PathLike) -> File:
  """Reads an AVA CSV and leaves out what makes no sense, instead of stopping there.

  Class ids below 1 and scores that are NaN are kept.

  Raises:
    AnnotationError: no row makes sense.
    OSError: the file cannot be read.
  """
  numbers: dict[str, int] = {}
  try:
    rows, skipped, complaint = annotations.read_ava_csv(path), 0, ""
    video = np.fromiter((numbers.setdefault(name, len(numbers)) for name in rows.video), np.int32, len(rows.video))
    rows = rows._replace(video=video)
  except AnnotationError as error:
    rows, skipped = _read_leniently(path, numbers)
    complaint = str(error)
    if not len(rows.video):
      raise
  return File(str(path), np.array(list(numbers), object), rows, skipped, complaint)


class Bench:
  """Detections and ground truth, prepared to try repairs on some of their keyframes.

  Attributes:
    truth, found: the files. Detections without a box are left out.
    label_map: the classes to score.
    same_names: ``[V]`` for each video of the detections, its index in the ground truth; -1 for others.
    keyframes: one row of the detections for each of their keyframes.
    rows_of_keyframe: number of detections of each.
    annotated: `keyframe_key` of all annotated keyframes, sorted.
    sample: those that repairs are tried on.
    video_of_person: ``[P]`` for each annotated person of the sample, once a keyframe.
    person: ``[P]`` their ids.
  """

  def __init__(self, truth: File, found: File, label_map: dict[int, str]) -> None:
    rows = found.rows
    if np.isnan(rows.boxes[:, 0]).any():
      rows = rows.select(~np.isnan(rows.boxes[:, 0]))
    self.truth, self.found, self.label_map = truth, found._replace(rows=rows), label_map
    _, first, number = np.unique(keyframe_key(rows), return_index=True, return_inverse=True)
    self.keyframes = rows.select(first)
    self._order = np.argsort(number, kind="stable")
    self.rows_of_keyframe = np.bincount(number, minlength=len(first))
    self._start = np.cumsum(self.rows_of_keyframe) - self.rows_of_keyframe
    videos = {name: index for index, name in enumerate(truth.names)}
    self.same_names = np.array([videos.get(name, -1) for name in found.names], np.int32)

    key = keyframe_key(truth.rows)
    self.sample = self.annotated = np.unique(key)
    size = max(_LEAST_KEYFRAMES, _SAMPLE_ROWS * len(first) // max(len(number), 1))
    if size < len(self.annotated):
      self.sample = np.sort(np.random.default_rng(0).choice(self.annotated, size, replace=False))
    self._truth = truth.rows.select(np.isin(key, self.sample))
    people = np.column_stack([keyframe_key(self._truth), self._truth.boxes])
    _, people = np.unique(people, axis=0, return_index=True)
    self._people = people[~np.isnan(self._truth.boxes[people, 0])]
    self.video_of_person, self.person = self._truth.video[self._people], self._truth.extra[self._people]
    self._results: dict[Plan, tuple[float, float]] = {}

  @property
  def num_independent(self) -> int:
    """How many people there are really, where ids tell: someone who stays is seen in many keyframes."""
    people = np.unique(np.column_stack([self.video_of_person, self.person]), axis=0)
    return max(len(people), len(self.person) // 20, 1)

  def keys(self, plan: Plan) -> Rows:
    """The detections' keyframes, repaired; ``video`` is an index of the ground truth's names, -1 for others."""
    keys = self.keyframes
    keys = plan.names.fix(keys) if plan.names else keys._replace(video=self.same_names[keys.video])
    return plan.clock.fix(keys) if plan.clock else keys

  def rows(self, plan: Plan) -> tuple[Rows, Rows]:
    """The annotations of the sample and the detections on their keyframes, repaired."""
    keys = self.keys(plan)
    hit = np.flatnonzero(np.isin(keyframe_key(keys), self.sample))
    count = self.rows_of_keyframe[hit]
    index = np.arange(count.sum()) + np.repeat(self._start[hit] - np.cumsum(count) + count, count)
    found = self.found.rows.select(self._order[index])
    found = found._replace(video=np.repeat(keys.video[hit], count), timestamp=np.repeat(keys.timestamp[hit], count))
    truth = self._truth
    for repair in plan[2:]:
      if repair and repair.of_truth:
        truth = repair.fix(truth)
      elif repair:
        found = repair.fix(found)
    return truth, found

  def fit(self, plan: Plan, *, shift: int = 0) -> np.ndarray:
    """IoU of each annotated person of the sample with the detection that fits best, ``[P]``.

    Args:
      plan: repairs to make before.
      shift: take the detections of as many keyframes further on, as a control.
    """
    truth, found = self.rows(plan)
    truth_keyframe, keyframe = keyframe_ids(truth, found)
    keyframe = (keyframe + shift) % len(self.sample)
    return best_overlaps(keyframe, found.boxes, truth_keyframe[self._people], truth.boxes[self._people])[0]

  def result(self, plan: Plan) -> tuple[float, float]:
    """mAP and person AP of the sample at IoU 0.5, as fractions."""
    if plan not in self._results:
      self._results[plan] = self.score(*self.rows(plan))
    return self._results[plan]

  def skill(self, plan: Plan) -> tuple[float, int]:
    """How high detections that fit an annotation of their class rank among all of that class.

    Returns:
      their mean rank, from 0 (lowest score) to 1, 0.5 by chance; and how many they are.
    """
    truth, found = self.rows(plan)
    found = found.select(~np.isnan(found.extra))
    truth_keyframe, keyframe = keyframe_ids(truth, found)
    num_groups = 1 + max(truth.action.max(initial=0), found.action.max(initial=0))
    truth_group, group = truth_keyframe * num_groups + truth.action, keyframe * num_groups + found.action
    right = best_overlaps(truth_group, truth.boxes, group, found.boxes)[0] >= 0.5
    ranked = np.column_stack([found.action, found.extra])
    _, equal, count = np.unique(ranked, axis=0, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - count / 2)[equal]
    _, of_class, size = np.unique(found.action, return_inverse=True, return_counts=True)
    rank = (rank - (np.cumsum(size) - size)[of_class]) / size[of_class]
    return float(rank[right].mean()) if right.any() else 0.5, int(right.sum())

  def score(self, truth: Rows, found: Rows, protocol: str = "activitynet") -> tuple[float, float]:
    """mAP and person AP of any rows; 0 where nothing can be scored."""
    found = found.select(~np.isnan(found.extra))
    inverted = (truth.boxes[:, :2] > truth.boxes[:, 2:]).any(axis=1, keepdims=True)
    truth = truth._replace(boxes=np.where(inverted, 0.0, truth.boxes))  # which no detection fits
    mean_ap = 0.0
    if np.isin(truth.action, list(self.label_map)).any():
      mean_ap = frame_map(truth, found, self.label_map, protocol=protocol).mean_ap
    if not (truth.action > 0).any():
      return mean_ap, 0.0
    return mean_ap, person_ap(truth, found.select(best_of_box(found)))


def best_of_box(rows: Rows) -> np.ndarray:
  """Index of the best row of each box of each keyframe."""
  boxes = np.column_stack([keyframe_key(rows), rows.boxes])
  order = np.lexsort((-rows.extra, *boxes.T))
  new = np.ones(len(order), bool)
  new[1:] = (np.diff(boxes[order], axis=0) != 0).any(axis=1)
  return order[new]


def keyframe_key(rows: Rows) -> np.ndarray:
  """Video and microsecond of each row in one number, ``[R]`` int64; divided by 10**13, rounded, the video."""
  return rows.video.astype(np.int64) * 10**13 + np.rint(np.clip(rows.timestamp, -4e6, 4e6) * 1e6).astype(np.int64)


def _read_leniently(path: PathLike, numbers: dict[str, int]) -> tuple[Rows, int]:
  """Rows of the lines that make sense, and the number of the others; new videos are added to the numbers."""
  tables, skipped = [np.empty((0, 8))], 0
  with open(path, encoding="utf-8-sig", errors="replace") as file:
    while lines := file.readlines(1 << 22):
      table = []
      for line in filter(str.strip, lines):
        name, *fields = line.rstrip("\r\n").split(",")
        try:
          values = [float(field) for field in fields]
        except ValueError:
          values = []
        if len(values) == 1:
          values += [np.nan] * 4 + [0.0, 1.0]
        elif len(values) == 6:
          values.append(1.0)
        if len(values) == 7 and math.isfinite(values[0]) and abs(values[5]) < 2**31 and values[5] == int(values[5]):
          table.append([numbers.setdefault(name, len(numbers)), *values])
        else:
          skipped += 1
      tables.append(np.array(table).reshape(-1, 8))
  table = np.concatenate(tables)
  usable = np.isfinite(table[:, 2:6]).all(axis=1) | (table[:, 6] == 0)
  skipped += int(np.count_nonzero(~usable))
  table = table[usable]
  video, action = table[:, 0].astype(np.int32), table[:, 6].astype(np.int32)
  return Rows(video, table[:, 1], table[:, 2:6], action, table[:, 7]), skipped
