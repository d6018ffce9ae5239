"""What the three evaluators of AVA in use do differently, which gives different mAP on the same files."""

import collections
import heapq
from typing import Literal, NamedTuple

import numpy as np

from vad_jax.annotations import Rows

MAX_ROWS = 50  # of a keyframe, that the official evaluator scores


class Protocol(NamedTuple):
  """What an evaluator does in its own way.

  Attributes:
    order: of the rows of a keyframe, in which detections claim boxes: "heap" is best score first, equal ones as the
      official evaluator's heap leaves them, and no more than `MAX_ROWS`; "score" is best score first, equal ones as
      in the file; "file" is as in the file. Annotations stand in the same order, with the person id for a score.
    ranks_by_file: among equal scores, detections of different keyframes are ranked in the order in which the
      keyframes first appear in the detections, else in the ground truth.
    needs_label: only keyframes with an annotation of a scored class count as annotated.
    scores_unannotated: detections on keyframes without annotation are wrong, else they are left out.
    counts_excluded: annotations of excluded keyframes stay in the denominator of recall.
    drops_empty: boxes without area are left out, else they are wrong and inverted ones are errors.
    counts_undetected: a class with annotations and no detection has AP 0, else it is left out of the mean.
    dtype: precision of boxes and scores.
  """

  order: Literal["heap", "file", "score"]
  ranks_by_file: bool = True
  needs_label: bool = False
  scores_unannotated: bool = False
  counts_excluded: bool = False
  drops_empty: bool = True
  counts_undetected: bool = True
  dtype: type[np.floating] = np.float64


PROTOCOLS = {
  "activitynet": Protocol(order="heap"),
  "slowfast": Protocol(order="file", scores_unannotated=True),
  "mmaction2": Protocol(
    order="score",
    ranks_by_file=False,
    needs_label=True,
    counts_excluded=True,
    drops_empty=False,
    counts_undetected=False,
    dtype=np.float32,
  ),
}

# Kinds of rows, and what protocols do with them.
DIFFERENCES = {
  "beyond_limit": "detections behind the best 50 of their keyframe (activitynet drops them, the others do not)",
  "unannotated": "detections on keyframes without annotation (wrong for slowfast, dropped by the others)",
  "unlabelled": "detections on keyframes annotated without a scored class (dropped by mmaction2, wrong for the others)",
  "excluded": "detections on excluded keyframes (dropped; the official evaluator takes no list of these)",
  "excluded_annotations": "annotations of excluded keyframes (missed for mmaction2, dropped by the others)",
  "empty": "detections without area (wrong for mmaction2, dropped by the others)",
  "unsorted": "detections standing before a better one of their keyframe and class (they claim first in slowfast)",
  "equal_in_keyframe": "detections with the score of another of their keyframe and class (each protocol orders them)",
  "duplicates": "detections that stand twice, with the same box, class and score (all but one are wrong)",
  "equal_scores": "detections with the score of another of their class (how a sort leaves them moves the last digits)",
  "repeated_annotations": "annotations that stand twice, with the same box and class (both count, one is missed)",
  "keyframe_rows": "keyframes annotated as holding nobody (slowfast and mmaction2 refuse such rows)",
  "fractions": "annotations not at whole seconds (slowfast and mmaction2 refuse them)",
  "undetected": "annotated classes without detection (AP 0, but left out of the mean by mmaction2)",
  "other_annotations": "annotations of classes outside the label map (dropped)",
  "other_classes": "detections of classes outside the label map (dropped)",
  "unknown_videos": "videos of the detections that no annotation names",
}


def best_first(rows: Rows, keyframe: np.ndarray) -> np.ndarray:
  """Indices of the rows by keyframe, falling ``extra`` and class; otherwise as they stand."""
  return np.lexsort((rows.action, -rows.extra, keyframe))


def in_order(rows: Rows, keyframe: np.ndarray, ranking: np.ndarray, order: str, capacity: int) -> np.ndarray:
  """Indices of the rows by keyframe, and in each as the protocol has them; see `Protocol`.

  Args:
    rows: of any number of keyframes.
    keyframe: ``[R]`` number of each row's keyframe.
    ranking: what `best_first` returned.
    order: of the protocol.
    capacity: most rows of a keyframe, for the order "heap".
  """
  if order == "heap":
    return _heap_order(rows, keyframe, ranking, capacity)
  return ranking if order == "score" else np.argsort(keyframe, kind="stable")


def inspect(rows: Rows, keyframe: np.ndarray, ranking: np.ndarray) -> collections.Counter[str]:
  """Counts what makes evaluators differ inside keyframes; arguments as of `in_order`."""
  action, score = rows.action[ranking], rows.extra[ranking]
  equal = (np.diff(keyframe[ranking]) == 0) & (np.diff(score) == 0) & (np.diff(action) == 0)
  tied = ranking[np.append(equal, False) | np.append(False, equal)]
  tied_rows = np.column_stack([keyframe[tied], rows.action[tied], rows.extra[tied], rows.boxes[tied]])
  by_class = np.lexsort((rows.action, keyframe))
  together = (np.diff(keyframe[by_class]) == 0) & (np.diff(rows.action[by_class]) == 0)
  return collections.Counter(
    beyond_limit=int((np.bincount(keyframe - keyframe.min()) - MAX_ROWS).clip(0).sum()),
    unsorted=count_true(together & (np.diff(rows.extra[by_class]) > 0)),
    equal_in_keyframe=count_true(equal),
    duplicates=len(tied) - len(np.unique(tied_rows, axis=0)),
    empty=count_true(~has_area(rows.boxes)),
  )


def count_true(mask: np.ndarray) -> int:
  return int(np.count_nonzero(mask))


def has_area(boxes: np.ndarray) -> np.ndarray:
  return (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])


def _heap_order(rows: Rows, keyframe: np.ndarray, order: np.ndarray, capacity: int) -> np.ndarray:
  """Orders rows by keyframe and falling ``extra``, at most `capacity` in each, as the official evaluator.

  It collects the rows of a keyframe in a heap, and among equal scores the heap's layout decides which are
  kept and which come first. Only where that matters (at the limit or inside one class) a heap is played.

  Returns:
    Indices of rows.
  """
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
