"""Linking against tubes of the published code, against plain second implementations, and by hand."""

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import golden_files
from vad_jax.metrics.linking import (
  Candidates,
  LinkedTube,
  box_iou,
  link_by_viterbi,
  link_greedily,
  soft_nms,
  tube_nms,
  tube_overlaps,
)
from vad_jax.tubes import read_detections, read_ground_truth


def read_golden(name: str, folder: Path):
  """Ground truth and detections of ``tests/golden/tubes_small/<name>``."""
  for file in ("gt.json", "dets.csv"):
    (folder / file).write_bytes(
      gzip.decompress((golden_files.GOLDEN / "tubes_small" / name / f"{file}.gz").read_bytes())
    )
  truth = read_ground_truth(folder / "gt.json")
  return truth, read_detections(folder / "dets.csv", len(truth.labels))


def _assert_same(tubes, expected, **ignored):
  assert len(tubes) == len(expected)
  for tube, wanted in zip(tubes, expected, strict=True):
    assert tube.score == pytest.approx(wanted["score"], rel=1e-6)
    np.testing.assert_array_equal(tube.boxes[:, 0], np.arange(wanted["frames"][0], wanted["frames"][1] + 1))
    np.testing.assert_allclose(tube.boxes[:, 1:], np.array(wanted["boxes"])[:, :4], atol=1e-2)


@pytest.mark.parametrize("name", ["jhmdb_like", "ucf_like"])
def test_matches_the_published_code(name, tmp_path):
  truth, found = read_golden(name, tmp_path)
  num_frames = np.array([truth.videos[video].num_frames for video in found.videos])
  golden = golden_files.load(f"tubes_small/{name}/linked_tubes")
  first_frame = int(name == "ucf_like")
  for label in range(len(truth.labels)):
    candidates = Candidates(found.video, found.frame, found.boxes, found.scores[:, label])
    by_act = link_greedily(candidates, num_frames)
    kept = tube_nms(by_act)
    if first_frame:
      rows = (found.scores.argmax(axis=1) == label) & (found.actor >= 0.7)
      candidates = Candidates(*(column[rows] for column in candidates))
    by_query = link_by_viterbi(candidates, num_frames, first_frame)
    for video in golden["act_moc_K1"]:
      expected = golden["act_moc_K1"][video][truth.labels[label]]
      tubes = [tube for tube in by_act if found.videos[tube.video] == video]
      _assert_same(tubes, expected)
      assert [any(tube is other for other in kept) for tube in tubes] == [t["kept_by_nms3d_0_3"] for t in expected]
      expected = golden["class_query_ucf" if first_frame else "class_query_jhmdb"][video][truth.labels[label]]
      _assert_same([tube for tube in by_query if found.videos[tube.video] == video], expected)


def _iou(a, b, margin):
  sides = [min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + margin for k in (0, 1)]
  shared = max(sides[0], 0) * max(sides[1], 0)
  areas = [(box[2] - box[0] + margin) * (box[3] - box[1] + margin) for box in (a, b)]
  return shared / (sum(areas) - shared)


def _plain_soft_nms(boxes, score):
  score, queue = list(score), sorted(range(len(score)), key=lambda k: score[k])
  while queue:
    best = queue.pop()
    for k in list(queue):
      overlap = sum(_iou(a, b, 1) for a, b in zip(boxes[best], boxes[k], strict=True))
      if overlap > 0.6 * len(boxes[k]):
        score[k] *= 1 - overlap
        queue.remove(k)
  return score


def _plain_link(boxes_of, num_frames, length):
  """ACT's linking in one video, detection by detection; ``boxes_of[frame]`` are pairs of tubelet and score."""
  live, done = [], []
  for frame in range(1, num_frames - length + 2):
    new = boxes_of.get(frame, [])
    score = _plain_soft_nms([boxes for boxes, _ in new], [s for _, s in new])
    new = [(frame, new[k][0], score[k]) for k in sorted(range(len(new)), key=lambda k: -score[k])[:10]]
    live.sort(key=lambda tube: -sum(s for _, _, s in tube) / len(tube))
    ended = []
    for tube in live:
      start, boxes, _ = tube[-1]
      age = frame - start
      pairs = [(k, k + age) for k in range(length - age)] or [(0, length - 1)]
      fit = [d for d in new if sum(_iou(d[1][k], boxes[j], 1) for k, j in pairs) / len(pairs) >= 0.5]
      if fit:
        tube.append(max(fit, key=lambda d: d[2]))
        new = [d for d in new if d is not tube[-1]]
      elif age >= length:
        ended.append(tube)
    for tube in reversed(ended):
      done.append(tube)
      live = [other for other in live if other is not tube]
    live += [[d] for d in new]
  tubes = []
  for tube in done + live:
    score = sum(s for _, _, s in tube) / len(tube)
    first, last = tube[0][0], tube[-1][0] + length - 1
    if score >= 0.005 and last - first + 1 >= 15:
      frames = range(first, last + 1)
      rows = [np.mean([b[f - start] for start, b, _ in tube if 0 <= f - start < length], axis=0) for f in frames]
      tubes.append((score, np.column_stack([frames, rows])))
  return tubes


def _scene(seed, length, levels, num_videos=3):
  """Detections that follow some people, with ties, frames without detections and a video without any."""
  rng = np.random.default_rng(seed)
  num_frames = rng.integers(length, 40, num_videos)
  video, frame = [], []
  for v in range(1, num_videos):
    for f in range(1, num_frames[v] - length + 2):
      count = int(rng.integers(2, 6)) * int(rng.random() < 0.99)
      video += [v] * count
      frame += [f] * count
  corner = rng.choice([0, 0, 0, 0, 60], (len(video), 1, 1)) + rng.integers(0, 3, (len(video), length, 2))
  boxes = np.concatenate([corner, corner + rng.integers(18, 21, (len(video), length, 2))], axis=2).astype(np.float64)
  score = (rng.integers(1, levels + 1, len(video)) / levels).astype(np.float32)
  order = rng.permutation(len(video))
  order = order[np.argsort(np.array(video, np.int64)[order], kind="stable")]
  return Candidates(np.array(video, np.int64)[order], np.array(frame, np.int64)[order], boxes, score), num_frames


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3]), st.sampled_from([1, 8, 4096]))
def test_greedy_linking_matches_a_plain_implementation(seed, length, levels):
  found, num_frames = _scene(seed, length, levels)
  expected = []
  for video in range(len(num_frames)):
    boxes_of = {}
    for row in np.flatnonzero(found.video == video):
      boxes_of.setdefault(found.frame[row], []).append((found.boxes[row], float(found.score[row])))
    expected += [(video, *tube) for tube in _plain_link(boxes_of, num_frames[video], length)]
  tubes = link_greedily(found, num_frames)
  assert [tube.video for tube in tubes] == [video for video, _, _ in expected]
  for tube, (_, score, boxes) in zip(tubes, expected, strict=True):
    assert tube.score == pytest.approx(score)
    np.testing.assert_allclose(tube.boxes, boxes)


def test_scenes_hold_tubes():
  for length in (1, 2, 3):
    assert sum(len(link_greedily(*_scene(seed, length, 8))) for seed in range(10)) > 5


def test_soft_nms_by_hand():
  box, near, far = [0, 0, 9, 9], [0, 0, 9, 8], [50, 50, 59, 59]
  boxes = np.array([box, near, far, box], float)[:, None]
  # The second lowers the first and the fourth; the first, being lowered, lowers nothing.
  np.testing.assert_allclose(soft_nms(np.zeros(4, int), boxes, np.array([0.5, 0.9, 0.2, 0.4])), [0.05, 0.9, 0.2, 0.04])
  # In another frame it does not.
  np.testing.assert_allclose(
    soft_nms(np.array([0, 1, 0, 0]), boxes, np.array([0.5, 0.9, 0.2, 0.4])), [0.5, 0.9, 0.2, 0.0], atol=1e-12
  )
  # Of equal scores the last one stays; tubelets that are lowered become negative.
  np.testing.assert_allclose(
    soft_nms(np.zeros(2, int), np.repeat(boxes[[0, 3]], 3, axis=1), np.array([0.5, 0.5])), [0.5 * (1 - 3), 0.5]
  )


def _best_path(boxes, score):
  """The best of all paths through lists of boxes, one list for each frame."""

  def value(path):
    total = 0.0
    for f in range(len(path) - 1):
      s, t = score[f][path[f]], score[f + 1][path[f + 1]]
      total += _iou(boxes[f][path[f]], boxes[f + 1][path[f + 1]], 0) + s + t + 0.5 * s * t
    return total

  return max(itertools.product(*(range(len(b)) for b in boxes)), key=value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_viterbi_finds_the_best_paths(seed):
  rng = np.random.default_rng(seed)
  num_frames = rng.integers(1, 6, 3)
  rows = [(v, f) for v in range(3) for f in range(1, num_frames[v] + 1) for _ in range(rng.integers(0, 4))]
  video, frame = np.array(rows, np.int64).reshape(-1, 2).T
  corner = rng.uniform(0, 20, (len(rows), 1, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(5, 30, corner.shape)], axis=2)
  found = Candidates(video, frame, boxes, rng.random(len(rows)))
  expected = []
  for v in range(3):
    own = [np.flatnonzero((video == v) & (frame == f)) for f in range(1, num_frames[v] + 1)]
    filled = [f for f, r in enumerate(own) if len(r)]
    if not filled:
      continue
    lists = [list(own[min(filled, key=lambda g: (abs(g - f), g))]) for f in range(num_frames[v])]
    paths = []
    while len(paths) < 3 and all(lists):
      best = _best_path([found.boxes[r, 0] for r in lists], [found.score[r] for r in lists])
      paths.append([r.pop(k) for r, k in zip(lists, best, strict=True)])
    kept = []
    for path in sorted(paths, key=lambda path: -found.score[path].mean()):
      overlaps = [np.mean([_iou(boxes[a, 0], boxes[b, 0], 1) for a, b in zip(path, k, strict=True)]) for k in kept]
      if num_frames[v] < 2 or all(overlap <= 0.3 for overlap in overlaps):
        kept.append(path)
    for path in kept:
      frames = np.arange(1, num_frames[v] + 1)[filled[0] + 1 : filled[0] + 1 + len(filled)]
      path = path[filled[0] + 1 : filled[0] + 1 + len(filled)]
      if path:
        expected.append((v, found.score[path].mean(), np.column_stack([frames, boxes[path, 0]])))
  tubes = link_by_viterbi(found, num_frames, first_frame=1)
  assert [tube.video for tube in tubes] == [v for v, _, _ in expected]
  for tube, (_, score, table) in zip(tubes, expected, strict=True):
    assert tube.score == pytest.approx(score)
    np.testing.assert_allclose(tube.boxes, table)


def _single(scores, corners):
  """One box in each frame."""
  corners = np.array(corners, float)[:, None]
  boxes = np.concatenate([corners, corners, corners + 20, corners + 20], axis=1)[:, None]
  frames = np.arange(1, len(scores) + 1)
  return Candidates(np.zeros(len(scores), np.int64), frames, boxes, np.array(scores, np.float32))


def test_greedy_linking_by_hand():
  def person(corner, score, last):
    return _single([score] * last, np.full(last, corner))

  def link(*people):
    return link_greedily(Candidates(*(np.concatenate(column) for column in zip(*people, strict=True))), np.array([30]))

  tubes = link(
    person(0, 0.9, 30), person(100, 0.8, 16), person(200, 0.7, 16), person(300, 0.6, 14), person(400, 0.004, 20)
  )
  # 14 frames are too short, and 0.004 is too little. Those that end together are listed from the back, before others.
  assert [tube.score for tube in tubes] == pytest.approx([0.7, 0.8, 0.9])
  assert [len(tube.boxes) for tube in tubes] == [16, 16, 30]


def test_first_frame_decides_how_a_path_is_cut():
  found, num_frames = _single([0.1, 0.1, 0.9, 0.9, 0.1, 0.1], np.zeros(6)), np.array([6])
  # Frames from 1: the first is lost.
  assert link_by_viterbi(found, num_frames, 1)[0].boxes[:, 0].tolist() == [2, 3, 4, 5, 6]
  # Frames from 0: the best part is 2 to 3, which (6 - 1) // 2 widen by 2 at both ends.
  (tube,) = link_by_viterbi(found, num_frames, 0)
  assert tube.boxes[:, 0].tolist() == [1, 2, 3, 4, 5]
  # Nothing in the first frame: the path is cut as where frames count from 1, but does not lose a frame.
  late = Candidates(*(column[2:] for column in found))
  assert link_by_viterbi(late, num_frames, 0)[0].boxes[:, 0].tolist() == [3, 4, 5, 6]
  # A gap: four frames from the second on, whatever is in them.
  gap = Candidates(*(column[[0, 1, 4, 5]] for column in found))
  assert link_by_viterbi(gap, num_frames, 1)[0].boxes[:, 0].tolist() == [2, 3, 4, 5]


def test_jumps_turn_scores_negative():
  (tube,) = link_by_viterbi(_single([0.5, 0.5, 0.5, 0.5], [0, 0, 100, 100]), np.array([4]), 0)
  # Scores 0.5, 0.5, -0.5, 0.5: the best part is 0 to 1, widened by (4 - 1) // 2.
  assert tube.boxes[:, 0].tolist() == [1, 2]
  assert tube.score == pytest.approx(0.5)


def test_a_path_without_a_busy_part():
  # Equal scores exceed their mean nowhere: the first frames up to L // 2 - 1 remain.
  (tube,) = link_by_viterbi(_single([0.5] * 8, np.zeros(8)), np.array([8]), 0)
  assert tube.boxes[:, 0].tolist() == [1, 2, 3]
  assert link_by_viterbi(_single([0.5], np.zeros(1)), np.array([9]), 0) == []


def _still(first, last, box):
  return np.array([[frame, *box] for frame in range(first, last + 1)], float)


def test_tube_overlaps_by_hand():
  tube = _still(1, 10, (0, 0, 9, 9))
  others = [_still(6, 15, (0, 0, 9, 4)), _still(11, 20, (0, 0, 9, 9)), _still(10, 12, (0, 0, 9, 9)), tube[[0, 2, 9]]]
  np.testing.assert_allclose(tube_overlaps(tube, others, 1), [0.5 * 5 / 15, 0, 1 / 12, 1])
  # Edges instead of pixels, in space and time.
  np.testing.assert_allclose(tube_overlaps(tube, others, 0), [4 / 9 * 4 / 14, 0, 0, 1])
  np.testing.assert_allclose(tube_overlaps(tube, others, 1, least_common=2), [0.5 * 5 / 15, 0, 0, 1])
  # In space: over the frames of the shorter one.
  np.testing.assert_allclose(tube_overlaps(tube, others, 1, in_time=False), [0.5 * 5 / 10, 0, 1 / 3, 1])


def test_tube_nms_by_hand():
  box = (0, 0, 9, 9)
  tubes = [
    LinkedTube(0, 0.4, _still(1, 30, box)),
    LinkedTube(0, 0.9, _still(1, 20, box)),  # overlaps the first by 2 / 3
    LinkedTube(0, 0.5, _still(19, 60, box)),  # overlaps the second by 2 / 60, the first by 12 / 60
    LinkedTube(1, 0.1, _still(1, 30, box)),
  ]
  assert tube_nms(tubes) == [tubes[1], tubes[2], tubes[3]]
  assert tube_nms([tube._replace(score=0.5) for tube in tubes[:2]]) == [tubes[1]._replace(score=0.5)]


def test_nothing_detected():
  nothing = Candidates(*(np.empty((0, *shape)) for shape in ((), (), (1, 4), ())))
  assert link_greedily(nothing, np.array([20])) == link_by_viterbi(nothing, np.array([20]), 0) == tube_nms([]) == []


def test_boxes_without_area():
  point = np.array([3.0, 3, 3, 3])
  assert box_iou(point, point, 0) == 0
  assert box_iou(point, point, 1) == 1
