"""Every analysis agrees with cases worked out by hand, or with `frame_map` on rows changed one by one."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

from vad_jax.annotations import Rows, read_ava_csv, read_excluded, read_label_map
from vad_jax.metrics import analysis
from vad_jax.metrics.frame_map import PROTOCOLS, FrameMap, frame_map

_GOLDEN = Path(__file__).parents[1] / "golden/ava_small"
_LABELS = {1: "stand", 2: "sit", 4: "talk"}


def _rows(*rows):
  """Rows from (keyframe, box, class, score); a keyframe is a video and a second in one number."""
  keyframe, boxes, action, extra = zip(*rows, strict=True) if rows else ((), (), (), ())
  return Rows(
    np.array([f"v{k // 100}" for k in keyframe], object),
    np.array([k % 100 for k in keyframe], float),
    np.array(boxes, float).reshape(-1, 4),
    np.array(action, np.int32),
    np.array(extra, float),
  )


@dataclasses.dataclass
class _Data:
  truth: Rows
  found: Rows

  def map(self, truth: Rows | None = None, found: Rows | None = None) -> FrameMap:
    return frame_map(self.truth if truth is None else truth, self.found if found is None else found, _LABELS)


def _random(seed: int, num_keyframes: int = 40) -> _Data:
  """People with several classes each, and detections with every kind of mistake; best score first."""
  rng = np.random.default_rng(seed)
  truth, found = [], []
  for keyframe in range(num_keyframes):
    for person in range(rng.integers(1, 5)):
      x, y = rng.uniform(0, 0.6, 2)
      box = np.round([x, y, x + rng.uniform(0.1, 0.4), y + rng.uniform(0.1, 0.4)], 3)
      classes = rng.choice([1, 2, 4], rng.integers(1, 3), replace=False)
      truth += [(keyframe, box, c, person) for c in classes]
      for _ in range(rng.integers(0, 4)):
        moved = box + rng.normal(0, rng.choice([0.005, 0.05]), 4)
        found += [
          (keyframe, np.sort(moved.reshape(2, 2), 0).ravel(), c, rng.random()) for c in (1, 2, 4)[: rng.integers(4)]
        ]
    found.append((keyframe, [0.9, 0.9, 0.99, 0.99], rng.choice([1, 2, 4]), rng.random()))
  found.sort(key=lambda row: -row[-1])
  return _Data(_rows(*truth), _rows(*found))


def _person(x: float) -> list[float]:
  return [x, 0.0, x + 0.2, 0.5]


def test_each_kind_of_mistake():
  truth = _rows((1, _person(0), 1, 0), (1, _person(0), 2, 0), (1, _person(0.5), 2, 1))
  found = _rows(
    (1, _person(0), 1, 0.9),  # right
    (1, _person(0.01), 1, 0.8),  # again
    (1, _person(0.1), 1, 0.7),  # a third of the union is shared: misplaced
    (1, _person(0.5), 1, 0.6),  # somebody who sits
    (1, _person(0.8), 1, 0.5),  # nobody
    (1, [0.5, 0.3, 0.7, 0.8], 1, 0.4),  # on somebody else, but barely
    (1, _person(0.12), 2, 0.3),  # misplaced: IoU 0.25
    (1, _person(0), 4, 0.2),  # a class that nobody has
    (1, _person(0.19), 1, 0.1),  # barely touches the right one
  )
  matched = analysis.match(truth, found, _LABELS)
  kinds = [analysis.KINDS[kind] for kind in matched.kind]
  assert kinds == [
    *("correct", "duplicate", "localisation", "confusion"),
    *("background", "background", "localisation", "confusion", "background"),
  ]
  result = analysis.errors(matched)
  assert {kind: counts[1] for kind, counts in result.counts.items()} == {
    **{"correct": 1, "localisation": 1, "confusion": 1, "duplicate": 1, "background": 3},
    "missed": 0,
  }
  assert result.counts["missed"] == {1: 0, 2: 2, 4: 0}
  # One annotated box of class 1: only its best detection counts. Class 4 has none.
  assert {kind: sum(counts.values()) for kind, counts in result.best_counts.items()} == {
    **{"correct": 1, "localisation": 1, "confusion": 0, "duplicate": 0, "background": 0},
    "missed": 2,
  }


def test_misplaced_comes_before_confused():
  truth = _rows((1, _person(0), 1, 0), (1, _person(0.1), 2, 1))
  assert analysis.match(truth, _rows((1, _person(0.1), 1, 0.5)), _LABELS).kind.tolist() == [1]
  assert analysis.match(truth, _rows((1, _person(0.1), 1, 0.5)), _LABELS, iou=0.3).kind.tolist() == [0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("with_excluded", [False, True])
def test_agrees_with_every_protocol(protocol, with_excluded):
  label_map = read_label_map(_GOLDEN / "labelmap.pbtxt")
  excluded = read_excluded(_GOLDEN / "excluded.csv") if with_excluded else frozenset()
  truth, found = (read_ava_csv(_GOLDEN / name) for name in ("gt.csv", "results.csv"))
  result = analysis.analyse(truth, found, label_map, protocol=protocol, excluded=excluded)
  scores, counts = result.frame_map, result.errors.counts
  assert result.by_iou[0.5] == result.oracle.detections == scores.mean_ap
  assert counts["correct"] == scores.num_true_positives
  for index in label_map:
    assert sum(counts[kind][index] for kind in analysis.KINDS) == scores.num_detections[index]
    assert counts["correct"][index] + counts["missed"][index] == scores.num_ground_truth[index]
    best = sum(result.errors.best_counts[kind][index] for kind in analysis.KINDS)
    assert best == min(scores.num_detections[index], scores.num_ground_truth[index])
  assert all(gain >= -1e-12 for gain in result.errors.gain.values())


def test_gain_is_that_of_mended_rows():
  for seed in range(5):
    data = _random(seed)
    matched = analysis.match(data.truth, data.found, _LABELS)
    # Both are in the order of the files here, so that rows can be changed one by one.
    truth, found = matched.truth, matched.found
    gain, base = analysis.errors(matched).gain, data.map().mean_ap
    claimed = np.zeros(len(truth.action), bool)
    claimed[matched.box[matched.kind == 0]] = True

    for kind in ("duplicate", "background"):
      kept = matched.kind != analysis.KINDS.index(kind)
      assert data.map(found=found.select(kept)).mean_ap - base == pytest.approx(gain[kind], abs=1e-12)

    boxes, kept, taken = found.boxes.copy(), np.ones(len(found.action), bool), claimed.copy()
    for i in np.argsort(-found.extra):
      if matched.kind[i] == analysis.KINDS.index("localisation"):
        kept[i] = not taken[matched.box[i]]
        taken[matched.box[i]] = True
        boxes[i] = truth.boxes[matched.box[i]]
    assert data.map(found=found._replace(boxes=boxes).select(kept)).mean_ap - base == pytest.approx(
      gain["localisation"]
    )

    action, boxes = found.action.copy(), found.boxes.copy()
    kept, taken = np.ones(len(found.action), bool), claimed.copy()
    for i in np.argsort(-found.extra):
      if matched.kind[i] == analysis.KINDS.index("confusion"):
        free = np.flatnonzero((matched.person == matched.nearest[i]) & ~taken)
        kept[i] = len(free) > 0
        if len(free):
          action[i] = truth.action[free[0]]
          boxes[i] = truth.boxes[free[0]]  # else it could lie better on another person of this class
          taken[free[0]] = True
    mended = found._replace(action=action, boxes=boxes).select(kept)
    assert data.map(found=mended).mean_ap - base == pytest.approx(gain["confusion"], abs=1e-12)

    asked = truth._replace(action=np.where(claimed, truth.action, 0))
    assert data.map(truth=asked).mean_ap - base == pytest.approx(gain["missed"], abs=1e-12)
    assert min(gain.values()) > 0


def test_by_area():
  data = _random(0)
  perfect = data.truth._replace(extra=np.linspace(0.1, 0.9, len(data.truth.action)))
  subsets = analysis.by_area(data.truth, perfect, lambda truth, found: data.map(truth, found))
  assert len(subsets) == 5
  assert [subset.mean_ap for subset in subsets] == [1.0] * 5
  people = len(np.unique(np.column_stack([data.truth.timestamp, data.truth.boxes]), axis=0))
  assert sum(subset.num_boxes for subset in subsets) == people
  assert max(subset.num_boxes for subset in subsets) - min(subset.num_boxes for subset in subsets) <= 1


def test_what_is_found_in_another_bin_is_wrong():
  small, large = [0, 0, 0.1, 0.1], [0, 0, 0.5, 0.5]
  truth = _rows((1, small, 1, 0), (2, large, 1, 0), (3, large, 1, 0))
  # A small box where only a large one is annotated: the keyframe counts for small people nevertheless.
  found = _rows((2, [0.8, 0.8, 0.9, 0.9], 1, 0.9), (1, small, 1, 0.8), (2, large, 1, 0.7), (3, large, 1, 0.6))
  first, second = analysis.by_area(truth, found, lambda truth, found: frame_map(truth, found, _LABELS))
  assert (first.name, second.name) == ("0–25 %", "25–100 %")
  assert (first.mean_ap, second.mean_ap) == (0.5, 1.0)
  assert (first.num_boxes, second.num_boxes, second.num_keyframes) == (1, 2, 2)


def test_by_actors():
  data = _random(1)
  people = {}
  for second, box in zip(data.truth.timestamp, data.truth.boxes, strict=True):
    people.setdefault(second, set()).add(tuple(box))
  count = {second: len(boxes) for second, boxes in people.items()}
  subsets = analysis.by_actors(data.truth, data.found, lambda truth, found: data.map(truth, found))
  assert [subset.name for subset in subsets] == ["1", "2", "3", "4"]
  for number, subset in enumerate(subsets, 1):
    truth, found = (
      rows.select(np.array([count[second] == number for second in rows.timestamp])) for rows in (data.truth, data.found)
    )
    assert subset.mean_ap == data.map(truth, found).mean_ap
    assert subset.num_keyframes == sum(c == number for c in count.values())
    assert subset.num_boxes == number * subset.num_keyframes


def test_what_is_found_on_keyframes_without_annotation_belongs_to_no_group():
  truth = _rows((1, _person(0), 1, 0))
  found = _rows((2, _person(0), 1, 0.9), (1, _person(0), 1, 0.8))
  score = functools.partial(frame_map, label_map=_LABELS, protocol="slowfast")
  assert score(truth, found).mean_ap == 0.5
  assert [subset.mean_ap for subset in analysis.by_actors(truth, found, score)] == [1.0]


def test_crowds_are_one_group():
  truth = _rows(*((k, _person(0.1 * i), 1, i) for k in (1, 2) for i in range(5 + k)))
  (subset,) = analysis.by_actors(truth, truth, lambda truth, found: frame_map(truth, found, _LABELS))
  assert (subset.name, subset.num_boxes, subset.num_keyframes) == ("6 or more", 13, 2)


def test_oracle():
  truth = _rows((1, _person(0), 1, 0), (1, _person(0), 2, 0), (1, _person(0.5), 4, 1))
  found = _rows((1, _person(0.1), 1, 0.9), (1, _person(0.1), 2, 0.8), (1, _person(0.5), 1, 0.7))
  nowhere = _rows((1, _person(0.8), 4, 0.95))
  found = Rows(*map(np.concatenate, zip(nowhere, found, strict=True)))
  result = analysis.oracle(truth, found, lambda truth, found: frame_map(truth, found, _LABELS))
  assert result.detections == 0
  assert result.boxes == pytest.approx(2 / 3)  # stand, sit; nobody is found to talk
  assert result.labels == pytest.approx(0.5 / 3)  # talk, behind the box on nobody, which stays wrong
  assert result.both == pytest.approx(2.5 / 3)


def test_oracle_of_labels_gives_missed_classes_the_best_score():
  truth = _rows((1, _person(0), 1, 0), (1, _person(0), 2, 0), (2, _person(0), 2, 0))
  found = _rows((1, _person(0), 4, 0.9), (1, _person(0), 1, 0.3), (2, _person(0), 1, 0.5), (9, _person(0), 1, 0.99))
  seen = []
  analysis.oracle(truth, found, lambda truth, found: seen.append(found) or frame_map(truth, found, _LABELS))
  labelled = seen[2]
  rows = sorted(zip(labelled.timestamp.tolist(), labelled.action.tolist(), labelled.extra.tolist(), strict=True))
  assert rows == [(1, 1, 0.9), (1, 2, 0.9), (2, 2, 0.5), (9, 1, 0.99)]


def test_people_without_a_scored_class_and_keyframes_without_people():
  # The first row of the first person is of no scored class, the second person has no other, and keyframe 2 nobody.
  truth = _rows((1, _person(0), 3, 0), (1, _person(0), 1, 0), (1, _person(0.5), 3, 1), (2, [np.nan] * 4, 0, 1))
  found = _rows((2, _person(0), 1, 0.9), (1, _person(0), 1, 0.8))
  result = analysis.analyse(truth, found, _LABELS)
  assert [(subset.name, subset.num_boxes, subset.mean_ap) for subset in result.by_actors] == [("1", 1, 1.0)]
  assert [(subset.name, subset.num_boxes, subset.mean_ap) for subset in result.by_area] == [("0–100 %", 1, 0.5)]
  assert result.oracle == (0.5, 0.5, 0.5, 0.5)  # nobody takes away what was found on keyframe 2


@pytest.mark.parametrize("action", [1, 2, 3, 4])
def test_any_class_may_come_first(action):
  label_map = dict.fromkeys(range(1, 5), "")
  truth = _rows((1, _person(0), action, 0), (2, _person(0), action, 0))
  found = _rows((9, _person(0), action, 0.9), (9, _person(0.1), action, 0.8), (1, _person(0), action, 0.7))
  result = analysis.analyse(truth, found, label_map, protocol="slowfast")
  assert result.frame_map.mean_ap == pytest.approx(1 / 6)
  assert [example.score for example in result.best] == [1.0]


def test_confusion():
  truth = _rows(
    (1, _person(0), 1, 0), (1, _person(0), 4, 0), (2, _person(0), 2, 0), (3, _person(0), 2, 0), (4, _person(0), 2, 0)
  )
  found = _rows(
    (1, _person(0), 2, 0.9),  # sit instead of stand; talk is found, so that it is not in its place
    (1, _person(0), 4, 0.8),
    (2, _person(0), 2, 0.7),
    (3, _person(0), 1, 0.6),  # stand instead of sit
    (4, _person(0), 1, 0.5),  # the same, but there is one annotation of standing and a better detection of it
    (4, _person(0.8), 2, 0.4),  # nobody
  )
  result = analysis.confusion(analysis.match(truth, found, _LABELS))
  assert result.classes.tolist() == [1, 2, 4]
  assert result.num_people.tolist() == [1, 3, 1]
  assert result.matrix.tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_keyframe_scores_are_those_of_each_keyframe_alone():
  data = _random(2)
  matched = analysis.match(data.truth, data.found, _LABELS)
  examples = analysis.rank_keyframes(matched, 1000, best=True) + analysis.rank_keyframes(matched, 1000, best=False)
  assert {example.timestamp for example in examples} == set(range(40))
  for example in examples:
    truth, found = (rows.select(rows.timestamp == example.timestamp) for rows in (data.truth, data.found))
    alone = data.map(truth, found)
    assert example.score == pytest.approx(alone.mean_ap, abs=1e-12)
    assert sorted(example.ground_truth.action) == sorted(truth.action)
    assert np.count_nonzero(~np.isnan(example.found_score)) == sum(alone.num_true_positives.values())
    right = example.kind == 0
    assert sorted(example.detections.extra[right]) == sorted(example.found_score[~np.isnan(example.found_score)])


def test_order_of_keyframes():
  # Video 1 has two perfect keyframes, the second with more people; video 2 a good one and a bad one; 3 a bad one.
  truth = _rows(
    *((101, _person(0), 1, 0), (102, _person(0), 1, 0), (102, _person(0.5), 1, 1)),
    *((201, _person(0), 1, 0), (202, _person(0), 1, 0), (301, _person(0), 1, 0)),
  )
  found = _rows(
    *((101, _person(0), 1, 0.9), (102, _person(0), 1, 0.9), (102, _person(0.5), 1, 0.9)),
    *((201, _person(0.8), 1, 0.9), (201, _person(0), 1, 0.8), (301, _person(0.8), 1, 0.9)),
  )
  matched = analysis.match(truth, found, _LABELS)

  def ranked(count, best):
    return [(e.video, e.timestamp, e.score) for e in analysis.rank_keyframes(matched, count, best=best)]

  assert ranked(2, best=True) == [("v1", 2, 1), ("v2", 1, 0.5)]
  assert ranked(9, best=True) == [("v1", 2, 1), ("v1", 1, 1), ("v2", 1, 0.5)]
  assert ranked(9, best=False) == [("v2", 2, 0), ("v3", 1, 0), ("v2", 1, 0.5)]


def test_compare():
  before, after = (_random(3).map(found=_random(3).found.select(slice(0, n))) for n in (60, None))
  changes = analysis.compare(before, after)
  assert [change.gain for change in changes] == sorted((after.ap[c] - before.ap[c] for c in (1, 2, 4)), reverse=True)
  assert {change.action: change.after for change in changes} == after.ap
  assert all(change.before == before.ap[change.action] for change in changes)


def test_precision_at_recalls():
  truth = _rows(*((k, _person(0), 1, 0) for k in range(4)))
  found = _rows((0, _person(0), 1, 0.9), (1, _person(0.7), 1, 0.8), (1, _person(0), 1, 0.7))
  precision = analysis.analyse(truth, found, _LABELS).precision
  assert precision[1].tolist() == [1.0] * 26 + [2 / 3] * 25 + [0.0] * 50
  assert not len(precision[2])


def test_nothing_found():
  data = _random(4)
  result = analysis.analyse(data.truth, data.found.select(slice(0, 0)), _LABELS)
  assert result.errors.gain == {"localisation": 0, "confusion": 0, "duplicate": 0, "background": 0, "missed": 1}
  assert result.oracle == (0, 0, 0, 0)
  assert not result.best
  assert len(result.worst) == 6


def test_everything_excluded():
  data = _random(4, num_keyframes=1)
  with pytest.raises(ValueError, match="every annotation is on an excluded keyframe"):
    analysis.analyse(data.truth, data.found, _LABELS, excluded={("v0", 0.0)})
