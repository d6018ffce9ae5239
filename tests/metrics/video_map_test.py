"""Frame-mAP and video-mAP of tube data sets against the published evaluators, a plain implementation, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import golden_files
from tests.metrics.linking_test import read_golden
from vad_jax.metrics.video_map import IOUS, mean_over_splits, video_map
from vad_jax.tubes import Tube, TubeDetections, TubeGroundTruth, Video, read_detections, read_ground_truth

_RULES = [("act", None), ("class_query", "jhmdb"), ("class_query", "ucf101_24"), ("multisports", None)]
_LEFT, _RIGHT = (0.0, 0.0, 100.0, 100.0), (150.0, 0.0, 250.0, 100.0)


def _tubelets(found, length=3):
  """A query's boxes in successive frames as one, with its mean score; all frames hold all queries."""
  parts = []
  for video in range(len(found.videos)):
    rows = np.flatnonzero(found.video == video)
    num_frames = int(found.frame[rows].max())
    rows = rows.reshape(num_frames, -1)
    for start in range(num_frames - length + 1):
      window = rows[start : start + length]
      parts.append((window[0], found.boxes[window, 0].swapaxes(0, 1), found.scores[window].mean(axis=0)))
  first, boxes, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
  return TubeDetections(found.videos, found.video[first], found.frame[first], boxes, found.actor[first], scores)


@pytest.mark.parametrize(
  ("folder", "name", "protocol", "dataset"),
  [
    *((f, f"act_moc_{k}_stable_argsort", "act", None) for f in ("jhmdb_like", "ucf_like") for k in ("K1", "K3")),
    ("jhmdb_like", "class_query_jhmdb", "class_query", "jhmdb"),
    ("jhmdb_like", "class_query_ucf_protocol_on_this_set", "class_query", "ucf101_24"),
    ("ucf_like", "class_query_ucf", "class_query", "ucf101_24"),
  ],
)
def test_matches_the_published_evaluators(folder, name, protocol, dataset, tmp_path):
  truth, found = read_golden(folder, tmp_path)
  if "K3" in name:
    found = _tubelets(found)
  result = video_map(truth, found, protocol=protocol, dataset=dataset)
  expected = golden_files.load(f"tubes_small/{folder}/expected")["expected"][name]
  for key in (
    "frame_mAP@0.5",
    "frame_mAP@0.75",
    "video_mAP@0.2",
    "video_mAP@0.5",
    "video_mAP@0.75",
    "video_mAP@0.5:0.95",
  ):
    assert 100 * result.summary[key.replace("_", "-")] == pytest.approx(expected[key], abs=1e-5)
  for key, values in expected["per_class"].items():
    kind, _, iou = key.partition("_AP@")
    if iou:
      ap = result.frame_ap if kind == "frame" else result.video_ap
      np.testing.assert_allclose(100 * ap[float(iou)], values, atol=2e-5)
    else:
      means = [100 * result.video_ap[iou].mean() for iou in IOUS[9:]]
      np.testing.assert_allclose(means, values, atol=1e-5)
  assert result.num_videos == 12
  assert result.num_detections == len(found.frame)
  assert result.num_tubes.sum() == sum(len(video.tubes) for video in truth.videos.values())


@pytest.mark.parametrize("number", [0, 1])
def test_matches_the_class_query_code_on_its_own_files(number, tmp_path):
  golden = golden_files.load("tubes_small/class_query_lines")[number]
  for name in ("gt_lines", "detection_lines"):
    (tmp_path / name).write_text("".join(f"{key} {numbers}\n" for key, numbers in golden[name]))
  truth = read_ground_truth(tmp_path / "gt_lines")
  found = read_detections(tmp_path / "detection_lines", golden["classes"])
  dataset = {"jhmdb": "jhmdb", "ucf": "ucf101_24"}[golden["kind"]]
  result = video_map(truth, found, protocol="class_query", dataset=dataset)
  assert result.summary["frame-mAP@0.5"] == pytest.approx(golden["f_mAP"], abs=1e-9)
  assert result.summary["video-mAP@0.5"] == pytest.approx(golden["v_mAP"], abs=1e-7)
  for k in range(golden["classes"]):
    expected = golden["f_per_class"][f"PascalBoxes_PerformanceByCategory/AP@0.5IOU/c{k + 1}"]
    np.testing.assert_allclose(result.frame_ap[0.5][k], np.nan if expected is None else expected, atol=1e-9)
    assert result.video_ap[0.5][k] == pytest.approx(golden["v_per_class"][f"c{k + 1}"], abs=1e-7)


def _plain_frame_ap(truth, found, label, iou, protocol):
  """AP of boxes as the evaluators compute it: one detection after the other."""
  margin = 1 if protocol == "act" else 0

  def overlap(a, b):
    sides = [max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + margin, 0) for k in (0, 1)]
    areas = [(box[2] - box[0] + margin) * (box[3] - box[1] + margin) for box in (a, b)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])

  left = {}
  for name, video in truth.videos.items():
    for tube in video.tubes:
      for frame, *box in tube.boxes:
        if tube.label == label:
          left.setdefault((name, int(frame)), []).append(box)
  total = sum(map(len, left.values()))
  frames = {}
  for row in range(len(found.frame)):
    score = found.scores[row]
    if protocol != "multisports" or score.argmax() == label:
      key = (found.videos[found.video[row]], int(found.frame[row]))
      frames.setdefault(key, []).append([float(score[label]), found.boxes[row, 0]])
  if protocol != "class_query":
    frames = dict(sorted(frames.items()))
  listed = []
  for key, entries in frames.items():
    if protocol == "act":
      queue = sorted(entries, key=lambda e: e[0])
      while queue:
        best = queue.pop()
        for entry in [e for e in queue if overlap(best[1], e[1]) > 0.6]:
          entry[0] *= 1 - overlap(best[1], entry[1])
          queue = [e for e in queue if e is not entry]
    if protocol == "class_query":
      entries.sort(key=lambda e: -e[0])
    listed += [(score, key, box) for score, box in entries]
  hit = {}
  taken = set()
  for number in sorted(range(len(listed)), key=lambda n: -listed[n][0]):
    _, key, box = listed[number]
    overlaps = [overlap(box, other) for other in left.get(key, [])]
    best = int(np.argmax(overlaps)) if overlaps else -1
    hit[number] = bool(overlaps) and overlaps[best] >= iou and (key, best) not in taken
    if hit[number] and protocol == "act":
      del left[key][best]
    elif hit[number]:
      taken.add((key, best))
  order = sorted(range(len(listed)), key=lambda n: listed[n][0])[::-1]
  if protocol != "class_query":
    order = sorted(range(len(listed)), key=lambda n: -listed[n][0])
  true = np.cumsum([hit[number] for number in order])
  precision = [1.0, *(true / np.arange(1, len(order) + 1))]
  recall = [0.0, *(true / total)]
  area = 0.0
  for k in range(1, len(recall)):
    height = (precision[k] + precision[k - 1]) / 2 if protocol == "act" else max(precision[k:])
    area += (recall[k] - recall[k - 1]) * height
  return area


def _detections(names, rows, num_classes=2):
  """Rows of (video, frame, box, scores by label, actor)."""
  scores = np.full((len(rows), num_classes), 0.01, np.float32)
  for k, row in enumerate(rows):
    for label, score in row[3].items():
      scores[k, label] = score
  return TubeDetections(
    list(names),
    np.array([list(names).index(row[0]) for row in rows], np.int32),
    np.array([row[1] for row in rows], np.int32),
    np.array([row[2] for row in rows], np.float64).reshape(-1, 1, 4),
    np.array([row[4] if len(row) > 4 else 1.0 for row in rows], np.float64),
    scores,
  )


def _truth(videos, num_frames=20, labels=("walk", "run")):
  """Videos of tubes (label, box, first frame, last frame) that stand still."""
  return TubeGroundTruth(
    list(labels),
    {
      name: Video(
        num_frames,
        (240, 320),
        [Tube(k, np.array([[f, *box] for f in range(first, last + 1)], float)) for k, box, first, last in tubes],
      )
      for name, tubes in videos.items()
    },
    [([], list(videos))],
  )


@st.composite
def _scenes(draw):
  """Several people of one class, gaps, frames without detections or annotations, ties."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  levels = draw(st.sampled_from([2, 8, 4096]))

  def boxes(count):
    corner = rng.integers(0, 4, (count, 2)) * 8
    return np.concatenate([corner, corner + rng.integers(1, 5, (count, 2)) * 8], axis=1).astype(np.float64)

  videos = {}
  for name in ("a", "b", "c"):
    tubes = []
    for _ in range(rng.integers(0, 4)):
      frames = np.flatnonzero(rng.random(6) < 0.6) + 1
      if len(frames):
        tubes.append(Tube(int(rng.integers(2)), np.column_stack([frames, boxes(len(frames))])))
    videos[name] = Video(6, (240, 320), tubes)
  videos["a"].tubes.append(Tube(0, np.column_stack([[2], boxes(1)])))
  video = np.concatenate([[0, 1, 2], rng.integers(0, 3, 60)])
  frame = rng.integers(1, 7, len(video))
  found = TubeDetections(
    ["a", "b", "c"],
    video.astype(np.int32),
    frame.astype(np.int32),
    boxes(len(video))[:, None],
    rng.random(len(video)),
    (rng.integers(0, levels, (len(video), 2)) / levels).astype(np.float32),
  )
  return TubeGroundTruth(["walk", "run"], videos, [([], ["a", "b", "c"])]), found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_scenes(), st.sampled_from(["act", "class_query", "multisports"]))
def test_frame_ap_matches_a_plain_implementation(scene, protocol):
  truth, found = scene
  result = video_map(truth, found, protocol=protocol, dataset="jhmdb" if protocol == "class_query" else None)
  for label in range(2):
    for iou in (0.2, 0.5):
      if result.num_boxes[label]:
        expected = _plain_frame_ap(truth, found, label, iou, protocol)
        assert result.frame_ap[iou][label] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(_scenes(), st.sampled_from(_RULES), st.randoms(use_true_random=False))
def test_order_of_rows_is_irrelevant_without_ties(scene, rules, random):
  truth, found = scene
  found.scores[:] = np.random.default_rng(0).permutation(found.scores.size).reshape(found.scores.shape) + 1
  order = list(range(len(found.frame)))
  random.shuffle(order)
  shuffled = TubeDetections(found.videos, *(column[order] for column in found[1:]))
  results = [video_map(truth, rows, protocol=rules[0], dataset=rules[1]) for rows in (found, shuffled)]
  for iou in IOUS:
    np.testing.assert_allclose(results[1].frame_ap[iou], results[0].frame_ap[iou], atol=1e-12)
    np.testing.assert_allclose(results[1].video_ap[iou], results[0].video_ap[iou], atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(_scenes(), st.sampled_from(_RULES), st.sampled_from([-1.0, 0.4, 2.0]))
def test_another_false_positive_never_helps_in_frames(scene, rules, score):
  truth, found = scene
  wrong = _detections(found.videos, [("a", 2, (200, 200, 210, 210), {0: score, 1: score})])
  more = TubeDetections(found.videos, *(np.concatenate(c) for c in zip(found[1:], wrong[1:], strict=True)))
  before, after = (video_map(truth, rows, protocol=rules[0], dataset=rules[1]).frame_ap[0.5] for rows in (found, more))
  assert (np.isnan(after) | (after <= before + 1e-12)).all()
  if score == -1:  # at the end of the ranking it does not hurt either
    np.testing.assert_allclose(after, before)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(_RULES))
def test_perfect_detections_give_one(seed, rules):
  rng = np.random.default_rng(seed)
  whole = rules[1] == "jhmdb"
  videos = {}
  for name, label in zip("abcd", (0, 1, *rng.integers(0, 2, 2)), strict=True):
    first, last = (1, 40) if whole else (int(rng.integers(1, 10)), int(rng.integers(26, 40)))
    videos[name] = [(int(label), box, first, last) for box in ((_LEFT,) if whole else (_LEFT, _RIGHT))]
  truth = _truth(videos, num_frames=40)
  rows = [
    (name, int(row[0]), row[1:], {tube.label: rng.uniform(0.5, 1)})
    for name, video in truth.videos.items()
    for tube in video.tubes
    for row in tube.boxes
  ]
  found = _detections(videos, rows)
  found.scores[found.scores < 0.5] = np.nan
  summary = video_map(truth, found, protocol=rules[0], dataset=rules[1]).summary
  assert summary["frame-mAP@0.75"] == pytest.approx(1, abs=1e-12)
  assert summary["video-mAP@0.5"] == pytest.approx(1, abs=1e-12 if rules[0] != "class_query" else 2e-5)
  assert (summary["video-mAP@0.5"] < 1 - 1e-7) == (rules[0] == "class_query")


def _still(name, box, label, score, first=1, last=20, actor=1.0):
  return [(name, frame, box, {label: score}, actor) for frame in range(first, last + 1)]


def test_multisports_by_hand():
  labels = ("walk", "run", "basketball save")
  videos = {"a": [(0, _LEFT, 1, 20), (0, _RIGHT, 1, 20)], "b": [(0, _LEFT, 1, 20), (2, _RIGHT, 1, 20)]}
  truth = _truth(videos, labels=labels)
  rows = [
    *_still("a", _LEFT, 0, 0.9),  # right
    *_still("b", _RIGHT, 0, 0.8),  # wrong: somewhere else
    *_still("b", _LEFT, 0, 0.3),  # right
    *_still("a", _RIGHT, 0, 0.2, last=14),  # right, but too short for a tube
  ]
  found = _detections(videos, rows, 3)
  found.scores[:, 1] = found.scores[:, 0] / 2  # not the best class: nothing
  result = video_map(truth, found, protocol="multisports")
  # In every class but one there is nothing to find, or it is left out by name.
  assert np.isnan(result.video_ap[0.5][1:]).all()
  assert np.isnan(result.frame_ap[0.5][1:]).all()
  # With the scores of the detections themselves: hit, miss, hit of three tubes.
  assert result.video_ap[0.5][0] == pytest.approx((1 + 2 / 3) / 3)
  assert result.summary["video-mAP@0.5"] == result.video_ap[0.5][0]
  # 20 hits, 20 misses, 20 and 14 hits of 60 boxes.
  late = [*((20 + k) / (40 + k) for k in range(1, 35))]
  assert result.frame_ap[0.5][0] == pytest.approx((20 + 34 * max(late)) / 60)
  assert result.num_linked.tolist() == [3, 0, 0]


def test_multisports_counts_edges_and_not_pixels():
  truth = _truth({"a": [(0, (0, 0, 10, 10), 1, 20)]})
  found = _detections(["a"], _still("a", (0, 0, 5, 10), 0, 0.9, last=20))
  result = video_map(truth, found, protocol="multisports")
  assert (result.frame_ap[0.5][0], result.frame_ap[0.55][0]) == (1, 0)  # 0.5; with pixels 6 / 11
  assert video_map(truth, found, protocol="act").frame_ap[0.5][0] == 1
  found = _detections(["a"], _still("a", (0, 0, 10, 10), 0, 0.9, last=15))
  spans = {protocol: video_map(truth, found, protocol=protocol).video_ap for protocol in ("act", "multisports")}
  assert (spans["act"][0.75][0], spans["multisports"][0.75][0]) == (1, 0)  # 15 / 20 against 14 / 19


def test_claimed_boxes_and_tubes():
  small = (0.0, 0.0, 100.0, 80.0)
  truth = _truth({"a": [(0, _LEFT, 1, 20), (0, small, 1, 20)]})
  # Both overlap the first annotation most, so that the second stays for the second detection, or does not.
  found = _detections(["a"], [*_still("a", (0, 0, 100, 97), 0, 0.9), *_still("a", (0, 0, 100, 91), 0, 0.8)])
  assert video_map(truth, found, protocol="multisports").frame_ap[0.5][0] == pytest.approx(0.5)
  assert video_map(truth, found, protocol="class_query", dataset="jhmdb").frame_ap[0.5][0] == pytest.approx(0.5)
  lowered = video_map(truth, found, protocol="act")
  assert lowered.frame_ap[0.5][0] == pytest.approx(1)
  assert lowered.video_ap[0.5][0] == pytest.approx(0.5)  # the NMS of tubes leaves one


def test_act_takes_the_area_under_the_curve_itself():
  truth = _truth({"a": [(0, _LEFT, 1, 20), (0, _RIGHT, 1, 20)], "b": []})
  found = _detections("ab", [*_still("a", _LEFT, 0, 0.9), *_still("b", _LEFT, 0, 0.8), *_still("a", _RIGHT, 0, 0.7)])
  result = video_map(truth, found, protocol="act")
  assert result.video_ap[0.5][0] == pytest.approx(0.5 * (1 + 1) / 2 + 0.5 * (1 / 2 + 2 / 3) / 2)
  assert result.summary["video-mAP@0.5"] == result.video_ap[0.5][0] / 2  # a class without annotations counts 0
  assert result.frame_ap[0.5][1] == 0
  # The envelope: precision at the second hit is 2 / 3.
  result = video_map(truth, found, protocol="class_query", dataset="jhmdb")
  assert result.frame_ap[0.5][0] == pytest.approx(0.5 + 0.5 * 40 / 60)
  assert np.isnan(result.frame_ap[0.5][1])
  assert result.summary["frame-mAP@0.5"] == result.frame_ap[0.5][0]
  assert result.video_ap[0.5][1] == 0
  assert result.summary["video-mAP@0.5"] == result.video_ap[0.5][0] / 2


def test_rules_of_class_query():
  truth = _truth({"a": [(0, _LEFT, 5, 14)]})
  rows = _still("a", _LEFT, 0, 0.9, 5, 14, actor=0.7)
  rows += [("a", frame, _RIGHT, {0: 0.8, 1: 0.95}) for frame in range(1, 21)]  # of the other class
  rows += _still("a", _RIGHT, 0, 0.99, 1, 4, actor=0.69)  # not a person
  result = video_map(truth, _detections(["a"], rows), protocol="class_query", dataset="ucf101_24")
  assert result.num_linked.tolist() == [1, 1]
  # Nine of the tube's frames, and one behind it: 9 / 11 in time.
  assert result.video_ap[0.8][0] == pytest.approx(1, abs=2e-5)
  assert result.video_ap[0.85][0] == 0
  # In frames all detections of all classes count.
  assert result.frame_ap[0.5][0] == pytest.approx(10 / 14)
  # In space only, for JHMDB.
  result = video_map(truth, _detections(["a"], rows[:8]), protocol="class_query", dataset="jhmdb")
  assert result.video_ap[0.95][0] == pytest.approx(1, abs=2e-5)


def test_tubes_of_class_query_share_two_frames_at_least():
  rows = _still("a", _LEFT, 0, 0.9, 4, 7)  # becomes frames 5 to 8
  for last, expected in ((5, 0), (6, 1)):
    truth = _truth({"a": [(0, _LEFT, 5, last)]})
    result = video_map(truth, _detections(["a"], rows), protocol="class_query", dataset="ucf101_24")
    assert result.video_ap[0.2][0] == pytest.approx(expected, abs=2e-5)


def test_equal_scores_of_tubes_rank_by_name_of_the_video():
  truth = _truth({"b": [], "a": [(0, _LEFT, 1, 20)]})
  found = _detections("ba", [*_still("b", _LEFT, 0, 0.9), *_still("a", _LEFT, 0, 0.9)])
  result = video_map(truth, found, protocol="class_query", dataset="jhmdb")
  assert result.video_ap[0.5][0] == pytest.approx(1, abs=2e-5)
  assert video_map(truth, found, protocol="act").video_ap[0.5][0] == pytest.approx(
    (1 / 2 + 0) / 2
  )  # by the split's list


def test_equal_scores_of_tubelets_rank_by_frame_and_start():
  truth = _truth({"a": [(0, _RIGHT, 2, 3)]}, num_frames=3)
  boxes = np.array([[_RIGHT] * 2, [_LEFT] * 2])
  found = TubeDetections(
    ["a"], np.zeros(2, np.int32), np.array([2, 1], np.int32), boxes, np.ones(2), np.full((2, 2), 0.5, np.float32)
  )
  # Frame 1: wrong; 2: wrong (the earlier tubelet), right; 3: right.
  ap = video_map(truth, found, protocol="act").frame_ap[0.5][0]
  assert ap == pytest.approx(((0 + 1 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 2)


def test_videos_without_detections_and_detections_elsewhere():
  truth = _truth({"a": [(0, _LEFT, 1, 20)], "b": [(0, _LEFT, 1, 20)]})
  found = _detections(["c", "a"], [*_still("a", _LEFT, 0, 0.9), *_still("c", _LEFT, 0, 0.95)])
  for protocol in ("act", "multisports"):
    result = video_map(truth, found, protocol=protocol)
    assert (result.frame_ap[0.5][0], result.video_ap[0.5][0]) == pytest.approx((0.5, 0.5))
    assert (result.num_detections, result.num_ignored) == (20, 20)
  with pytest.raises(ValueError, match=r"1 without detections: b$"):
    video_map(truth, found, protocol="class_query", dataset="jhmdb")
  with pytest.raises(ValueError, match=r"1 in the detections only: c$"):
    video_map(_truth({"a": []}), found, protocol="class_query", dataset="jhmdb")


def test_no_detections():
  truth = _truth({"a": [(0, _LEFT, 1, 20)]})
  for protocol in ("act", "multisports"):
    summary = video_map(truth, _detections(["a"], []), protocol=protocol).summary
    assert set(summary.values()) == {0.0}


def test_splits():
  truth = _truth({"a": [(0, _LEFT, 1, 20)], "b": [(0, _LEFT, 1, 20), (1, _RIGHT, 1, 20)]})
  truth = truth._replace(splits=[(["b"], ["a"]), (["a"], ["b"])])
  found = _detections("ab", [*_still("a", _LEFT, 0, 0.9), *_still("b", _RIGHT, 1, 0.9)])
  results = [video_map(truth, found, protocol="act", split=split) for split in (0, 1)]
  mean = mean_over_splits(results)
  assert [result.summary["video-mAP@0.5"] for result in results] == [0.5, 0.5]
  assert mean.summary["video-mAP@0.5"] == 0.5
  assert mean.video_ap[0.5].tolist() == [0.5, 0.5]
  assert (mean.split, mean.num_videos, mean.num_tubes.tolist()) == (None, 2, [2, 1])
  with pytest.raises(ValueError, match="each of another split"):
    mean_over_splits([results[0], results[0]])


@pytest.mark.parametrize(
  ("change", "arguments", "complaint"),
  [
    ({}, {"protocol": "ava"}, r"protocol 'ava'; expected one of act, class_query, multisports"),
    ({}, {"protocol": "class_query"}, "class_query needs jhmdb or ucf101_24"),
    ({}, {"protocol": "act", "dataset": "jhmdb"}, "the others None"),
    ({}, {"protocol": "class_query", "dataset": "ava"}, "class_query needs jhmdb or ucf101_24"),
    ({}, {"protocol": "act", "split": 1}, "split 1; the ground truth has 1"),
    ({"scores": np.ones((1, 3), np.float32)}, {"protocol": "act"}, "detections of 3 classes; the ground truth has 2"),
    ({"boxes": np.ones((1, 4, 4))}, {"protocol": "multisports"}, "tubelets of 4 frames"),
    ({"boxes": np.ones((1, 1, 4))}, {"protocol": "act"}, "seem normalised"),
    ({"frame": np.array([21])}, {"protocol": "act"}, "frame 21 of a, which has 20"),
    ({"boxes": np.full((1, 4, 4), 9), "frame": np.array([18])}, {"protocol": "act"}, "frames 18 to 21 of a"),
    ({"actor": np.array([np.nan])}, {"protocol": "class_query", "dataset": "ucf101_24"}, "without actor probability"),
  ],
)
def test_bad_input_is_named(change, arguments, complaint):
  truth = _truth({"a": [(0, _LEFT, 1, 20)]})
  found = _detections(["a"], [("a", 1, _LEFT, {0: 0.9})])._replace(**change)
  with pytest.raises(ValueError, match=complaint):
    video_map(truth, found, **arguments)


def test_nothing_annotated():
  found = _detections(["a"], [("a", 1, _LEFT, {0: 0.9})])
  for protocol, dataset in _RULES:
    with pytest.raises(ValueError, match="nothing to score against"):
      video_map(_truth({"a": []}), found, protocol=protocol, dataset=dataset)
  truth = _truth({"a": [(0, _LEFT, 1, 20)]}, labels=("basketball save", "run"))
  with pytest.raises(ValueError, match="nothing to score against"):
    video_map(truth, found, protocol="multisports")
