"""Frame-mAP on keyframes: the protocols of AVA's three evaluators in use, and class-agnostic person AP.

Three steps that every frame-level protocol shares, each over many keyframes at once:

1. `best_overlaps`: for each detection the ground-truth box of its keyframe and class that it overlaps most.
2. `true_positives`: the first detection to claim a box, at a given IoU, is right; all others are wrong.
3. `curves` and `average_precision`: ranked by score, class by class.

Protocols differ in what they let in, in the order in which detections may claim boxes, and in what they count:
`protocols` says how, and `FrameMap.differences` whether that matters on a given input.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

import numpy as np

from vad_jax.annotations import Rows
from vad_jax.metrics.protocols import (
  DIFFERENCES,
  MAX_ROWS,
  PROTOCOLS,
  Protocol,
  best_first,
  count_true,
  has_area,
  in_order,
  inspect,
)

_CHUNK = 1 << 17  # pairs of boxes compared at once, and rows scored at once, so that memory stays flat


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
    tally: how many rows there are of each kind that `DIFFERENCES` tells of.
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

  def differences(self) -> list[str]:
    """What about this input lets the protocols disagree, or was left out: a sentence with a count for each."""
    return [f"{text}: {self.tally[kind]:,}" for kind, text in DIFFERENCES.items() if self.tally[kind]]


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
  _check_boxes("annotation", ground_truth, np.flatnonzero(ground_truth.action))
  truth = _Truth(ground_truth, label_map, rules, excluded)
  # Bytes of scores and of what is right by class: buffers that grow without being copied.
  found = {index: (bytearray(), bytearray()) for index in truth.num_boxes}
  for rows, keyframe, rank in _blocks(detections, truth, rules):
    ranking = best_first(rows, rank)
    truth.tally.update(inspect(rows, rank, ranking))
    order = in_order(rows, rank, ranking, rules.order, MAX_ROWS)
    if rules.drops_empty:
      order = order[has_area(rows.boxes[order])]
    action, score = rows.action[order], rows.extra[order].astype(rules.dtype)
    group = keyframe[order] * truth.num_groups + action
    overlap, box = best_overlaps(truth.group, truth.boxes, group, rows.boxes[order].astype(rules.dtype))
    correct = np.column_stack([true_positives(overlap, box, iou) for iou in ious])
    by_class = np.argsort(action, kind="stable")
    for part in np.split(by_class, np.flatnonzero(np.diff(action[by_class])) + 1):
      if len(part):
        for buffer, values in zip(found[int(action[part[0]])], (score, correct), strict=True):
          buffer += values[part].tobytes()
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
  _check_boxes("annotation", ground_truth, np.flatnonzero(ground_truth.action))
  _check_scores(detections)
  truth_keyframe, keyframe = keyframe_ids(ground_truth, detections)
  people = np.column_stack([truth_keyframe, ground_truth.boxes])[ground_truth.action > 0]
  if not len(people):
    raise ValueError("no annotation holds a box: nothing to score against")
  people = np.unique(people, axis=0)
  keep = (keyframe >= 0) & has_area(detections.boxes)
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
    self.num_keyframes = self.num_known - count_true(self.excluded < self.num_known)

    left_out = np.isin(keyframe, self.excluded)
    self.tally = collections.Counter(
      other_annotations=count_true(~labelled & (rows.action > 0)),
      excluded_annotations=count_true(left_out),
      keyframe_rows=count_true(rows.action == 0),
      fractions=count_true(time % 1_000_000),
    )
    self.videos = set(rows.video.tolist())
    self.unknown_videos: set[str] = set()
    if rules.counts_excluded:
      left_out[:] = False
    rows, keyframe = rows.select(np.flatnonzero(labelled)[~left_out]), keyframe[~left_out]
    self.num_boxes = {index: count_true(rows.action == index) for index in sorted(label_map)}
    by_box = np.lexsort((rows.action, *rows.boxes.T, keyframe))
    same_box = (np.diff(keyframe[by_box]) == 0) & (np.diff(rows.boxes[by_box], axis=0) == 0).all(axis=1)
    self.num_people = len(keyframe) - count_true(same_box)
    self.tally["repeated_annotations"] = count_true(same_box & (np.diff(rows.action[by_box]) == 0))
    self.num_groups = max(label_map) + 1
    order = in_order(rows, keyframe, best_first(rows, keyframe), rules.order, len(keyframe))
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
  classes, tally = list(truth.num_boxes), truth.tally
  seen: set[int] = set()
  last = -1
  rows_before = 0
  for rows in (detections,) if isinstance(detections, Rows) else detections:
    _check_scores(rows, rows_before)
    index = np.flatnonzero(np.isin(rows.action, classes))
    tally["other_classes"] += len(rows.action) - len(index)
    keyframe = truth.number(rows.video[index], _microseconds(rows.timestamp[index]))
    excluded = np.isin(keyframe, truth.excluded)
    unannotated = ~excluded & (keyframe >= truth.num_annotated)
    tally["excluded"] += count_true(excluded)
    tally["unannotated"] += count_true(unannotated)
    tally["unlabelled"] += count_true(~excluded & ~unannotated & (keyframe >= truth.num_labelled))
    truth.unknown_videos.update(set(rows.video[index[unannotated]].tolist()) - truth.videos)
    keep = ~excluded & ((keyframe < truth.num_known) | rules.scores_unannotated)
    index, keyframe = index[keep], keyframe[keep]
    if not rules.drops_empty:
      _check_boxes("detection", rows, index, rows_before)
    rows_before += len(rows.action)
    if not len(index):
      continue
    present, first, inverse = np.unique(keyframe, return_index=True, return_inverse=True)
    if not seen.isdisjoint(present.tolist()) or (present[0] < last and not rules.ranks_by_file):
      raise SplitKeyframeError("the parts of the detections hold the same keyframe, or keyframes out of order")
    seen.update(present.tolist())
    last = present[-1]
    rank = first[inverse] if rules.ranks_by_file else keyframe
    order = np.argsort(rank, kind="stable")
    first = np.flatnonzero(np.diff(rank[order])) + 1  # of each keyframe but the very first
    cuts = np.searchsorted(first, np.arange(_CHUNK, len(rank), _CHUNK))
    cuts = first[np.unique(cuts[cuts < len(first)])]
    for block in np.split(order, cuts):
      yield rows.select(index[block]), keyframe[block], rank[block]


def _results(
  found: dict[int, tuple[bytearray, bytearray]],
  truth: _Truth,
  rules: Protocol,
  ious: Sequence[float],
  protocol: str,
) -> list[FrameMap]:
  """Joins what was found class by class, at each IoU."""
  curves_by_iou: list[dict[int, Curve]] = [{} for _ in ious]
  for index, total in truth.num_boxes.items():
    scores, hits = found.pop(index)
    score, correct = np.frombuffer(scores, rules.dtype), np.frombuffer(hits, bool).reshape(-1, len(ious))
    order = _ranking(score)
    score, correct = score[order], correct[order]
    truth.tally["equal_scores"] += count_true(np.diff(score) == 0)
    truth.tally["undetected"] += bool(total) and not len(score)
    for position, by_class in enumerate(curves_by_iou):
      by_class[index] = Curve(score, correct[:, position], total)
  truth.tally["unknown_videos"] = len(truth.unknown_videos)
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
        num_true_positives={c: count_true(curve.correct) for c, curve in by_class.items()},
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


def _check_scores(rows: Rows, rows_before: int = 0) -> None:
  bad = np.flatnonzero(np.isnan(rows.extra))
  if len(bad):
    raise ValueError(f"{_name_row('detection', rows, bad[0], rows_before)}: the score is NaN")


def _check_boxes(kind: str, rows: Rows, index: np.ndarray, rows_before: int = 0) -> None:
  x1, y1, x2, y2 = rows.boxes[index].T
  bad = index[(x1 > x2) | (y1 > y2)]
  if len(bad):
    place = _name_row(kind, rows, bad[0], rows_before)
    raise ValueError(f"{place}: box {rows.boxes[bad[0]].tolist()} is inverted; expected x1,y1,x2,y2")


def _name_row(kind: str, rows: Rows, index: int, rows_before: int) -> str:
  return f"{kind} in row {rows_before + index + 1} ({rows.video[index]} at {rows.timestamp[index]:g} s)"


def _microseconds(seconds: np.ndarray) -> np.ndarray:
  return np.rint(seconds * 1e6).astype(np.int64)


def _ranking(score: np.ndarray) -> np.ndarray:
  """Indices by falling score; of equal ones the last comes first, as in an ascending sort read backwards."""
  return np.argsort(score, kind="stable")[::-1]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """IoU of ``[P, 4]`` xyxy boxes, pair by pair; 0 where both have no area.

  Sides and areas have the precision of the boxes, the rest is float64, as in the official evaluators.
  """
  sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None).astype(np.float64)
  intersection = sides[:, 0] * sides[:, 1]
  union = np.prod(a[:, 2:] - a[:, :2], axis=1) + np.prod(b[:, 2:] - b[:, :2], axis=1) - intersection
  return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
