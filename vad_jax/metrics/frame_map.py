"""Frame-mAP on keyframes: the protocol of AVA, and class-agnostic person AP.

Three steps that every frame-level protocol shares, each over all keyframes at once:

1. `best_overlaps`: for each detection the ground-truth box of its keyframe and class that it overlaps most.
2. `true_positives`: the first detection to claim a box, at a given IoU, is right; all others are wrong.
3. `curves` and `average_precision`: ranked by score, class by class.

Protocols differ in what they let in and in the order in which detections may claim boxes.
"""

import heapq
from itertools import repeat
from typing import NamedTuple

import numpy as np

from vad_jax.annotations import Rows

MAX_ROWS = 50  # the protocol scores no more rows than this in a keyframe
_CHUNK = 1 << 17  # detections compared at once, so that memory stays flat


class Curve(NamedTuple):
  """Precision and recall of one class after each detection, best score first; all ``[D]`` float64."""

  precision: np.ndarray
  recall: np.ndarray
  score: np.ndarray


class FrameMap(NamedTuple):
  """Frame-mAP and what it was made of.

  Attributes:
    mean_ap: mean of the AP over the classes that have ground truth; fraction in [0, 1].
    ap: class id to average precision; NaN where the class has no ground truth.
    num_ground_truth: class id to number of annotated boxes.
    num_detections: class id to number of detections that were scored.
    num_true_positives: class id to number of detections that claimed a box.
    curves: class id to precision-recall curve; empty where nothing was detected or annotated.
    num_keyframes: annotated keyframes, those that hold nobody included.
    iou: least IoU of a true positive.
  """

  mean_ap: float
  ap: dict[int, float]
  num_ground_truth: dict[int, int]
  num_detections: dict[int, int]
  num_true_positives: dict[int, int]
  curves: dict[int, Curve]
  num_keyframes: int
  iou: float


def frame_map(ground_truth: Rows, detections: Rows, label_map: dict[int, str], *, iou: float = 0.5) -> FrameMap:
  """Frame-mAP by the protocol of the official ActivityNet evaluator of AVA.

  Rows of classes outside the label map and detections on keyframes without annotation are left out. The
  best 50 detections of a keyframe count, all classes together; then those without area are dropped. Equal
  scores are ordered as the official evaluator orders them.

  Args:
    ground_truth: annotations; a row with action 0 says that the keyframe was annotated and holds nobody.
    detections: one row for each box and action; ``extra`` is the score.
    label_map: class id to name; the classes to score.
    iou: least IoU of a true positive, inclusive.

  Raises:
    ValueError: a score is NaN, an annotated box is inverted, or no annotation has a class of the label map.
  """
  _check(ground_truth, detections, iou)
  classes = np.array(sorted(label_map), np.int64)
  truth_keyframe, keyframe = keyframe_ids(ground_truth, detections)
  num_keyframes = int(truth_keyframe.max(initial=-1)) + 1

  keep = np.isin(ground_truth.action, classes)
  truth, truth_keyframe = ground_truth.select(keep), truth_keyframe[keep]
  if not len(truth.action):
    raise ValueError("no annotation has a class of the label map: nothing to score against")
  order = _heap_order(truth, truth_keyframe, len(truth.action))
  truth, truth_keyframe = truth.select(order), truth_keyframe[order]

  keep = np.isin(detections.action, classes) & (keyframe >= 0)
  found, keyframe = detections.select(keep), keyframe[keep]
  appearance = np.full(num_keyframes, len(keyframe))
  present, first = np.unique(keyframe, return_index=True)
  appearance[present] = first
  order = _heap_order(found, keyframe, MAX_ROWS)
  order = order[_has_area(found.boxes[order])]
  found, keyframe = found.select(order), keyframe[order]

  num_groups = int(classes.max()) + 1
  overlap, box = best_overlaps(
    truth_keyframe * num_groups + truth.action, truth.boxes, keyframe * num_groups + found.action, found.boxes
  )
  correct = true_positives(overlap, box, iou)
  # The order of keyframes in the detections' file decides between equal scores of different keyframes.
  order = np.argsort(appearance[keyframe], kind="stable")
  num_truth = {int(c): int(n) for c, n in zip(classes, _count(truth.action, classes), strict=True)}
  by_class = curves(found.action[order], found.extra[order], correct[order], num_truth)
  ap = {
    c: average_precision(curve.precision, curve.recall) if num_truth[c] else np.nan for c, curve in by_class.items()
  }
  return FrameMap(
    mean_ap=float(np.nanmean(list(ap.values()))),
    ap=ap,
    num_ground_truth=num_truth,
    num_detections={int(c): int(n) for c, n in zip(classes, _count(found.action, classes), strict=True)},
    num_true_positives={int(c): int(n) for c, n in zip(classes, _count(found.action[correct], classes), strict=True)},
    curves=by_class,
    num_keyframes=num_keyframes,
    iou=iou,
  )


def person_ap(ground_truth: Rows, detections: Rows, *, iou: float = 0.5) -> float:
  """Average precision of the boxes alone, whatever the people do; fraction in [0, 1].

  Rows of the ground truth that share a box in a keyframe are one person. There is no limit on detections.

  Args:
    ground_truth: annotations.
    detections: one row for each box (not for each action); ``extra`` is the actor score.
    iou: least IoU of a true positive, inclusive.

  Raises:
    ValueError: a score is NaN, an annotated box is inverted, or there is no annotated box.
  """
  _check(ground_truth, detections, iou)
  truth_keyframe, keyframe = keyframe_ids(ground_truth, detections)
  people = np.column_stack([truth_keyframe, ground_truth.boxes])[ground_truth.action > 0]
  if not len(people):
    raise ValueError("no annotation holds a box: nothing to score against")
  people = np.unique(people, axis=0)
  keep = (keyframe >= 0) & _has_area(detections.boxes)
  score, boxes, keyframe = detections.extra[keep], detections.boxes[keep], keyframe[keep]
  order = np.argsort(-score, kind="stable")
  overlap, box = best_overlaps(people[:, 0].astype(np.int64), people[:, 1:], keyframe[order], boxes[order])
  correct = true_positives(overlap, box, iou)
  curve = curves(np.zeros(len(order), np.int64), score[order], correct, {0: len(people)})[0]
  return average_precision(curve.precision, curve.recall)


def keyframe_ids(ground_truth: Rows, detections: Rows) -> tuple[np.ndarray, np.ndarray]:
  """Numbers the annotated keyframes; timestamps are told apart to the microsecond.

  Returns:
    ``[G]`` and ``[D]`` int64 keyframe of each row, from 0 up; -1 for detections where nothing is annotated.
  """
  video_ids = {video: index for index, video in enumerate(dict.fromkeys(ground_truth.video))}
  video, time = (
    np.concatenate(columns)
    for columns in zip(*(_video_and_time(rows, video_ids) for rows in (ground_truth, detections)), strict=True)
  )
  times, time = np.unique(time, return_inverse=True)
  key = np.where(video < 0, -1, video * len(times) + time)
  known, truth = np.unique(key[: len(ground_truth.video)], return_inverse=True)
  key = key[len(ground_truth.video) :]
  found = np.searchsorted(known, key)
  found[found == len(known)] = 0
  return truth, np.where(known[found] == key, found, -1) if len(known) else np.full(len(key), -1)


def best_overlaps(
  truth_group: np.ndarray, truth_boxes: np.ndarray, group: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Finds for each detection the ground-truth box of its group with the highest IoU, the first among equals.

  Args:
    truth_group: ``[G]`` int, what a box may be compared with, such as keyframe and class in one number.
    truth_boxes: ``[G, 4]`` xyxy.
    group: ``[D]`` int group of the detections.
    boxes: ``[D, 4]`` xyxy.

  Returns:
    ``[D]`` float64 IoU (0 where the group has no box), ``[D]`` int index of the box (-1 where there is none).
  """
  order = np.argsort(truth_group, kind="stable")
  start = np.searchsorted(truth_group, group, "left", sorter=order)
  count = np.searchsorted(truth_group, group, "right", sorter=order) - start
  best, best_box = np.zeros(len(group)), np.full(len(group), -1)
  comparable = np.flatnonzero(count)
  for chunk in np.split(comparable, range(_CHUNK, len(comparable), _CHUNK)):
    if not len(chunk):
      continue
    end = np.cumsum(count[chunk])
    begin = end - count[chunk]
    candidate = order[np.arange(end[-1]) + np.repeat(start[chunk] - begin, count[chunk])]
    detection = np.repeat(chunk, count[chunk])
    overlap = _iou(boxes[detection], truth_boxes[candidate])
    best[chunk] = np.maximum.reduceat(overlap, begin)
    # Written back to front, so that of several equal overlaps the first stays.
    ties = np.flatnonzero(overlap == best[detection])[::-1]
    best_box[detection[ties]] = candidate[ties]
  return best, best_box


def true_positives(overlap: np.ndarray, box: np.ndarray, iou: float) -> np.ndarray:
  """Says which detections are right: the first in the given order that claims a box with at least this IoU.

  There is no second choice: a detection whose best box was claimed before is wrong.

  Args:
    overlap: ``[D]`` IoU with the best box.
    box: ``[D]`` index of the best box; not looked at where there is no overlap.
    iou: least IoU, inclusive; above 0.

  Returns:
    ``[D]`` bool.
  """
  claims = np.flatnonzero(overlap >= iou)
  _, first = np.unique(box[claims], return_index=True)
  correct = np.zeros(len(overlap), bool)
  correct[claims[first]] = True
  return correct


def curves(
  action: np.ndarray, score: np.ndarray, correct: np.ndarray, num_ground_truth: dict[int, int]
) -> dict[int, Curve]:
  """Precision-recall curves by class.

  Args:
    action: ``[D]`` class id of each detection.
    score: ``[D]``; among equal scores the later detection ranks first.
    correct: ``[D]`` bool.
    num_ground_truth: class id to number of annotated boxes; names the classes to return.
  """
  order = np.lexsort((-np.arange(len(score)), -score, action))
  action, score, correct = action[order], score[order], correct[order]
  classes = np.array(list(num_ground_truth))
  bounds = zip(np.searchsorted(action, classes, "left"), np.searchsorted(action, classes, "right"), strict=True)
  result = {}
  for (index, total), (start, stop) in zip(num_ground_truth.items(), bounds, strict=True):
    hits = np.cumsum(correct[start:stop], dtype=np.float64)
    result[index] = Curve(hits / np.arange(1, len(hits) + 1), hits / max(total, 1), score[start:stop])
  return result


def average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
  """Area under the envelope of a precision-recall curve (all points, as PASCAL VOC from 2010 on).

  Args:
    precision: ``[D]``, best score first.
    recall: ``[D]``, ascending.

  Returns:
    Fraction in [0, 1]; 0 for an empty curve.
  """
  envelope = np.maximum.accumulate(precision[::-1])[::-1]
  return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _check(ground_truth: Rows, detections: Rows, iou: float) -> None:
  if not 0 < iou <= 1:
    raise ValueError(f"iou is {iou}; expected a fraction in (0, 1]")
  bad = np.flatnonzero(np.isnan(detections.extra))
  if len(bad):
    raise ValueError(f"{_name_row('detection', detections, bad[0])}: the score is NaN")
  x1, y1, x2, y2 = ground_truth.boxes.T
  bad = np.flatnonzero((x1 > x2) | (y1 > y2))
  if len(bad):
    box = ground_truth.boxes[bad[0]].tolist()
    raise ValueError(f"{_name_row('annotation', ground_truth, bad[0])}: {box} is inverted; expected x1,y1,x2,y2")


def _name_row(kind: str, rows: Rows, index: int) -> str:
  return f"{kind} {index + 1} of {len(rows.video)} ({rows.video[index]} at {rows.timestamp[index]:g} s)"


def _video_and_time(rows: Rows, video_ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
  """Number of each row's video, -1 where it is unknown, and its time in microseconds."""
  video = np.fromiter(map(video_ids.get, rows.video, repeat(-1)), np.int64, len(rows.video))
  return video, np.rint(rows.timestamp * 1e6).astype(np.int64)


def _heap_order(rows: Rows, keyframe: np.ndarray, capacity: int) -> np.ndarray:
  """Orders rows by keyframe and falling ``extra``, at most `capacity` in each, as the official evaluator.

  It collects the rows of a keyframe in a heap, and among equal scores the heap's layout decides which are
  kept and which come first. Only where that matters (at the limit or inside one class) a heap is played.

  Returns:
    Indices of rows.
  """
  order = np.lexsort((rows.action, -rows.extra, keyframe))
  keyframe, score, action = keyframe[order], rows.extra[order], rows.action[order]
  start = np.flatnonzero(np.diff(keyframe, prepend=-1))
  count = np.diff(start, append=len(order))
  rank = np.arange(len(order)) - np.repeat(start, count)
  equal = (np.diff(keyframe) == 0) & (np.diff(score) == 0)
  matters = (rank[1:] == capacity) | ((rank[1:] < capacity) & (np.diff(action) == 0))
  for begin in np.unique((np.arange(1, len(order)) - rank[1:])[equal & matters]):
    block = order[begin : begin + count[np.searchsorted(start, begin)]]
    kept = _play_heap(rows.select(np.sort(block)), capacity)
    block[: len(kept)] = np.sort(block)[kept]
  return order[rank < capacity]


def _play_heap(rows: Rows, capacity: int) -> list[int]:
  """Indices of the rows of one keyframe that a heap of the official evaluator keeps, in its order."""
  x1, y1, x2, y2 = rows.boxes.T.tolist()
  entries = list(zip(rows.extra.tolist(), rows.action.tolist(), y1, x1, y2, x2, strict=True))
  heap = []
  for entry in entries:
    if len(heap) < capacity:
      heapq.heappush(heap, entry)
    elif entry[0] > heap[0][0]:
      heapq.heapreplace(heap, entry)
  # Rows that agree in everything stand for each other; the heap must not see their numbers.
  row = {entry: index for index, entry in enumerate(entries)}
  return [row[entry] for entry in sorted(heap, key=lambda entry: -entry[0])]


def _has_area(boxes: np.ndarray) -> np.ndarray:
  return (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])


def _count(action: np.ndarray, classes: np.ndarray) -> np.ndarray:
  return np.bincount(action, minlength=int(classes.max()) + 1)[classes]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """IoU of ``[P, 4]`` xyxy boxes, pair by pair; 0 where both have no area."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
  intersection = sides[:, 0] * sides[:, 1]
  union = np.prod(a[:, 2:] - a[:, :2], axis=1) + np.prod(b[:, 2:] - b[:, :2], axis=1) - intersection
  return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
