"""The synthetic set: files, scripts, motion, and what happens when making it goes wrong."""

import collections
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from vad_jax import annotations
from vad_jax.datasets import figures, poses, scenes, synthetic
from vad_jax.datasets.video import VideoReader

SMALL = dict(size=(96, 72), seconds=3, fps=25, seed=7)


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
  """One whole deck of easy videos."""
  directory = tmp_path_factory.mktemp("easy") / "set"
  synthetic.make(directory, level="easy", num_train=20, num_val=1, workers=2, **SMALL)
  return directory


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  directory = tmp_path_factory.mktemp("full") / "set"
  synthetic.make(directory, level="full", num_train=8, num_val=1, workers=1, **{**SMALL, "seconds": 6})
  return directory


def _files(directory):
  files = (path for path in directory.rglob("*") if path.is_file())
  return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def _tubes(directory, split="train"):
  return json.loads((directory / "annotations" / f"{split}_tubes.json").read_text())


@pytest.mark.parametrize("level", ["easy", "full"])
def test_any_number_of_workers_gives_the_same_files(tmp_path, level):
  for workers in (1, 2):
    synthetic.make(
      tmp_path / str(workers), level=level, num_train=5, num_val=2, workers=workers, **{**SMALL, "seconds": 2}
    )
  one, two = _files(tmp_path / "1"), _files(tmp_path / "2")
  assert len(one) == 5 + 2 + 5 + 1
  assert [name for name in one if one[name] != two[name]] == []


def test_split_seed_and_index_give_other_videos(easy, tmp_path):
  synthetic.make(tmp_path, level="easy", num_train=1, num_val=0, workers=1, **{**SMALL, "seed": 8})
  tubes = [_tubes(easy), _tubes(easy, "val"), _tubes(tmp_path)]
  firsts = [next(iter(table.values()))["tubes"] for table in tubes]
  assert all(a != b for a, b in itertools.combinations(firsts, 2))


@pytest.mark.parametrize("level", ["easy", "full"])
def test_files_agree_with_each_other(level, request):
  directory = request.getfixturevalue(level)
  everything = annotations.read_label_map(synthetic.LABEL_MAP)
  label_map = annotations.read_label_map(directory / "annotations" / "label_map.pbtxt")
  assert len(everything) == 60 and len(label_map) >= 15
  assert label_map.items() <= everything.items()
  assert label_map[14] == "walk" and label_map[68] == "hand shake"
  table = _tubes(directory)
  rows = annotations.read_ava_csv(directory / "annotations" / "train.csv")
  assert set(rows.video) == set(table)
  assert set(rows.action) <= set(label_map)
  expected = set()
  for video, entry in table.items():
    with VideoReader(directory / "videos" / "train" / f"{video}.mp4") as reader:
      assert reader.size == tuple(entry["size"]) == (72, 96)
      assert sum(1 for _ in reader) == entry["num_frames"]
    for tube in entry["tubes"]:
      boxes = np.array(tube["boxes"])
      assert (boxes[:, 1:] >= 0).all() and (boxes[:, 1:] <= 1).all()
      assert (boxes[:, 3:] > boxes[:, 1:3]).all()
      for second in range(1, int(entry["num_frames"] / entry["fps"])):
        frame = round(second * entry["fps"])
        box = tuple(boxes[boxes[:, 0] == frame][0, 1:])
        for label in tube["labels"]:
          if label["start_frame"] <= frame < label["end_frame"]:
            expected.add((video, second, *box, label["id"], tube["person_id"]))
  found = zip(rows.video, rows.timestamp, *rows.boxes.T, rows.action, rows.extra, strict=True)
  assert set(found) == expected


def test_every_frame_of_a_person_has_one_posture(full):
  postures = {1, 7, 10, 11, 12, 14}
  for entry in _tubes(full).values():
    for tube in entry["tubes"]:
      held = np.zeros(entry["num_frames"], int)
      for label in tube["labels"]:
        held[label["start_frame"] : label["end_frame"]] += label["id"] in postures
      assert (held == 1).all()


@pytest.mark.parametrize("level, share", [("easy", 0.05), ("full", 0.04)])
def test_classes_are_balanced(level, share):
  rules = scenes.LEVELS[level]
  count, actors = collections.Counter(), 0
  crowds = set()
  for index in range(100):
    groups = scenes.script(rules, (0, 0), index, 2 if rules.changes else 1)
    crowds.add(sum(len(cast) for cast in groups))
    for act in itertools.chain.from_iterable(itertools.chain.from_iterable(groups)):
      count.update(act.classes)
      actors += 1
  assert sorted(count) == scenes.classes(level)
  assert len(count) >= 15
  assert min(count.values()) >= share * actors
  assert crowds == ({1, 2} if level == "easy" else {1, 2, 3, 4})


def test_motion_tells_classes_apart(easy):
  """The picture changes in the boxes of those who move, and hardly in those of who keeps still."""
  changes = collections.defaultdict(list)
  for video, entry in _tubes(easy).items():
    with VideoReader(easy / "videos" / "train" / f"{video}.mp4") as reader:
      frames = np.stack([frame for _, frame in reader]).astype(float)
    change = np.abs(frames[4:] - frames[:-4]).mean(-1)
    if len(entry["tubes"]) > 1:
      continue  # others would pass through the box
    for tube in entry["tubes"]:
      classes = tuple(sorted(label["id"] for label in tube["labels"]))
      for index, *box in tube["boxes"][:-4]:
        x1, y1, x2, y2 = (round(value * side) for value, side in zip(box, (96, 72) * 2, strict=True))
        changes[classes].append(change[index, y1:y2, x1:x2].mean())
  changes = {classes: np.mean(values) for classes, values in changes.items()}
  still = max(value for classes, value in changes.items() if classes in ((12,), (11,)))
  for moving in ((14,), (10,), (7,)):
    assert changes[moving] > 3 * still, changes


@pytest.mark.parametrize("stance", sorted(poses.STANCES))
@pytest.mark.parametrize("yaw", [0.0, 1.2, -1.5])
def test_boxes_are_tight_around_what_is_painted(stance, yaw):
  times = np.linspace(0, 2, 9)
  height = 200.0
  for gesture in ("idle", "wave", "phone"):
    body = poses.joints(stance, gesture, times, poses.Style(1.0, 1.0, 0.4, poses.LEFT, 0.5))
    facing, feet = np.full(9, yaw), np.full((9, 2), (200.0, 330.0))
    points, near = figures.project(body, facing, feet, height)
    view = figures.View(points, near, facing, height)
    look = figures.random_look(np.random.default_rng(1), np.zeros(3))._replace(shoes=(90, 90, 90))
    painter = figures.PersonPainter(look, view, np.zeros(9, bool))
    for index, box in enumerate(figures.body_boxes(view, look)):
      frame = np.zeros((400, 400, 3), np.uint8)
      painter.paint(frame, index, [])
      rows, columns = np.nonzero(frame.any(-1))
      painted = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
      np.testing.assert_allclose(box, painted, atol=0.03 * height, err_msg=gesture)


def test_limbs_keep_their_length():
  style = poses.Style(1.1, 1.1, 1.0, poses.RIGHT, 0.3)
  for stance, gesture in itertools.product(poses.STANCES, poses.GESTURES):
    body = poses.joints(stance, gesture, np.linspace(0, 3, 40), style)
    for start, end, length in (
      (poses.SHOULDERS, poses.ELBOWS, poses.UPPER_ARM),
      (poses.ELBOWS, poses.HANDS, poses.FOREARM),
      (poses.HIPS, poses.KNEES, poses.THIGH),
      (poses.KNEES, poses.ANKLES, poses.SHIN),
    ):
      found = np.linalg.norm(body[:, start] - body[:, end], axis=-1)
      np.testing.assert_allclose(found, length, atol=1e-6, err_msg=f"{stance} {gesture}")


def test_putting_down_is_picking_up_run_backward():
  style = poses.Style(1.0, 1.0, 0.0, poses.LEFT, 0.5)
  since = np.linspace(0, 0.5, 8)
  up = poses.joints("stoop", "lift", 2 + since, style)
  down = poses.joints("stoop", "put_down", 2 - since, style)
  np.testing.assert_allclose(up, down, atol=1e-9)


def test_shaken_hands_meet():
  times = np.arange(50) / 25
  for seed in range(10):
    groups = [[[scenes.Act("stand", "shake")], [scenes.Act("stand", "shake")]]]
    scene = scenes.stage(scenes.LEVELS["easy"], groups, times, (120, 160), np.random.default_rng(seed))
    left, right = (actor.view.points[:, poses.HANDS][:, poses.RIGHT] for actor in scene.actors)
    assert np.linalg.norm(left - right, axis=-1).max() < 0.06 * scene.actors[0].view.height


def test_goes_on_after_an_interruption(tmp_path, monkeypatch):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  arguments = dict(level="easy", num_train=4, num_val=1, workers=1, **SMALL)
  synthetic.make(whole, **arguments)
  paint = figures.PersonPainter.paint
  calls = itertools.count()

  def interrupted(*args):
    if next(calls) == 250:
      raise KeyboardInterrupt
    return paint(*args)

  with monkeypatch.context() as patch:
    patch.setattr(figures.PersonPainter, "paint", interrupted)
    with pytest.raises(KeyboardInterrupt):
      synthetic.make(broken, **arguments)
  done = {path: path.stat().st_mtime_ns for path in broken.rglob("*.mp4")}
  assert 0 < len(done) < 5
  assert not (broken / "dataset.json").exists()
  (broken / "videos" / "train" / ".easy_train_00003.mp4.1.part").write_bytes(b"of a killed process")
  synthetic.make(broken, **arguments)
  assert all(path.stat().st_mtime_ns == time for path, time in done.items())
  one, two = _files(broken), _files(whole)
  assert one.keys() == two.keys()
  assert [name for name in one if one[name] != two[name]] == []


def test_a_complete_set_is_left_alone_and_another_refused(easy):
  before = {path: path.stat().st_mtime_ns for path in easy.rglob("*")}
  synthetic.make(easy, level="easy", num_train=20, num_val=1, workers=2, **SMALL)
  assert before == {path: path.stat().st_mtime_ns for path in easy.rglob("*")}
  with pytest.raises(ValueError, match=r"holds a set with level='easy', not 'full'"):
    synthetic.make(easy, level="full", num_train=20, num_val=1, **SMALL)


def test_other_videos_are_not_mixed_in(tmp_path):
  (tmp_path / "videos").mkdir()
  with pytest.raises(ValueError, match="something else"):
    synthetic.make(tmp_path, num_train=1, num_val=0, **SMALL)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"level": "hard"}, "level 'hard' is none of easy, full"),
    ({"num_train": 0, "num_val": 0}, "at least one video"),
    ({"num_train": -1}, "no negative number"),
    ({"size": (160, 20)}, "160x20"),
    ({"seconds": 1}, "seconds=1"),
    ({"seconds": 2.5}, "seconds=2.5"),
    ({"fps": 0}, "fps=0"),
    ({"seed": -1}, "seed=-1"),
    ({"workers": 0}, "workers=0"),
  ],
)
def test_bad_arguments_are_named(tmp_path, change, message):
  arguments = {"num_train": 1, "num_val": 1, **SMALL, **change}
  with pytest.raises(ValueError, match=message):
    synthetic.make(tmp_path / "set", **arguments)
  assert not (tmp_path / "set").exists()


def test_command_line(tmp_path):
  command = [sys.executable, "-m", "vad_jax.datasets.synthetic", "--output", str(tmp_path / "set")]
  small = ["--num-train", "1", "--num-val", "1", "--seconds", "2", "--size", "64x48", "--workers", "1"]
  sheet = tmp_path / "sheet.png"
  subprocess.run([*command, *small, "--contact-sheet", str(sheet)], check=True, capture_output=True)
  assert sheet.stat().st_size > 1000
  other = subprocess.run([*command, *small, "--seed", "3"], capture_output=True, text=True)
  assert other.returncode == 1
  assert other.stderr.startswith("error: ") and other.stderr.count("\n") == 1
  wrong = subprocess.run([*command, "--size", "64"], capture_output=True, text=True)
  assert wrong.returncode == 2 and "'64' is not WIDTHxHEIGHT" in wrong.stderr
