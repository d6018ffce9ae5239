"""Why is the mAP what it is? Breaks frame-mAP down by people, mistakes, classes and keyframes.

Every function is exact and works on all rows at once; `analyse` runs them all.
"""

import functools
import itertools
import math
from collections.abc import Callable, Set
from typing import NamedTuple

import numpy as np

from vad_jax.annotations import Rows
from vad_jax.metrics.frame_map import (
  FrameMap,
  average_precision,
  best_overlaps,
  curves,
  frame_map,
  frame_maps,
  keyframe_ids,
  true_positives,
)
from vad_jax.metrics.protocols import MAX_ROWS, PROTOCOLS, best_first, has_area, in_order

KINDS = ("correct", "localisation", "confusion", "duplicate", "background")  # of a detection, see `Errors`
_CORRECT, _LOCALISATION, _CONFUSION, _DUPLICATE, _BACKGROUND = range(5)
_TOUCHING = 0.1  # least IoU of a misplaced detection
_NUM_AREAS = 5
_MOST_ACTORS = 6  # keyframes with as many or more are one group
_NUM_EXAMPLES = 6
_IOUS = np.round(np.arange(0.5, 1.0, 0.05), 2).tolist()

Score = Callable[[Rows, Rows], FrameMap]


class Subset(NamedTuple):
  """mAP on a part of the people.

  Attributes:
    name: which part, in words.
    mean_ap: over the classes that the part holds.
    num_classes: number of these.
    num_boxes: annotated people.
    num_keyframes: keyframes that they are in.
  """

  name: str
  mean_ap: float
  num_classes: int
  num_boxes: int
  num_keyframes: int


class Oracle(NamedTuple):
  """mAP of the detections as they are, and if a part of each came from the annotated box nearest to it."""

  detections: float
  boxes: float
  labels: float
  both: float


class Errors(NamedTuple):
  """What is wrong with the detections; each has one kind of `KINDS`, the first that fits in this order.

  * correct: claims a box of its class.
  * duplicate: lies on a box of its class (IoU at or above the threshold) that a better one has claimed.
  * localisation: overlaps a box of its class (IoU from 0.1), but not enough.
  * confusion: lies on a box that has other classes only.
  * background: all others.

  Attributes:
    counts: kind to class id to number of detections, all scored ones; and ``missed`` to class id to number of
      annotated boxes that no detection claims.
    best_counts: the same among the best ``G`` detections of a class, ``G`` its number of annotated boxes. There
      a perfect model has correct ones only, and scores that hardly matter for the AP stay out of sight.
    gain: kind (``correct`` apart) to what the mAP would gain if all of that kind were mended: misplaced ones
      moved onto their box and confused ones given a class that is missed on theirs, as long as one is
      unclaimed, in the order of the protocol; all others of the kind removed; missed boxes no longer asked for.
  """

  counts: dict[str, dict[int, int]]
  best_counts: dict[str, dict[int, int]]
  gain: dict[str, float]


class Confusion(NamedTuple):
  """Which class is found in place of which, on annotated people that detections lie on.

  Counts as found what is among the best ``G`` detections of its class, as in `Errors`. A person may do several
  things: a class in its place means one that the person does not do, while one that it does was not found.

  Attributes:
    classes: ``[K]`` class ids.
    matrix: ``[K, K]`` int64; on how many people of the row's class the column's was found in its place; on the
      diagonal, on how many the class itself was found.
    num_people: ``[K]`` annotated people of each class.
  """

  classes: np.ndarray
  matrix: np.ndarray
  num_people: np.ndarray


class Example(NamedTuple):
  """A keyframe with what is annotated and what was found there.

  Attributes:
    video: its name.
    timestamp: seconds.
    score: mean over its annotated classes of the AP of this keyframe alone.
    ground_truth: its annotations.
    found_score: ``[G]`` score of the detection that claims the annotation, NaN where none does.
    detections: the correct ones, and those that are among the best of their class, as in `Errors`.
    kind: ``[D]`` index into `KINDS`.
  """

  video: str
  timestamp: float
  score: float
  ground_truth: Rows
  found_score: np.ndarray
  detections: Rows
  kind: np.ndarray


class Change(NamedTuple):
  """AP of a class in two runs; NaN where it has no ground truth."""

  action: int
  before: float
  after: float
  gain: float


class Analysis(NamedTuple):
  """All that the report shows about one set of detections.

  Attributes:
    frame_map: the scores that the rest explains.
    by_iou: least IoU to mAP.
    precision: class id to ``[101]`` precision at the recalls 0, 0.01, .. 1 (the envelope that AP is the area
      under, 0 beyond the largest recall); empty where nothing was detected or annotated.
    by_area, by_actors, oracle, errors, confusion: see the functions of these names.
    best, worst: keyframes.
  """

  frame_map: FrameMap
  by_iou: dict[float, float]
  precision: dict[int, np.ndarray]
  by_area: list[Subset]
  by_actors: list[Subset]
  oracle: Oracle
  errors: Errors
  confusion: Confusion
  best: list[Example]
  worst: list[Example]


class Match(NamedTuple):
  """Scored detections and what they lie on; in the order in which they claim boxes.

  Attributes:
    truth: ``G`` annotations of the label map's classes, one for each person and class.
    truth_keyframe: ``[G]`` their keyframes.
    person: ``[G]`` number of the annotated person.
    found: ``D`` detections.
    keyframe: ``[D]`` their keyframes.
    kind: ``[D]`` index into `KINDS`.
    box: ``[D]`` the annotation of the same class that is overlapped most; -1 where there is none.
    nearest: ``[D]`` the person that lies under the detection (IoU at or above the threshold), -1 where nobody.
    is_best: ``[D]`` bool, among the best ``G`` of its class.
    num_truth: class id to number of annotations.
    scored: ids of the classes that the mAP is the mean over.
  """

  truth: Rows
  truth_keyframe: np.ndarray
  person: np.ndarray
  found: Rows
  keyframe: np.ndarray
  kind: np.ndarray
  box: np.ndarray
  nearest: np.ndarray
  is_best: np.ndarray
  num_truth: dict[int, int]
  scored: list[int]


def analyse(
  ground_truth: Rows,
  detections: Rows,
  label_map: dict[int, str],
  *,
  iou: float = 0.5,
  protocol: str = "activitynet",
  excluded: Set[tuple[str, float]] = frozenset(),
) -> Analysis:
  """Runs every analysis of this file; arguments are those of `frame_map`.

  Raises:
    ValueError: what `frame_map` raises, or all annotated keyframes are excluded.
  """
  result, *others = frame_maps(
    ground_truth, detections, label_map, ious=(iou, *_IOUS), protocol=protocol, excluded=excluded
  )
  # What follows looks at annotations of scored classes only. Emptied rows keep their keyframes annotated.
  truth = _keep(ground_truth, np.isin(ground_truth.action, list(label_map)))
  if excluded:
    detections = detections.select(~_is_in(detections, excluded))
    if not PROTOCOLS[protocol].counts_excluded:
      truth = truth.select(~_is_in(truth, excluded))
  if not truth.action.any():
    raise ValueError("every annotation is on an excluded keyframe: nothing to score against")
  score = functools.partial(frame_map, label_map=label_map, iou=iou, protocol=protocol)
  matched = match(truth, detections, label_map, iou=iou, protocol=protocol)
  return Analysis(
    frame_map=result,
    by_iou={other.iou: other.mean_ap for other in others},
    precision={index: _at_recalls(curve.precision, curve.recall) for index, curve in result.curves.items()},
    by_area=by_area(truth, detections, score),
    by_actors=by_actors(truth, detections, score),
    oracle=oracle(truth, detections, score),
    errors=errors(matched),
    confusion=confusion(matched),
    best=rank_keyframes(matched, _NUM_EXAMPLES, best=True),
    worst=rank_keyframes(matched, _NUM_EXAMPLES, best=False),
  )


def by_area(ground_truth: Rows, detections: Rows, score: Score) -> list[Subset]:
  """mAP by the share of the frame that a box takes, in bins with about as many annotated people each.

  Annotations and detections outside a bin's limits do not count in it; every detection belongs to one bin.
  """
  keyframe, _ = keyframe_ids(ground_truth, detections)
  truth, keyframe = _annotated(ground_truth, keyframe)
  people, _ = _distinct(keyframe, truth.boxes)
  sizes = np.sort(_area(truth.boxes[people]))
  limits = np.unique(sizes[np.arange(1, _NUM_AREAS) * len(sizes) // _NUM_AREAS])
  limits = limits[limits > sizes[0]]  # equal sizes may leave fewer bins
  truth_bin, found_bin = (np.searchsorted(limits, _area(r.boxes), "right") for r in (ground_truth, detections))
  edges = ["0", *(f"{float(f'{100 * limit:.2g}'):g}" for limit in limits), "100"]
  return [
    _subset(f"{low}–{high} %", _keep(ground_truth, truth_bin == index), detections.select(found_bin == index), score)
    for index, (low, high) in enumerate(itertools.pairwise(edges))
  ]


def by_actors(ground_truth: Rows, detections: Rows, score: Score) -> list[Subset]:
  """mAP on the keyframes with one annotated person, with two, and so on. Keyframes with nobody are left out."""
  keyframe, found_keyframe = keyframe_ids(ground_truth, detections)
  truth, truth_keyframe = _annotated(ground_truth, keyframe)
  people, _ = _distinct(truth_keyframe, truth.boxes)
  count = np.minimum(np.bincount(truth_keyframe[people], minlength=keyframe.max() + 1), _MOST_ACTORS)
  # Detections on keyframes without annotation belong to no group.
  found_count = np.where(found_keyframe >= 0, count[found_keyframe], 0)
  return [
    _subset(
      f"{n} or more" if n == _MOST_ACTORS else str(n),
      ground_truth.select(count[keyframe] == n),
      detections.select(found_count == n),
      score,
    )
    for n in range(1, _MOST_ACTORS + 1)
    if (count == n).any()
  ]


def oracle(ground_truth: Rows, detections: Rows, score: Score) -> Oracle:
  """mAP with annotated boxes, with annotated classes, and with both, in place of the detected ones.

  A detected box gets the box, or the classes, of the annotated person that it overlaps most; one that overlaps
  nobody stays as it is. The annotated classes of a box all get the highest score that the box had.
  """
  truth_keyframe, keyframe = keyframe_ids(ground_truth, detections)
  truth, truth_keyframe = _annotated(ground_truth, truth_keyframe)
  people, person = _distinct(truth_keyframe, truth.boxes)
  boxes, box = _distinct(keyframe, detections.boxes)  # detected boxes, each with all its classes
  overlap, nearest = best_overlaps(
    truth_keyframe[people], truth.boxes[people], keyframe[boxes], detections.boxes[boxes]
  )
  moved = detections.boxes[boxes].copy()
  moved[overlap > 0] = truth.boxes[people[nearest[overlap > 0]]]
  relocated = detections._replace(boxes=moved[box])

  best_score = np.full(len(boxes), -np.inf)
  np.maximum.at(best_score, box, detections.extra)
  labels = np.argsort(person, kind="stable")  # annotations, person by person
  num_labels = np.bincount(person, minlength=len(people))
  on_person = np.flatnonzero(overlap > 0)
  count = num_labels[nearest[on_person]]
  label = labels[_ranges((np.cumsum(num_labels) - num_labels)[nearest[on_person]], count)]
  unchanged = np.flatnonzero(overlap[box] == 0)
  row = np.concatenate([np.repeat(boxes[on_person], count), unchanged])
  labelled = detections.select(row)._replace(
    action=np.concatenate([truth.action[label], detections.action[unchanged]]),
    extra=np.concatenate([np.repeat(best_score[on_person], count), detections.extra[unchanged]]),
  )
  return Oracle(
    detections=score(ground_truth, detections).mean_ap,
    boxes=score(ground_truth, relocated).mean_ap,
    labels=score(ground_truth, labelled).mean_ap,
    both=score(ground_truth, labelled._replace(boxes=relocated.boxes[row])).mean_ap,
  )


def match(
  ground_truth: Rows, detections: Rows, label_map: dict[int, str], *, iou: float = 0.5, protocol: str = "activitynet"
) -> Match:
  """Finds out what each detection lies on; arguments are those of `frame_map`."""
  rules = PROTOCOLS[protocol]
  labelled = np.isin(ground_truth.action, list(label_map))
  if rules.needs_label:
    ground_truth, labelled = ground_truth.select(labelled), labelled[labelled]
  truth_keyframe, keyframe = keyframe_ids(ground_truth, detections)
  truth, truth_keyframe = ground_truth.select(labelled), truth_keyframe[labelled]
  order = in_order(truth, truth_keyframe, best_first(truth, truth_keyframe), rules.order, len(truth_keyframe))
  truth, truth_keyframe = truth.select(order), truth_keyframe[order]
  truth_boxes = truth.boxes.astype(rules.dtype)

  scored = np.isin(detections.action, list(label_map)) & ((keyframe >= 0) | rules.scores_unannotated)
  found, keyframe = detections.select(scored), keyframe[scored]
  _, first, inverse = np.unique(keyframe, return_index=True, return_inverse=True)
  rank = first[inverse] if rules.ranks_by_file else keyframe
  order = in_order(found, rank, best_first(found, rank), rules.order, MAX_ROWS)
  if rules.drops_empty:
    order = order[has_area(found.boxes[order])]
  found, keyframe = found.select(order), keyframe[order]
  boxes = found.boxes.astype(rules.dtype)

  num_groups = max(label_map) + 1
  overlap, box = best_overlaps(
    truth_keyframe * num_groups + truth.action, truth_boxes, keyframe * num_groups + found.action, boxes
  )
  people, person = _distinct(truth_keyframe, truth.boxes)
  person_overlap, nearest = best_overlaps(truth_keyframe[people], truth_boxes[people], keyframe, boxes)
  kind = np.full(len(order), _BACKGROUND)
  kind[person_overlap >= iou] = _CONFUSION
  kind[(overlap >= _TOUCHING) & (overlap < iou)] = _LOCALISATION
  kind[overlap >= iou] = _DUPLICATE
  kind[true_positives(overlap, box, iou)] = _CORRECT

  count = np.bincount(truth.action, minlength=num_groups)
  num_truth = {index: int(count[index]) for index in sorted(label_map)}
  ranking = np.lexsort((-np.arange(len(order)), -found.extra, found.action))
  is_best = np.zeros(len(order), bool)
  is_best[ranking] = _occurrence(found.action[ranking]) < count[found.action[ranking]]
  return Match(
    truth=truth,
    truth_keyframe=truth_keyframe,
    person=person,
    found=found,
    keyframe=keyframe,
    kind=kind,
    box=box,
    nearest=np.where(person_overlap >= iou, nearest, -1),
    is_best=is_best,
    num_truth=num_truth,
    scored=[c for c, total in num_truth.items() if total and (rules.counts_undetected or (found.action == c).any())],
  )


def errors(matched: Match) -> Errors:
  """Counts the kinds of mistakes, and says what mending each would gain."""
  truth, found, kind, box = matched.truth, matched.found, matched.kind, matched.box
  claimed = np.zeros(len(truth.action), bool)
  claimed[box[kind == _CORRECT]] = True

  moved = np.flatnonzero((kind == _LOCALISATION) & ~claimed[box])
  moved = moved[np.unique(box[moved], return_index=True)[1]]  # the best of each box
  confused, label = _missed_classes(matched, claimed)
  relabelled = found.action.copy()
  relabelled[confused] = truth.action[label]

  def mean_ap(wrong: int | None, mended: np.ndarray, action: np.ndarray, missing: np.ndarray | None = None) -> float:
    correct = kind == _CORRECT
    correct[mended] = True
    kept = (kind != wrong) | correct
    num_truth = matched.num_truth
    if missing is not None:
      count = np.bincount(truth.action[missing], minlength=max(num_truth) + 1)
      num_truth = {index: total - int(count[index]) for index, total in num_truth.items()}
    by_class = curves(action[kept], found.extra[kept], correct[kept], num_truth)
    # A class that misses every box has nothing else to ask for once these are mended.
    aps = [
      average_precision(by_class[index].precision, by_class[index].recall) if num_truth[index] else 1.0
      for index in matched.scored
    ]
    return float(np.mean(aps)) if aps else math.nan

  nothing = np.empty(0, np.int64)
  base = mean_ap(None, nothing, found.action)
  return Errors(
    counts=_count_kinds(matched, np.full(len(kind), True)),
    best_counts=_count_kinds(matched, matched.is_best),
    gain={
      "localisation": mean_ap(_LOCALISATION, moved, found.action) - base,
      "confusion": mean_ap(_CONFUSION, confused, relabelled) - base,
      "duplicate": mean_ap(_DUPLICATE, nothing, found.action) - base,
      "background": mean_ap(_BACKGROUND, nothing, found.action) - base,
      "missed": mean_ap(None, nothing, found.action, ~claimed) - base,
    },
  )


def confusion(matched: Match) -> Confusion:
  """Counts which classes are found in place of which."""
  classes = np.array(list(matched.num_truth))
  num_people = int(matched.person.max(initial=-1)) + 1
  does = np.zeros((num_people, len(classes)), np.float32)
  does[matched.person, np.searchsorted(classes, matched.truth.action)] = 1
  shown = matched.is_best & (matched.nearest >= 0)
  seen = np.zeros_like(does)
  seen[matched.nearest[shown], np.searchsorted(classes, matched.found.action[shown])] = 1
  matrix = (does * (1 - seen)).T @ (seen * (1 - does))
  np.fill_diagonal(matrix, (does * seen).sum(0))
  return Confusion(classes, np.rint(matrix).astype(np.int64), does.sum(0).astype(np.int64))


def rank_keyframes(matched: Match, count: int, *, best: bool) -> list[Example]:
  """The keyframes with the highest, or the lowest, scores; among equal ones those with more people come first.

  No video comes twice while another has not come yet. What scores 0 is not among the best, nor 1 among the worst.
  """
  truth, found = matched.truth, matched.found
  keyframes, first, ap = _keyframe_scores(matched)
  people, _ = _distinct(matched.truth_keyframe, truth.boxes)
  num_people = np.bincount(matched.truth_keyframe[people])[keyframes]
  order = np.lexsort((-num_people, -ap if best else ap))
  order = order[ap[order] > 0 if best else ap[order] < 1]
  _, video = np.unique(truth.video[first[order]], return_inverse=True)
  turn = np.empty(len(order), np.int64)
  turn[np.argsort(video, kind="stable")] = _occurrence(np.sort(video))
  chosen = order[np.sort(np.argsort(turn, kind="stable")[:count])]

  correct = matched.kind == _CORRECT
  found_score = np.full(len(truth.action), np.nan)
  found_score[matched.box[correct]] = found.extra[correct]
  result = []
  for index in chosen:
    annotations = np.flatnonzero(matched.truth_keyframe == keyframes[index])
    shown = np.flatnonzero((matched.keyframe == keyframes[index]) & (matched.is_best | correct))
    result.append(
      Example(
        video=str(truth.video[first[index]]),
        timestamp=float(truth.timestamp[first[index]]),
        score=float(ap[index]),
        ground_truth=truth.select(annotations),
        found_score=found_score[annotations],
        detections=found.select(shown),
        kind=matched.kind[shown],
      )
    )
  return result


def compare(before: FrameMap, after: FrameMap) -> list[Change]:
  """What changed from one run to another, the largest gain first; classes that both score."""
  changes = [Change(c, before.ap[c], after.ap[c], after.ap[c] - before.ap[c]) for c in after.ap if c in before.ap]
  return sorted((c for c in changes if not math.isnan(c.gain)), key=lambda change: -change.gain)


def _subset(name: str, truth: Rows, found: Rows, score: Score) -> Subset:
  annotated, keyframe = _annotated(truth, keyframe_ids(truth, found)[0])
  people, _ = _distinct(keyframe, annotated.boxes)
  return Subset(
    name, score(truth, found).mean_ap, len(np.unique(annotated.action)), len(people), len(np.unique(keyframe))
  )


def _annotated(rows: Rows, keyframe: np.ndarray) -> tuple[Rows, np.ndarray]:
  """Rows that hold a box, and their keyframes."""
  return rows.select(rows.action > 0), keyframe[rows.action > 0]


def _keep(ground_truth: Rows, kept: np.ndarray) -> Rows:
  """Empties the other rows: their keyframes stay annotated, so that what is found there is wrong."""
  return ground_truth._replace(action=np.where(kept, ground_truth.action, 0).astype(np.int32))


def _is_in(rows: Rows, keyframes: Set[tuple[str, float]]) -> np.ndarray:
  video, timestamp = zip(*keyframes, strict=True)
  nothing = np.zeros(len(video))
  listed = Rows(np.array(video, object), np.array(timestamp, float), np.zeros((len(video), 4)), nothing, nothing)
  return keyframe_ids(listed, rows)[1] >= 0


def _missed_classes(matched: Match, claimed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Gives the confused detections on a person, in their order, the classes that are missed on it.

  Returns:
    Indices of detections, and for each the annotation that it gets.
  """
  missed = np.flatnonzero(~claimed)
  missed = missed[np.argsort(matched.person[missed], kind="stable")]
  confused = np.flatnonzero(matched.kind == _CONFUSION)
  confused = confused[np.argsort(matched.nearest[confused], kind="stable")]
  nearest = matched.nearest[confused]
  begin, end = (np.searchsorted(matched.person[missed], nearest, side) for side in ("left", "right"))
  label = begin + _occurrence(nearest)
  lucky = label < end
  return confused[lucky], missed[label[lucky]]


def _count_kinds(matched: Match, shown: np.ndarray) -> dict[str, dict[int, int]]:
  classes = list(matched.num_truth)
  counts = {}
  for index, name in enumerate(KINDS):
    count = np.bincount(matched.found.action[shown & (matched.kind == index)], minlength=max(classes) + 1)
    counts[name] = {c: int(count[c]) for c in classes}
  return counts | {"missed": {c: matched.num_truth[c] - counts["correct"][c] for c in classes}}


def _keyframe_scores(matched: Match) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Scores each keyframe that has annotations.

  Returns:
    Keyframes, one annotation of each, and the mean over its classes of the AP within the keyframe.
  """
  num_classes = max(matched.num_truth) + 1
  # A group is a class in a keyframe.
  groups, total = np.unique(matched.truth_keyframe * num_classes + matched.truth.action, return_counts=True)
  group = matched.keyframe * num_classes + matched.found.action
  order = np.lexsort((-matched.found.extra, group))
  rank = _occurrence(group[order]) + 1
  correct = matched.kind[order] == _CORRECT
  group, rank = group[order][correct], rank[correct]
  hits = _occurrence(group) + 1
  precision = hits / rank
  same = group[:-1] == group[1:]
  for _ in range(hits.max(initial=1) - 1):  # the envelope, carried one hit towards the front at a time
    precision[:-1] = np.where(same, np.maximum(precision[:-1], precision[1:]), precision[:-1])
  ap = np.bincount(np.searchsorted(groups, group), precision, len(groups)) / total
  keyframes, member = np.unique(groups // num_classes, return_inverse=True)
  score = np.bincount(member, ap) / np.bincount(member)
  return keyframes, np.unique(matched.truth_keyframe, return_index=True)[1], score


def _at_recalls(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
  """The envelope of a precision-recall curve at 101 recalls; empty for an empty curve."""
  if not recall.any():
    return np.empty(0)
  envelope = np.maximum.accumulate(precision[::-1])[::-1]
  # A recall of 0.07 must be found where 7 of 100 boxes are, whichever way that was rounded.
  return np.append(envelope, 0.0)[np.searchsorted(recall, np.arange(101) / 100 - 1e-12)]


def _distinct(keyframe: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Numbers the boxes; rows that agree in keyframe and coordinates are the same.

  Returns:
    ``[N]`` the first row of each, ``[R]`` number of each row.
  """
  order = np.lexsort((*boxes.T, keyframe))
  new = np.ones(len(order), bool)
  new[1:] = (np.diff(keyframe[order]) != 0) | (boxes[order[1:]] != boxes[order[:-1]]).any(1)
  number = np.empty(len(order), np.int64)
  number[order] = np.cumsum(new) - 1
  return order[new], number


def _occurrence(values: np.ndarray) -> np.ndarray:
  """How often each value came before, in sorted values."""
  new = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
  return np.arange(len(values)) - np.repeat(new, np.diff(new, append=len(values)))


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Concatenates the ranges from each start."""
  return np.arange(count.sum()) + np.repeat(start - (np.cumsum(count) - count), count)


def _area(boxes: np.ndarray) -> np.ndarray:
  return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
