"""Frame-mAP against results of the official evaluator, a plain second implementation, and by hand."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import plain_frame_map
from vad_jax.annotations import Rows, read_ava_csv, read_excluded, read_label_map
from vad_jax.metrics import frame_map as module
from vad_jax.metrics.frame_map import (
  SplitKeyframeError,
  average_precision,
  frame_map,
  frame_maps,
  keyframe_ids,
  person_ap,
)
from vad_jax.metrics.protocols import PROTOCOLS

_GOLDEN = Path(__file__).parents[1] / "golden" / "ava_small"
_EXPECTED = json.loads((_GOLDEN / "expected.json").read_text())["expected"]
_LABELS = {1: "stand", 2: "walk", 3: "run"}
_LEFT, _RIGHT = (0.0, 0.0, 0.4, 1.0), (0.5, 0.0, 0.9, 1.0)


def _rows(*rows):
  """Rows of (video, time, box or None, action, extra)."""
  video, time, boxes, action, extra = zip(*rows, strict=True) if rows else ((),) * 5
  return Rows(
    np.array(video, object),
    np.array(time, np.float64),
    np.array([[np.nan] * 4 if box is None else box for box in boxes], np.float64).reshape(-1, 4),
    np.array(action, np.int32),
    np.array(extra, np.float64),
  )


_EXCLUDED = read_excluded(_GOLDEN / "excluded.csv")


def _without_excluded(rows):
  return rows.select(np.array([key not in _EXCLUDED for key in zip(rows.video, rows.timestamp, strict=True)]))


# Variant of the expected results: protocol, annotations, whether they come without the excluded keyframes, and
# whether the evaluator knows of these.
_VARIANTS = {
  "official_gt.csv": ("activitynet", "gt.csv", False, False),
  "official_gt_minus_excluded": ("activitynet", "gt.csv", True, False),
  "official_gt_with_empty_rows.csv": ("activitynet", "gt_with_empty_rows.csv", False, False),
  "slowfast_excluded": ("slowfast", "gt.csv", False, True),
  "slowfast_excluded_presorted": ("slowfast", "gt.csv", False, True),
  "mmaction2_excluded": ("mmaction2", "gt.csv", False, True),
  "mmaction2_gt_minus_excluded": ("mmaction2", "gt.csv", True, False),
}


@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("detections", ["results.csv", "results_clean.csv"])
def test_matches_the_evaluators_in_use(detections, variant):
  protocol, annotations, without, knows = _VARIANTS[variant]
  label_map = read_label_map(_GOLDEN / "labelmap.pbtxt")
  truth, found = read_ava_csv(_GOLDEN / annotations), read_ava_csv(_GOLDEN / detections)
  if without:
    truth = _without_excluded(truth)
  if variant.endswith("presorted"):
    found = found.select(np.argsort(-found.extra, kind="stable"))
  excluded = _EXCLUDED if knows else frozenset()
  ious = [float(iou) for iou in _EXPECTED[detections]]
  results = frame_maps(truth, found, label_map, ious=ious, protocol=protocol, excluded=excluded)
  for result, by_variant in zip(results, _EXPECTED[detections].values(), strict=True):
    expected = by_variant[variant]
    assert result.mean_ap == pytest.approx(expected["mAP"], abs=1e-12)
    for index in label_map:
      ap = expected["ap"].get(str(index))
      assert result.ap[index] == pytest.approx(np.nan if ap is None else ap, abs=1e-12, nan_ok=True), index
    assert sum(np.isfinite(list(result.ap.values()))) == expected["n_classes_in_mean"]
    for counts, key in (
      (result.num_ground_truth, "num_gt"),
      (result.num_detections, "num_det_scored"),
      (result.num_true_positives, "num_tp"),
    ):
      assert key not in expected or counts == {index: expected[key].get(str(index), 0) for index in label_map}
    np.testing.assert_equal(
      frame_map(truth, found, label_map, iou=result.iou, protocol=protocol, excluded=excluded).ap, result.ap
    )


def _plain_ap(truth, found, **kwargs):
  rows = (
    [*zip(rows.video, rows.timestamp, rows.boxes, rows.action, rows.extra, strict=True)] for rows in (truth, found)
  )
  return plain_frame_map.frame_ap(*rows, _LABELS.keys(), **kwargs)


@st.composite
def _scenes(draw):
  """Ground truth and detections with many ties, duplicates, crowded and unknown keyframes."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  num_truth, num_found = draw(st.integers(1, 25)), draw(st.integers(0, 150))
  levels = draw(st.sampled_from([2, 5, 1000]))

  def rows(count, num_videos, extra):
    corner = rng.integers(0, 4, (count, 2)) / 8  # exact in binary, so that overlaps tie as well
    side = rng.integers(extra is None, 4, (count, 2)) / 8
    return Rows(
      np.array([f"video{i}" for i in rng.integers(0, num_videos, count)], object),
      rng.integers(1, 3, count).astype(np.float64),
      np.concatenate([corner, corner + side], axis=1),
      rng.integers(1, 5, count).astype(np.int32),
      rng.integers(0, 3, count).astype(np.float64) if extra is None else extra,
    )

  truth = rows(num_truth, 2, None)
  truth.action[0] = 1
  return truth, rows(num_found, 3, rng.integers(0, levels, num_found) / levels)


_PROTOCOL = st.sampled_from(sorted(PROTOCOLS))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_scenes(), _PROTOCOL, st.sampled_from([1, 8, 50]), st.sampled_from([0.2, 0.5]), st.booleans())
def test_matches_a_plain_implementation(scene, protocol, limit, iou, exclude):
  truth, found = scene
  excluded = {("video0", 1.0), ("video2", 2.0), ("nowhere", 1.0)} if exclude else set()
  kwargs = {"iou": iou, "protocol": protocol, "excluded": excluded}
  with mock.patch.object(module, "MAX_ROWS", limit):
    expected = _plain_ap(truth, found, max_rows=limit, **kwargs)
    result = frame_map(truth, found, _LABELS, **kwargs)
  np.testing.assert_allclose([result.ap[index] for index in _LABELS], list(expected.values()), atol=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(_scenes(), _PROTOCOL, st.randoms(use_true_random=False))
def test_order_of_rows_is_irrelevant_without_ties(scene, protocol, random):
  truth, found = scene
  found.extra[:] = np.random.default_rng(0).permutation(len(found.extra))
  order = random.sample(range(len(found.extra)), len(found.extra))
  if protocol == "slowfast":  # inside a keyframe it is relevant
    place = {keyframe: random.random() for keyframe in zip(found.video, found.timestamp, strict=True)}
    order = sorted(range(len(order)), key=lambda row: place[found.video[row], found.timestamp[row]])
  shuffled = found.select(np.array(order, np.int64))
  results = [frame_map(truth, rows, _LABELS, protocol=protocol).ap for rows in (shuffled, found)]
  np.testing.assert_equal(*results)
  assert person_ap(truth, shuffled) == person_ap(truth, found)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(_scenes(), _PROTOCOL, st.integers(1, 3), st.sampled_from([-1.0, 0.35, 2.0]))
def test_another_false_positive_never_helps(scene, protocol, action, score):
  truth, found = scene
  found = found.select(np.arange(min(40, len(found.extra))))  # below the limit of a keyframe
  wrong = _rows((truth.video[0], truth.timestamp[0], (0.98, 0.98, 1.0, 1.0), action, score))
  more = Rows(*(np.concatenate(columns) for columns in zip(found, wrong, strict=True)))
  before, after = (frame_map(truth, rows, _LABELS, protocol=protocol).ap for rows in (found, more))
  for index in _LABELS:
    counted_before = before[index] if np.isfinite(before[index]) else 0  # mmaction2 counts detected classes only
    assert np.isnan(after[index]) or after[index] <= counted_before + 1e-12
    if score == -1:  # at the end of the ranking it does not hurt either
      assert np.isnan(after[index]) or after[index] == counted_before
  assert person_ap(truth, more) <= person_ap(truth, found) + 1e-12


@settings(max_examples=50, deadline=None, derandomize=True)
@given(_scenes(), _PROTOCOL)
def test_perfect_detections_give_one(scene, protocol):
  def once(*columns):
    return np.unique(np.column_stack([truth.timestamp, truth.boxes, *columns]), axis=0, return_index=True)[1]

  truth = scene[0].select(scene[0].video == scene[0].video[0])
  truth = truth.select(once(truth.action))
  found = truth._replace(extra=np.linspace(0, 1, len(truth.extra)))
  assert frame_map(truth, found, _LABELS, protocol=protocol).mean_ap == 1
  assert person_ap(truth, found.select(once())) == 1


def _parts(rows, size):
  """Some keyframes at a time, as a file is read whose keyframes stand together."""
  for begin in range(0, len(rows.extra), size):
    yield rows.select(np.arange(begin, min(begin + size, len(rows.extra))))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parts_give_what_the_whole_gives(protocol):
  label_map = read_label_map(_GOLDEN / "labelmap.pbtxt")
  truth, found = read_ava_csv(_GOLDEN / "gt.csv"), read_ava_csv(_GOLDEN / "results.csv")
  keyframe, _ = keyframe_ids(found, found)
  if protocol == "mmaction2":  # which wants them in the order of the annotations
    known, rank = keyframe_ids(truth.select(np.isin(truth.action, list(label_map))), found)
    keyframe = np.where(rank >= 0, rank, keyframe + known.max() + 1)
  order = np.argsort(keyframe, kind="stable")
  whole = found.select(order)
  cuts = np.flatnonzero(np.diff(keyframe[order])) + 1
  parts = [whole.select(index) for index in np.split(np.arange(len(order)), cuts[::3])]
  kwargs = {"label_map": label_map, "ious": [0.5, 0.75], "protocol": protocol, "excluded": _EXCLUDED}
  for ours, theirs in zip(frame_maps(truth, iter(parts), **kwargs), frame_maps(truth, found, **kwargs), strict=True):
    np.testing.assert_equal(ours.ap, theirs.ap)
    assert ours.tally == theirs.tally
  with pytest.raises(SplitKeyframeError):
    frame_maps(truth, _parts(found, 100), **kwargs)
  if protocol == "mmaction2":
    with pytest.raises(SplitKeyframeError):
      frame_maps(truth, iter(parts[::-1]), **kwargs)


def test_counts_what_lets_protocols_differ():
  full, thin = (0, 0, 1, 1), (0.5, 0, 0.5, 1)
  truth = _rows(
    ("a", 1, full, 1, 0),
    ("a", 1, full, 1, 1),
    ("a", 1, full, 2, 0),
    ("a", 2, None, 0, 1),
    ("a", 2.5, full, 1, 0),
    ("a", 3, full, 9, 0),
    ("b", 1, full, 2, 0),
  )
  found = _rows(
    ("a", 1, full, 1, 0.5),
    ("a", 1, full, 1, 0.6),  # better than the one before
    ("a", 1, thin, 1, 0.5),  # the score of the first, and no area
    ("a", 1, full, 1, 0.5),  # the first again
    ("a", 1, full, 9, 0.5),  # no scored class
    ("a", 3, full, 1, 0.1),  # annotated, but no scored class
    ("b", 1, full, 1, 0.2),  # excluded
    ("c", 1, full, 1, 0.3),  # an unknown video
    *[("a", 2.5, full, 3, 0.9 - score / 100) for score in range(52)],
  )
  result = frame_map(truth, found, _LABELS, excluded={("b", 1.0)})
  assert {kind: number for kind, number in result.tally.items() if number} == {
    "keyframe_rows": 1,
    "fractions": 1,
    "other_annotations": 1,
    "excluded_annotations": 1,
    "other_classes": 1,
    "unlabelled": 1,
    "excluded": 1,
    "unannotated": 1,
    "unknown_videos": 1,
    "empty": 1,
    "equal_in_keyframe": 2,
    "duplicates": 1,
    "unsorted": 1,
    "equal_scores": 1,
    "beyond_limit": 2,
    "repeated_annotations": 1,
    "undetected": 1,
  }
  assert len(result.differences()) == 17
  assert result.num_keyframes == 4
  assert result.num_boxes == 2
  missed = frame_map(truth, _rows(), _LABELS)
  assert "annotated classes without detection (AP 0, but left out of the mean by mmaction2): 2" in missed.differences()
  everything = frame_map(truth.select(np.array([0])), _rows(("a", 1, full, 1, 0.5)), _LABELS)
  assert everything.differences() == []


def test_protocols_by_hand():
  truth = _rows(("a", 1, _LEFT, 1, 0), ("a", 1, _RIGHT, 2, 0), ("b", 1, _LEFT, 1, 0))
  found = _rows(
    ("a", 1, (0, 0, 0.4, 0.9), 1, 0.5),  # in slowfast it claims the box, and the better one is wrong
    ("a", 1, _LEFT, 1, 0.9),
    ("c", 1, _LEFT, 1, 0.95),  # in slowfast it is wrong, for the others it does not exist
  )
  ap = {name: frame_map(truth, found, _LABELS, protocol=name, excluded={("b", 1.0)}).ap for name in PROTOCOLS}
  assert ap["activitynet"] == pytest.approx({1: 1, 2: 0, 3: np.nan}, nan_ok=True)
  assert ap["slowfast"] == pytest.approx({1: 1 / 3, 2: 0, 3: np.nan}, nan_ok=True)
  assert ap["mmaction2"] == pytest.approx({1: 1 / 2, 2: np.nan, 3: np.nan}, nan_ok=True)  # the excluded box is missed


def test_nothing_counts_for_mmaction2():
  assert np.isnan(frame_map(_rows(("a", 1, _LEFT, 1, 0)), _rows(), _LABELS, protocol="mmaction2").mean_ap)


def test_mmaction2_rounds_to_single_precision():
  truth = _rows(("a", 1, (0, 0, 1, 1), 1, 0))
  found = _rows(("a", 1, (0, 0, 0.5 - 1e-9, 1), 1, 0.9))
  assert frame_map(truth, found, _LABELS).mean_ap == 0
  assert frame_map(truth, found, _LABELS, protocol="mmaction2").mean_ap == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rounds_at_the_threshold_as_evaluators_do(protocol):
  rng = np.random.default_rng(0)
  corner, size = rng.integers(0, 500, (500, 2)) / 1000, rng.integers(1, 250, (500, 2)) / 500
  boxes = np.concatenate([corner, corner + size], axis=1).round(3)
  halves = np.concatenate([corner, corner + size * [0.5, 1]], axis=1).round(3)  # IoU 1/2, but for rounding
  truth = _rows(*[("a", time, box, 1, 0) for time, box in enumerate(boxes)])
  found = _rows(*[("a", time, box, 1, time) for time, box in enumerate(halves)])
  expected = _plain_ap(truth, found, protocol=protocol)
  assert 0.1 < expected[1] < 0.9
  assert frame_map(truth, found, _LABELS, protocol=protocol).ap[1] == pytest.approx(expected[1], abs=1e-12)


def test_inverted_detections():
  truth, found = _rows(("a", 1, _LEFT, 1, 0)), _rows(("clip", 1, _LEFT, 1, 1), ("a", 1, _LEFT[::-1], 1, 0.9))
  assert frame_map(truth, found, _LABELS).tally["empty"] == 1
  unscored = found.select(np.array([1, 1]))._replace(
    video=np.array(["a", "b"], object), action=np.array([9, 1], np.int32)
  )
  assert np.isnan(frame_map(truth, unscored, _LABELS, protocol="mmaction2").mean_ap)
  with pytest.raises(ValueError, match=r"detection in row 2 \(a at 1 s\).*inverted"):
    frame_map(truth, _parts(found, 1), _LABELS, protocol="mmaction2")


def test_unknown_protocol():
  rows = _rows(("a", 1, _LEFT, 1, 0))
  with pytest.raises(ValueError, match="unknown protocol 'ava': choose one of activitynet, slowfast, mmaction2"):
    frame_map(rows, rows, _LABELS, protocol="ava")


def test_by_hand():
  truth = _rows(("a", 1, _LEFT, 1, 0), ("a", 1, _RIGHT, 1, 1), ("a", 2, _LEFT, 2, 0))
  found = _rows(
    ("a", 1, _LEFT, 1, 0.9),  # right
    ("a", 1, _LEFT, 1, 0.8),  # twice: wrong
    ("a", 1, _RIGHT, 1, 0.7),  # right
    ("b", 1, _LEFT, 1, 0.95),  # nothing is annotated there: not counted
    ("a", 1.0000001, _LEFT, 9, 0.99),  # not a class
  )
  result = frame_map(truth, found, _LABELS)
  assert result.ap[1] == pytest.approx((1 + 2 / 3) / 2)
  assert result.ap[2] == 0
  assert np.isnan(result.ap[3])
  assert result.mean_ap == pytest.approx((1 + 2 / 3) / 4)
  assert result.num_keyframes == 2
  np.testing.assert_allclose(result.curves[1].precision, [1, 1 / 2, 2 / 3])
  np.testing.assert_allclose(result.curves[1].recall, [1 / 2, 1 / 2, 1])
  np.testing.assert_allclose(result.curves[1].score, [0.9, 0.8, 0.7])


def test_iou_is_inclusive():
  truth = _rows(("a", 1, (0, 0, 1, 1), 1, 0))
  found = _rows(("a", 1, (0, 0, 0.5, 1), 1, 0.9))
  assert frame_map(truth, found, _LABELS, iou=0.5).mean_ap == 1
  assert frame_map(truth, found, _LABELS, iou=0.5001).mean_ap == 0


def test_taken_box_is_no_second_choice():
  truth = _rows(("a", 1, (0, 0, 1, 1), 1, 0), ("a", 1, (0, 0, 1, 0.8), 1, 1))
  found = _rows(("a", 1, (0, 0, 1, 1), 1, 0.9), ("a", 1, (0, 0, 1, 0.95), 1, 0.8))
  assert frame_map(truth, found, _LABELS).num_true_positives[1] == 1


def test_empty_keyframe_holds_false_positives():
  truth = _rows(("a", 1, _LEFT, 1, 0), ("a", 2, None, 0, 1))
  found = _rows(("a", 2, _LEFT, 1, 0.9), ("a", 1, _LEFT, 1, 0.8))
  assert frame_map(truth, found, _LABELS).mean_ap == 0.5
  assert frame_map(truth.select(np.array([0])), found, _LABELS).mean_ap == 1
  assert person_ap(truth, found) == 0.5


def test_fifty_rows_of_a_keyframe_count():
  truth = _rows(("a", 1, _LEFT, 1, 0))
  crowd = [("a", 1, _RIGHT, 2, 0.9)] * 50
  assert frame_map(truth, _rows(*crowd[1:], ("a", 1, _LEFT, 1, 0.5)), _LABELS).mean_ap == 1
  assert frame_map(truth, _rows(*crowd, ("a", 1, _LEFT, 1, 0.5)), _LABELS).mean_ap == 0
  assert person_ap(truth, _rows(*crowd, ("a", 1, _LEFT, 1, 0.5))) == pytest.approx(1 / 51)


def test_boxes_without_area_use_up_the_limit_and_are_dropped():
  truth = _rows(("a", 1, _LEFT, 1, 0))
  thin = [("a", 1, (0.3, 0, 0.3, 1), 1, 0.9)]
  result = frame_map(truth, _rows(*thin, ("a", 1, _LEFT, 1, 0.5)), _LABELS)
  assert (result.mean_ap, result.num_detections[1]) == (1, 1)
  assert frame_map(truth, _rows(*thin * 50, ("a", 1, _LEFT, 1, 0.5)), _LABELS).mean_ap == 0


def test_no_detections():
  truth = _rows(("a", 1, _LEFT, 1, 0))
  assert frame_map(truth, _rows(), _LABELS).mean_ap == 0
  assert person_ap(truth, _rows()) == 0


def test_float32_boxes_and_blocks(monkeypatch):
  rng = np.random.default_rng(0)
  label_map = read_label_map(_GOLDEN / "labelmap.pbtxt")
  truth, found = read_ava_csv(_GOLDEN / "gt.csv"), read_ava_csv(_GOLDEN / "results.csv")
  found = found.select(rng.permutation(len(found.extra)))
  whole = frame_map(truth, found, label_map)
  monkeypatch.setattr(module, "_CHUNK", 7)
  np.testing.assert_equal(frame_map(truth, found, label_map).ap, whole.ap)
  single = found._replace(boxes=found.boxes.astype(np.float32))
  assert frame_map(truth, single, label_map).mean_ap == pytest.approx(whole.mean_ap, abs=0.02)


def test_person_ap_by_hand():
  # Two rows of one person, one of another.
  truth = _rows(("a", 1, _LEFT, 1, 0), ("a", 1, _LEFT, 2, 0), ("a", 1, _RIGHT, 1, 1), ("a", 2, _LEFT, 70, 0))
  found = _rows(("a", 1, _LEFT, 1, 0.9), ("a", 1, (0, 0, 0.1, 0.1), 1, 0.8), ("a", 2, _LEFT, 1, 0.7))
  assert person_ap(truth, found) == pytest.approx((1 + 2 / 3) / 3)
  assert person_ap(truth, found, iou=1.0) == pytest.approx((1 + 2 / 3) / 3)


def test_average_precision_takes_the_envelope():
  precision, recall = np.array([0.0, 0.5, 1 / 3, 0.5]), np.array([0, 0.5, 0.5, 1])
  assert average_precision(precision, recall) == 0.5
  assert average_precision(np.zeros(0), np.zeros(0)) == 0


@pytest.mark.parametrize(
  ("truth", "found", "complaint"),
  [
    (
      ("a", 1, _LEFT, 1, 0),
      ("clip", 7, _LEFT, 1, np.nan),
      r"detection in row 1 \(clip at 7 s\): the score is NaN",
    ),
    (
      ("clip", 7, (0.5, 0, 0.4, 1), 1, 0),
      ("a", 1, _LEFT, 1, 1),
      r"annotation in row 1 \(clip at 7 s\).*inverted",
    ),
    (("a", 1, _LEFT, 70, 0), ("a", 1, _LEFT, 1, 1), "no annotation has a class of the label map"),
    (("a", 1, None, 0, 0), ("a", 1, _LEFT, 1, 1), "no annotation has a class of the label map"),
  ],
)
def test_bad_input_is_named(truth, found, complaint):
  with pytest.raises(ValueError, match=complaint):
    frame_map(_rows(truth), _rows(found), _LABELS)


def test_bad_iou():
  rows = _rows(("a", 1, _LEFT, 1, 0))
  for iou in (0, 50, np.nan):
    with pytest.raises(ValueError, match="iou is"):
      frame_map(rows, rows, _LABELS, iou=iou)
    with pytest.raises(ValueError, match="iou is"):
      person_ap(rows, rows, iou=iou)


def test_person_ap_without_people():
  with pytest.raises(ValueError, match="no annotation holds a box"):
    person_ap(_rows(("a", 1, None, 0, 1)), _rows())
