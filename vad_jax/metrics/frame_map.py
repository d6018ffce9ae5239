"""Frame-mAP on keyframes: the protocols of AVA's three evaluators in use, and class-agnostic person AP.

Three steps that every frame-level protocol shares, each over many keyframes at once:

1. `best_overlaps`: for each detection the ground-truth box of its keyframe and class that it overlaps most.
2. `true_positives`: the first detection to claim a box, at a given IoU, is right; all others are wrong.
3. `curves` and `average_precision`: ranked by score, class by class.

Protocols differ in what they let in, in the order in which detections may claim boxes, and in what they count:
`PROTOCOLS` says how, and `differences` whether that matters on a given input.
"""

import collections
import heapq
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Literal, NamedTuple

import numpy as np

from vad_jax.annotations import Rows

MAX_ROWS = 50  # of a keyframe, that the official evaluator scores
_CHUNK = 1 << 17  # pairs of boxes compared at once, and rows scored at once, so that memory stays flat


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


class Curve(NamedTuple):
  """Ranking of the detections of one class, best score first.

  Attributes:
    score: ``[D]``.
    correct: ``[D]`` bool.
    num_ground_truth: annotated boxes.
  """

  score: np.ndarray
  correct: np.ndarray
  num_ground_truth: int

  @property
  def precision(self) -> np.ndarray:
    """``[D]`` float64 share of correct ones among the detections so far."""
    return np.cumsum(self.correct) / np.arange(1, len(self.correct) + 1)

  @property
  def recall(self) -> np.ndarray:
    """``[D]`` float64 share of the annotated boxes found so far."""
    return np.cumsum(self.correct) / max(self.num_ground_truth, 1)


class FrameMap(NamedTuple):
  """Frame-mAP and what it was made of.

  Attributes:
    mean_ap: mean of the AP over the classes that count; fraction in [0, 1], NaN where none does.
    ap: class id to average precision; NaN where the class does not count.
    num_ground_truth: class id to number of annotated boxes.
    num_detections: class id to number of detections that were scored.
    num_true_positives: class id to number of detections that claimed a box.
    curves: class id to precision-recall curve; empty where nothing was detected or annotated.
    num_keyframes: annotated keyframes; but for mmaction2 those that hold nobody included.
    iou: least IoU of a true positive.
    protocol: name of the protocol.
    num_boxes: annotated boxes; one with several actions counts once.
    tally: how many rows there are of each kind that `differences` tells of.
  """

  mean_ap: float
  ap: dict[int, float]
  num_ground_truth: dict[int, int]
  num_detections: dict[int, int]
  num_true_positives: dict[int, int]
  curves: dict[int, Curve]
  num_keyframes: int
  iou: float
  protocol: str
  num_boxes: int
  tally: collections.Counter[str]


class SplitKeyframeError(ValueError):
  """Detections came in parts, and those of one keyframe, or keyframes out of order, in several of them."""


def frame_map(
  ground_truth: Rows,
  detections: Rows | Iterable[Rows],
  label_map: dict[int, str],
  *,
  iou: float = 0.5,
  protocol: str = "activitynet",
  excluded: Set[tuple[str, float]] = frozenset(),
) -> FrameMap:
  """Frame-mAP at one IoU; see `frame_maps`."""
  return frame_maps(ground_truth, detections, label_map, ious=(iou,), protocol=protocol, excluded=excluded)[0]


def frame_maps(
  ground_truth: Rows,
  detections: Rows | Iterable[Rows],
  label_map: dict[int, str],
  *,
  ious: Sequence[float],
  protocol: str = "activitynet",
  excluded: Set[tuple[str, float]] = frozenset(),
) -> list[FrameMap]:
  """Frame-mAP at several IoUs, with boxes compared once, as one of the evaluators of `PROTOCOLS` computes it.

  Rows of classes outside the label map are left out. Where the evaluators sort equal scores arbitrarily, the sort
  is taken to be stable.

  Args:
    ground_truth: annotations; a row with action 0 says that the keyframe was annotated and holds nobody.
    detections: one row for each box and action; ``extra`` is the score. Where they come in parts, memory stays
      that of a part and a few bytes for each row.
    label_map: class id to name; the classes to score.
    ious: least IoU of a true positive, inclusive.
    protocol: ``activitynet``, the official one; ``slowfast``, also that of EVAD and STMixer; or ``mmaction2``.
    excluded: video and timestamp of keyframes to leave out. (The official evaluator knows no such list: this is
      as if they were in neither file.)

  Raises:
    ValueError: a score is NaN, an annotated box is inverted (for mmaction2 any box), an IoU is no fraction above
      0, the protocol is unknown, or no annotation has a class of the label map.
    SplitKeyframeError: parts of detections that hold the same keyframe; for mmaction2 also keyframes in another
      order than the annotations. Taken in one piece, the same detections can be scored.
  """
  rules = PROTOCOLS.get(protocol)
  if rules is None:
    raise ValueError(f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
  _check_ious(*ious)
  _check_truth(ground_truth)
  truth = _Truth(ground_truth, label_map, rules, excluded)
  found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {index: [] for index in truth.num_boxes}
  for rows, keyframe, rank in _blocks(detections, truth, rules):
    full = _has_area(rows.boxes)
    truth.tally["empty"] += int(np.count_nonzero(~full))
    if not rules.drops_empty:
      _check_boxes("detection", rows)
      full[:] = True
    order = _order(rows, rank, rules.order, MAX_ROWS)
    order = order[full[order]]
    action, score = rows.action[order], rows.extra[order].astype(rules.dtype)
    group = keyframe[order] * truth.num_groups + action
    overlap, box = best_overlaps(truth.group, truth.boxes, group, rows.boxes[order].astype(rules.dtype))
    correct = np.column_stack([true_positives(overlap, box, iou) for iou in ious])
    by_class = np.argsort(action, kind="stable")
    for part in np.split(by_class, np.flatnonzero(np.diff(action[by_class])) + 1):
      if len(part):
        found[int(action[part[0]])].append((score[part], correct[part]))
  return _results(found, truth, rules, ious, protocol)


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
  _check_ious(iou)
  _check_truth(ground_truth)
  _check_scores(detections)
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
  """Numbers the annotated keyframes in order of appearance; timestamps are told apart to the microsecond.

  Returns:
    ``[G]`` and ``[D]`` int64 keyframe of each row, from 0 up; -1 for detections where nothing is annotated.
  """
  number = _Numbering()
  truth = number(ground_truth.video, _microseconds(ground_truth.timestamp))
  num_annotated = len(number)
  found = number(detections.video, _microseconds(detections.timestamp))
  return truth, np.where(found < num_annotated, found, -1)


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
  result = {}
  for index, total in num_ground_truth.items():
    of_class = np.flatnonzero(action == index)
    order = of_class[_ranking(score[of_class])]
    result[index] = Curve(score[order], correct[order], total)
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


class _Numbering(dict[tuple, int]):
  """Numbers what is told apart by some columns, in order of appearance."""

  def __call__(self, *columns: np.ndarray) -> np.ndarray:
    """Number of each entry of the columns, ``[R]`` int64; cheap where equal ones follow each other."""
    changes = np.zeros(len(columns[0]), bool)
    changes[:1] = True
    for column in columns:
      changes[1:] |= column[1:] != column[:-1]
    start = np.flatnonzero(changes)
    keys = zip(*(column[start].tolist() for column in columns), strict=True)
    numbers = np.fromiter((self.setdefault(key, len(self)) for key in keys), np.int64, len(start))
    return np.repeat(numbers, np.diff(start, append=len(changes)))


class _Truth:
  """Annotations, prepared for detections to be compared with them.

  Attributes:
    number: of keyframes by video and microsecond; those that detections may be scored on come first.
    num_known: how many these are.
    excluded: numbers of excluded keyframes.
    group, boxes: of the annotations, in the protocol's order; sorted by group, which is keyframe and class.
    num_groups: by which the number of a keyframe is multiplied in its group.
    num_boxes: class id to number of annotations.
    num_people: boxes; one with several actions counts once.
    tally: see `FrameMap`.
  """

  def __init__(self, rows: Rows, label_map: dict[int, str], rules: Protocol, excluded: Set[tuple[str, float]]) -> None:
    self.number = _Numbering()
    time = _microseconds(rows.timestamp)
    labelled = np.isin(rows.action, list(label_map))
    if not labelled.any():
      raise ValueError("no annotation has a class of the label map: nothing to score against")
    keyframe = self.number(rows.video[labelled], time[labelled])
    self.num_labelled = len(self.number)
    self.number(rows.video, time)
    self.num_annotated = len(self.number)
    self.num_known = self.num_labelled if rules.needs_label else self.num_annotated
    videos, times = zip(*excluded, strict=True) if excluded else ((), ())
    self.excluded = self.number(np.array(videos, object), _microseconds(np.array(times, np.float64)))
    self.num_keyframes = self.num_known - int(np.count_nonzero(self.excluded < self.num_known))

    left_out = np.isin(keyframe, self.excluded)
    self.tally = collections.Counter(
      excluded_annotations=int(np.count_nonzero(left_out)),
      keyframe_rows=int(np.count_nonzero(rows.action == 0)),
      fractions=int(np.count_nonzero(time % 1_000_000)),
    )
    if rules.counts_excluded:
      left_out[:] = False
    rows, keyframe = rows.select(np.flatnonzero(labelled)[~left_out]), keyframe[~left_out]
    self.num_boxes = {index: int(np.count_nonzero(rows.action == index)) for index in sorted(label_map)}
    self.num_people = len(np.unique(np.column_stack([keyframe, rows.boxes]), axis=0))
    self.num_groups = max(label_map) + 1
    order = _order(rows, keyframe, rules.order, len(keyframe))
    group = keyframe[order] * self.num_groups + rows.action[order]
    by_group = np.argsort(group, kind="stable")
    self.group, self.boxes = group[by_group], rows.boxes[order[by_group]].astype(rules.dtype)


def _blocks(
  detections: Rows | Iterable[Rows], truth: _Truth, rules: Protocol
) -> Iterator[tuple[Rows, np.ndarray, np.ndarray]]:
  """Cuts the detections that count into blocks of whole keyframes, and counts the others.

  Yields:
    rows, the number of their keyframe and its rank among the keyframes, by which the rows are sorted.
  """
  appearance = _Numbering()
  last = -1
  for rows in (detections,) if isinstance(detections, Rows) else detections:
    _check_scores(rows)
    index = np.flatnonzero(np.isin(rows.action, list(truth.num_boxes)))
    truth.tally["other_classes"] += len(rows.action) - len(index)
    keyframe = truth.number(rows.video[index], _microseconds(rows.timestamp[index]))
    excluded = np.isin(keyframe, truth.excluded)
    truth.tally["excluded"] += int(np.count_nonzero(excluded))
    known = ~excluded & (keyframe < truth.num_known)
    truth.tally["unannotated"] += int(np.count_nonzero(~excluded & (keyframe >= truth.num_annotated)))
    truth.tally["unlabelled"] += int(
      np.count_nonzero(~excluded & (keyframe >= truth.num_labelled) & (keyframe < truth.num_annotated))
    )
    keep = ~excluded if rules.scores_unannotated else known
    index, keyframe = index[keep], keyframe[keep]
    rank = appearance(keyframe) if rules.ranks_by_file else keyframe
    if not len(rank):
      continue
    if rank.min() <= last:
      raise SplitKeyframeError("the detections of a keyframe do not stand together")
    last = rank.max()
    order = np.argsort(rank, kind="stable")
    first = np.flatnonzero(np.diff(rank[order])) + 1  # of each keyframe but the very first
    cuts = np.searchsorted(first, np.arange(_CHUNK, len(rank), _CHUNK))
    cuts = first[np.unique(cuts[cuts < len(first)])]
    for block in np.split(order, cuts):
      yield rows.select(index[block]), keyframe[block], rank[block]


def _results(
  found: dict[int, list[tuple[np.ndarray, np.ndarray]]],
  truth: _Truth,
  rules: Protocol,
  ious: Sequence[float],
  protocol: str,
) -> list[FrameMap]:
  """Joins what was found class by class, at each IoU."""
  curves_by_iou: list[dict[int, Curve]] = [{} for _ in ious]
  for index, total in truth.num_boxes.items():
    parts = found.pop(index) or [(np.zeros(0, rules.dtype), np.zeros((0, len(ious)), bool))]
    score, correct = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = _ranking(score)
    score, correct = score[order], correct[order]
    truth.tally["equal_scores"] += int(np.count_nonzero(np.diff(score) == 0))
    for position, by_class in enumerate(curves_by_iou):
      by_class[index] = Curve(score, correct[:, position], total)
  results = []
  for iou, by_class in zip(ious, curves_by_iou, strict=True):
    counts = {
      c: curve.num_ground_truth > 0 and (rules.counts_undetected or len(curve.score) > 0)
      for c, curve in by_class.items()
    }
    ap = {c: average_precision(v.precision, v.recall) if counts[c] else np.nan for c, v in by_class.items()}
    results.append(
      FrameMap(
        mean_ap=float(np.nanmean(list(ap.values()))) if any(counts.values()) else np.nan,
        ap=ap,
        num_ground_truth=truth.num_boxes,
        num_detections={c: len(curve.score) for c, curve in by_class.items()},
        num_true_positives={c: int(np.count_nonzero(curve.correct)) for c, curve in by_class.items()},
        curves=by_class,
        num_keyframes=truth.num_keyframes,
        iou=iou,
        protocol=protocol,
        num_boxes=truth.num_people,
        tally=truth.tally,
      )
    )
  return results


def _check_ious(*ious: float) -> None:
  for iou in ious:
    if not 0 < iou <= 1:
      raise ValueError(f"iou is {iou}; expected a fraction in (0, 1]")


def _check_scores(rows: Rows) -> None:
  bad = np.flatnonzero(np.isnan(rows.extra))
  if len(bad):
    raise ValueError(f"{_name_row('detection', rows, bad[0])}: the score is NaN")


def _check_truth(rows: Rows) -> None:
  _check_boxes("annotation", rows)


def _check_boxes(kind: str, rows: Rows) -> None:
  x1, y1, x2, y2 = rows.boxes.T
  bad = np.flatnonzero((x1 > x2) | (y1 > y2))
  if len(bad):
    box = rows.boxes[bad[0]].tolist()
    raise ValueError(f"{_name_row(kind, rows, bad[0])}: {box} is inverted; expected x1,y1,x2,y2")


def _name_row(kind: str, rows: Rows, index: int) -> str:
  return f"{kind} {index + 1} of {len(rows.video)} ({rows.video[index]} at {rows.timestamp[index]:g} s)"


def _microseconds(seconds: np.ndarray) -> np.ndarray:
  return np.rint(seconds * 1e6).astype(np.int64)


def _order(rows: Rows, keyframe: np.ndarray, order: str, capacity: int) -> np.ndarray:
  """Indices of the rows sorted by keyframe, and in each as the protocol has them; see `Protocol`."""
  if order == "heap":
    return _heap_order(rows, keyframe, capacity)
  return np.lexsort((-rows.extra, keyframe)) if order == "score" else np.argsort(keyframe, kind="stable")


def _ranking(score: np.ndarray) -> np.ndarray:
  """Indices by falling score; of equal ones the last comes first, as in an ascending sort read backwards."""
  return np.argsort(score, kind="stable")[::-1]


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


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """IoU of ``[P, 4]`` xyxy boxes, pair by pair; 0 where both have no area.

  Sides and areas have the precision of the boxes, the rest is float64, as in the official evaluators.
  """
  sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None).astype(np.float64)
  intersection = sides[:, 0] * sides[:, 1]
  union = np.prod(a[:, 2:] - a[:, :2], axis=1) + np.prod(b[:, 2:] - b[:, :2], axis=1) - intersection
  return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
