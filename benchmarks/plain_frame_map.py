"""Frame-mAP as AVA's evaluators in use compute it: keyframe by keyframe, in plain Python.

`benchmarks/evaluation.py` measures against it, and tests compare with it. It is written to be checked by reading.

    python benchmarks/plain_frame_map.py GROUND_TRUTH.csv DETECTIONS.csv

prints the mAP at IoU 0.5 of the official protocol.
"""

import collections
import csv
import heapq
import sys
from collections.abc import Iterable, Iterator, Set
from decimal import Decimal
from typing import NamedTuple

import numpy as np

Row = tuple[str, float | Decimal, tuple[float, ...], int, float]  # video, time, x1 y1 x2 y2, action id (0: none), score
Key = tuple[str, str]  # video and timestamp


class Images(NamedTuple):
  """Rows of scored classes by keyframe, and all keyframes that were named."""

  boxes: dict[Key, list[list[float]]]
  labels: dict[Key, list[int]]
  scores: dict[Key, list[float]]
  named: set[Key]

  def arrays(self, key: Key) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, labels and scores of one keyframe."""
    boxes = np.array(self.boxes.get(key, []), float).reshape(-1, 4)
    return boxes, np.array(self.labels.get(key, []), int), np.array(self.scores.get(key, []), float)


def frame_ap(
  ground_truth: Iterable[Row],
  detections: Iterable[Row],
  classes: Set[int],
  *,
  iou: float = 0.5,
  protocol: str = "activitynet",
  excluded: Set[tuple[str, float]] = frozenset(),
  max_rows: int = 50,
) -> dict[int, float]:
  """AP by class; NaN for classes that do not count."""
  official, mmaction2 = protocol == "activitynet", protocol == "mmaction2"
  dtype = np.float32 if mmaction2 else np.float64
  left_out = {_key(*keyframe) for keyframe in excluded}
  truth = _images(ground_truth, classes, protocol, None)
  found = _images(detections, classes, protocol, max_rows if official else None)
  keys = [key for key in (truth if mmaction2 else found).boxes if key not in left_out]
  if official:
    keys = [key for key in keys if key in truth.named]

  num_truth = collections.Counter(
    label for key, labels in truth.labels.items() if mmaction2 or key not in left_out for label in labels
  )
  scores: dict[int, list[np.ndarray]] = {index: [] for index in classes}
  correct: dict[int, list[np.ndarray]] = {index: [] for index in classes}
  for key in keys:
    truth_boxes, truth_labels, _ = truth.arrays(key)
    boxes, labels, score = found.arrays(key)
    if not mmaction2:
      full = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
      boxes, labels, score = boxes[full], labels[full], score[full]
    for index in classes:  # also those that nothing was detected of, as the evaluators do it
      own, own_truth = labels == index, truth_labels == index
      right = _match(truth_boxes[own_truth].astype(dtype), boxes[own].astype(dtype), iou)
      if len(right):
        scores[index].append(score[own].astype(dtype))
        correct[index].append(right)

  ap = {}
  for index in classes:
    if num_truth[index] and scores[index]:
      ap[index] = _average_precision(np.concatenate(scores[index]), np.concatenate(correct[index]), num_truth[index])
    else:
      ap[index] = 0.0 if num_truth[index] and not mmaction2 else np.nan
  return ap


def _key(video: str, timestamp: float | Decimal) -> Key:
  return video, f"{timestamp:.6f}"


def _images(rows: Iterable[Row], classes: Set[int], protocol: str, capacity: int | None) -> Images:
  """Collects rows by keyframe and brings them into the protocol's order."""
  entries: dict[Key, list[tuple[float, ...]]] = collections.defaultdict(list)
  named = set()
  for video, timestamp, (x1, y1, x2, y2), action, score in rows:
    key = _key(video, timestamp)
    named.add(key)
    if action not in classes:
      continue
    entry = (score, action, y1, x1, y2, x2)
    if protocol != "activitynet":
      entries[key].append(entry)
    elif capacity is None or len(entries[key]) < capacity:
      heapq.heappush(entries[key], entry)
    elif score > entries[key][0][0]:
      heapq.heapreplace(entries[key], entry)
  boxes, labels, scores = {}, {}, {}
  for key, kept in entries.items():
    if protocol != "slowfast":
      kept = sorted(kept, key=lambda entry: -entry[0])
    boxes[key] = [[x1, y1, x2, y2] for _, _, y1, x1, y2, x2 in kept]
    labels[key] = [entry[1] for entry in kept]
    scores[key] = [entry[0] for entry in kept]
  return Images(boxes, labels, scores, named)


def _match(truth: np.ndarray, boxes: np.ndarray, iou: float) -> np.ndarray:
  """Which boxes are right: the first whose best annotation, free or not, is this one and still free."""
  for x1, y1, x2, y2 in [*truth, *boxes]:
    if x1 > x2 or y1 > y2:
      raise ValueError(f"inverted box {(x1, y1, x2, y2)}")
  correct = np.zeros(len(boxes), bool)
  if not len(truth):
    return correct
  low, high = np.maximum(boxes[:, None, :2], truth[:, :2]), np.minimum(boxes[:, None, 2:], truth[:, 2:])
  sides = np.maximum(np.zeros(low.shape), high - low)
  shared = sides[..., 0] * sides[..., 1]
  area, truth_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, truth))
  union = area[:, None] + truth_area - shared
  overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
  best = overlap.argmax(axis=1)
  taken = set()
  for row, column in enumerate(best.tolist()):
    if overlap[row, column] >= iou and column not in taken:
      correct[row] = True
      taken.add(column)
  return correct


def _average_precision(scores: np.ndarray, correct: np.ndarray, num_truth: int) -> float:
  """Area under the envelope of the precision-recall curve; of equal scores the last ranks first."""
  correct = correct[np.argsort(scores, kind="stable")[::-1]]
  hits = np.cumsum(correct)
  precision = np.concatenate([[0], hits / np.arange(1, len(hits) + 1), [0]])
  recall = np.concatenate([[0], hits / num_truth, [1]])
  for rank in range(len(precision) - 2, -1, -1):
    precision[rank] = max(precision[rank], precision[rank + 1])
  steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
  return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))


def _read(path: str) -> Iterator[Row]:
  with open(path, newline="") as file:
    for video, timestamp, *box, action, score in csv.reader(file):
      yield video, Decimal(timestamp), tuple(float(value) for value in box), int(action), float(score)


if __name__ == "__main__":
  ap_by_class = frame_ap(_read(sys.argv[1]), _read(sys.argv[2]), set(range(1, 81)))
  print(repr(float(np.nanmean(list(ap_by_class.values())))))
