"""Boxes of people from files, at keyframes, and linked over time."""

import json
import pickle

import numpy as np
import pytest

from vad_jax import annotations, person_boxes
from vad_jax.person_boxes import PersonBoxes

CSV = """\
v,0902,0.1,0.2,0.5,0.9,1,0.75
v,0902,0.5,0.1,0.9,0.8,1,0.95
v,0902,0.5,0.1,0.9,0.8,80,0.35
other,0902,0.5,0.1,0.9,0.8,1,0.99
v,0904.5,0.2,0.2,1.5,0.9,1,0.55
v,0904.5,0.2,0.2,0.2,0.9,1,0.99
v,0906,0.2,0.2,0.4,0.9,1,0.25
"""


def write(path, text):
  path.write_text(text)
  return path


def check(people):
  np.testing.assert_array_equal(people.times, [902, 904.5, 906])
  best, alone, none = people.boxes
  np.testing.assert_allclose(best, [[0.5, 0.1, 0.9, 0.8], [0.1, 0.2, 0.5, 0.9]])
  np.testing.assert_allclose(alone, [[0.2, 0.2, 1, 0.9]])  # clipped; the other one is empty
  assert none.shape == (0, 4)
  for found, expected in zip(people.scores, ([0.95, 0.75], [0.55], []), strict=True):
    np.testing.assert_allclose(found, expected)


def test_people_of_a_csv(tmp_path):
  """A box that stands there for each of its actions is one person, of the best score."""
  check(person_boxes.read(write(tmp_path / "boxes.csv", CSV), "v", threshold=0.5))


def test_people_of_a_pickle(tmp_path):
  table = {}
  for line in CSV.splitlines():
    video, time, *box, _, score = line.split(",")
    table.setdefault(f"{video},{time}", []).append([float(x) for x in (*box, score)])
  path = tmp_path / "boxes.pkl"
  path.write_bytes(pickle.dumps({key: np.array(rows)[np.array(rows)[:, 4] != 0.35] for key, rows in table.items()}))
  check(person_boxes.read(path, "v", threshold=0.5))


def test_people_of_annotations_have_ids_and_no_scores(tmp_path):
  path = write(tmp_path / "train.csv", "v,1,0.1,0.2,0.5,0.9,12,0\nv,1,0.1,0.2,0.5,0.9,80,0\nv,1,0.5,0.2,0.7,0.9,12,7\n")
  people = person_boxes.read(path, "v", threshold=0.5)
  assert len(people.boxes[0]) == 2
  np.testing.assert_array_equal(people.scores[0], [1, 1])


def test_people_of_our_own_predictions(tmp_path):
  actor = {"box": [0.1, 0.2, 0.5, 0.9], "score": 0.8, "actions": []}
  content = {"video": "/films/a,b.mp4", "keyframes": [{"time": 0.0, "actors": []}, {"time": 1.0, "actors": [actor]}]}
  people = person_boxes.read(write(tmp_path / "x.json", json.dumps(content)), "a_b")
  np.testing.assert_array_equal(people.times, [1])
  np.testing.assert_allclose(people.scores[0], [0.8])


def test_people_at_keyframes():
  """The nearest moment counts, within a frame or two; all else is padding."""
  boxes = [np.full((1, 4), 0.25, np.float32), np.zeros((0, 4), np.float32), np.full((9, 4), 0.5, np.float32)]
  people = PersonBoxes("here", np.array([1, 2, 2.04]), boxes, [np.full(len(b), 0.5, np.float32) for b in boxes])
  assert [people.index(time) for time in (0.94, 0.96, 1.04, 1.06, 2.01, 2.03, 3)] == [None, 0, 0, None, 1, 2, None]
  batch = people.batch([1.0, 5.0, 2.04], rows=4)
  assert batch["proposals"].shape == (4, 16, 4)
  np.testing.assert_array_equal(batch["proposal_mask"].sum(1), [1, 0, 9, 0])
  for name in ("proposals", "proposal_score"):
    assert not batch[name][~batch["proposal_mask"]].any()
  np.testing.assert_array_equal(batch["proposals"][2, :9], boxes[2])
  nobody = PersonBoxes("here", np.array([]), [], [])
  assert nobody.index(0.0) is None and nobody.batch([0.0], rows=1)["proposals"].shape == (1, 8, 4)


@pytest.mark.parametrize(
  "text, message",
  [
    (CSV, "boxes.csv: no boxes of 'w'; the videos in it are: other, v"),
    ("w,1,20,30,120,200,1,0.9\n", "boxes.csv: no box of 'w' lies in the frame; expected x1, y1, x2, y2 in"),
    ("w,1,0.1\n", "boxes.csv:1: w,1,0.1; expected video,second,x1,y1,x2,y2,label,score"),
  ],
)
def test_files_that_do_not_help(tmp_path, text, message):
  with pytest.raises(annotations.AnnotationError, match=message):
    person_boxes.read(write(tmp_path / "boxes.csv", text), "w")


def test_no_such_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.csv: neither a checkpoint nor a file of person boxes"):
    person_boxes.read(tmp_path / "none.csv", "v")


def boxes_of(*boxes):
  return np.array(boxes, np.float32).reshape(-1, 4)


def test_people_are_linked_by_overlap():
  now = boxes_of([0, 0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7])
  then = boxes_of([0.52, 0.5, 0.72, 0.7], [0.8, 0, 1, 0.2], [0.04, 0, 0.24, 0.2])
  assert person_boxes.link(now, then).tolist() == [2, 0]
  assert person_boxes.link(boxes_of(), then).tolist() == []
  assert person_boxes.link(now, boxes_of()).tolist() == [-1, -1]


def test_people_keep_their_number():
  tracker = person_boxes.Tracker()
  left, right = [0, 0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7]
  frames = [(left, right), (right, [0.08, 0, 0.28, 0.2]), ([0.8, 0, 1, 0.2], [0.12, 0, 0.32, 0.2])]
  numbers = [tracker.number(time, boxes_of(*boxes)) for time, boxes in enumerate(frames)]
  assert [n.tolist() for n in numbers] == [[1, 2], [2, 1], [3, 1]]
  assert numbers[0].dtype == np.int32


@pytest.mark.parametrize(("stride", "missed", "same"), [(1, 1, True), (0.04, 49, True), (1, 2, False), (5, 0, True)])
def test_people_are_missed_for_two_seconds_at_most(stride, missed, same):
  tracker, box, nobody = person_boxes.Tracker(), boxes_of([0, 0, 0.2, 0.2]), boxes_of()
  frames = [box, *[nobody] * missed, box]
  numbers = [tracker.number(stride * index, boxes).tolist() for index, boxes in enumerate(frames)]
  assert numbers == [[1], *[[]] * missed, [1 if same else 2]]


def test_an_overlap_that_is_no_link_takes_nothing_from_one_that_is():
  """The best sum of overlaps would be 0.15 + 0.39."""
  now = boxes_of([0, 0, 1, 1], [0.61, 0, 1, 1])
  then = boxes_of([0.19, 0, 0.73, 1], [0, 0, 0.5, 1])
  assert person_boxes.link(now, then)[0] == 0
