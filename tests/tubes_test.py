"""Files of tube data sets: every form that is read, and what is said about bad ones."""

import json
import pickle

import numpy as np
import pytest

from vad_jax import tubes
from vad_jax.annotations import AnnotationError
from vad_jax.tubes import TubeDetections, positions, read_detections, read_ground_truth, write_detections

_TUBE = [[1, 10.0, 20.0, 30.0, 40.0], [2, 11.0, 21.0, 31.0, 41.0], [5, 12.0, 22.0, 32.0, 42.0]]
_HEADER = "video,frame,query,x1,y1,x2,y2,actor,s0,s1"
_ROWS = ["run/a,1,0,10,20,30,40,0.9,0.25,0.5", "run/a,1,1,50,20,70,40,0.8,0.75,0.125", "walk/b,3,0,1,2,3,4,1,0,1"]


def _content():
  """A published ground truth of two splits."""
  return {
    "labels": ["run", "walk"],
    "gttubes": {"run/a": {0: [np.array(_TUBE, np.float32)]}, "walk/b": {1: [np.array(_TUBE[:2])] * 2}},
    "nframes": {"run/a": 5, "walk/b": 7, "walk/hidden": 9},
    "resolution": {"run/a": (240, 320), "walk/b": (240, 320), "walk/hidden": (720, 1280)},
    "train_videos": [["walk/b"], ["run/a"]],
    "test_videos": [["run/a"], ["walk/b"]],
  }


def _json(**changes):
  videos = {"run/a": {"nframes": 5, "resolution": [240, 320], "tubes": [{"label": 0, "boxes": _TUBE}]}}
  return {"labels": ["run", "walk"], "test_videos": ["run/a"], "videos": videos} | changes


def _write(path, content):
  path.write_text(content if isinstance(content, str) else "\n".join(content) + "\n")
  return path


@pytest.mark.parametrize("protocol", [2, 5])
def test_published_pickle(protocol, tmp_path):
  path = tmp_path / "GT.pkl"
  path.write_bytes(pickle.dumps(_content(), protocol=protocol))
  truth = read_ground_truth(path)
  assert truth.labels == ["run", "walk"]
  assert truth.splits == [(["walk/b"], ["run/a"]), (["run/a"], ["walk/b"])]
  assert [video.num_frames for video in truth.videos.values()] == [5, 7, 9]
  assert truth.videos["walk/hidden"] == tubes.Video(9, (720, 1280), [])
  assert [tube.label for tube in truth.videos["walk/b"].tubes] == [1, 1]
  np.testing.assert_array_equal(truth.videos["run/a"].tubes[0].boxes, _TUBE)
  assert truth.videos["run/a"].tubes[0].boxes.dtype == np.float64


def test_pickle_of_python_2(tmp_path):
  # As Python 2 wrote it: byte strings, and an array by way of the old name of NumPy's module.
  path = tmp_path / "GT.pkl"
  boxes = np.array([[1.0, 2, 3, 4, 5]])
  array = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nI5\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\n"
    b"tR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS" + repr(boxes.tobytes().decode("latin1")).encode("latin1") + b"\ntb"
  )
  path.write_bytes(
    b"(dS'labels'\n(lS'run'\nasS'gttubes'\n(dS'a'\n(dI0\n(l" + array + b"asssS'nframes'\n(dS'a'\nI3\nss"
    b"S'resolution'\n(dS'a'\n(I240\nI320\ntssS'train_videos'\n(l(lasS'test_videos'\n(l(lS'a'\naas."
  )
  truth = read_ground_truth(path)
  assert truth.splits == [([], ["a"])]
  np.testing.assert_array_equal(truth.videos["a"].tubes[0].boxes, boxes)


def test_json(tmp_path):
  truth = read_ground_truth(_write(tmp_path / "gt.json", json.dumps(_json())))
  assert truth.splits == [([], ["run/a"])]
  assert truth.videos["run/a"].size == (240, 320)
  np.testing.assert_array_equal(truth.videos["run/a"].tubes[0].boxes, _TUBE)
  splits = _json(test_videos=[["run/a"], []], train_videos=[[], ["run/a"]])
  splits["videos"]["run/a"]["tubes"][0]["boxes"] = _TUBE[::-1]
  truth = read_ground_truth(_write(tmp_path / "gt.json", json.dumps(splits)))
  assert truth.splits == [([], ["run/a"]), (["run/a"], [])]
  np.testing.assert_array_equal(truth.videos["run/a"].tubes[0].boxes, _TUBE)


def test_boxes_behind_the_end_make_a_video_longer(tmp_path, caplog):
  truth = read_ground_truth(_write(tmp_path / "gt.json", json.dumps(_box(nframes=4, resolution=None))))
  assert truth.videos["run/a"].num_frames == 5
  assert truth.videos["run/a"].size is None
  assert "run/a has boxes up to frame 5; taken for its length, not 4" in caplog.text


def test_ground_truth_lines(tmp_path):
  lines = [
    "v_0_00 [0.0, 1.0, 1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 0.0]",
    "v_0_00 [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]",
    "v_0_02 [0.0, 3.0, 1.0, 2.0, 3.0, 5.0, 0.0, 1.0, 0.0]",
    "v_0_02 [0.0, 3.0, 5.0, 6.0, 7.0, 8.0, 1.0, 0.0, 0.0]",
    "v_1_01 [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]",
  ]
  truth = read_ground_truth(_write(tmp_path / "GT.txt", lines))
  assert truth.labels == ["class 1", "class 2"]
  assert truth.splits == [([], ["v_0", "v_1"])]
  first, second = truth.videos["v_0"].tubes
  assert (first.label, first.boxes.tolist()) == (1, [[1, 1, 2, 3, 4], [3, 1, 2, 3, 5]])
  assert (second.label, second.boxes.tolist()) == (0, [[3, 5, 6, 7, 8]])
  assert truth.videos["v_1"] == tubes.Video(2, None, [])
  # Evaluation on several devices may write a video twice.
  assert len(read_ground_truth(_write(tmp_path / "GT.txt", lines + lines)).videos["v_0"].tubes) == 2
  # Frames that count from 1.
  truth = read_ground_truth(_write(tmp_path / "GT.txt", lines[2:]))
  assert truth.videos["v_0"].tubes[0].boxes.tolist() == [[2, 1, 2, 3, 5]]


def test_query_csv(tmp_path):
  found = read_detections(_write(tmp_path / "dets.csv", [_HEADER, *_ROWS]), 2)
  assert found.videos == ["run/a", "walk/b"]
  assert found.video.tolist() == [0, 0, 1]
  assert found.frame.tolist() == [1, 1, 3]
  assert found.boxes.tolist() == [[[10, 20, 30, 40]], [[50, 20, 70, 40]], [[1, 2, 3, 4]]]
  assert found.actor.tolist() == [0.9, 0.8, 1]
  assert found.scores.tolist() == [[0.25, 0.5], [0.75, 0.125], [0, 1]]
  assert (found.boxes.dtype, found.actor.dtype, found.scores.dtype) == (np.float64, np.float64, np.float32)


def test_reading_in_parts(tmp_path, monkeypatch):
  path = _write(tmp_path / "dets.csv", [_HEADER, *_ROWS])
  whole = read_detections(path, 2)
  monkeypatch.setattr(tubes, "_CHUNK", 10)
  for a, b in zip(read_detections(path, 2), whole, strict=True):
    np.testing.assert_array_equal(a, b)
  _write(path, [_HEADER, *_ROWS, "run/a,2,0,x,20,30,40,1,0,0"])
  with pytest.raises(AnnotationError, match=r"dets.csv:5: 'x' is not a number"):
    read_detections(path, 2)


def test_box_csv(tmp_path):
  lines = [
    "b,3,1,2,3,4,2,0.5",
    "a,1,10,20,30,40,1,0.25",
    "b,3,1,2,3,4,1,0.125",  # the box of the first line, as another class
    "b,3,1,2,3,4,2,0.75",  # and once more, as the same: another detection
    "b,4,1,2,3,4,1,0.5",
  ]
  found = read_detections(_write(tmp_path / "dets.csv", lines), 3)
  assert [found.videos[k] for k in found.video] == ["b", "a", "b", "b"]
  assert found.frame.tolist() == [3, 1, 3, 4]
  nan = np.nan
  np.testing.assert_array_equal(found.scores, [[0.125, 0.5, nan], [0.25, nan, nan], [nan, 0.75, nan], [0.5, nan, nan]])
  assert found.boxes[1].tolist() == [[10, 20, 30, 40]]
  assert np.isnan(found.actor).all()


def test_detection_lines(tmp_path, caplog):
  lines = [
    "v_0_01 [1.0, 2.0, 3.0, 4.0, 0.25, 0.5, 0.75]",
    "v_0_00 [1.0, 2.0, 3.0, 4.0, 0.25, 0.5, 0.699999988079071]",
    "v_0_01 [1.0, 2.0, 3.0, 4.0, 0.25, 0.5, 0.75]",
    "v_0_01 [1.0, 2.0, 2.0, 4.0, 0.25, 0.5, 0.75]",
  ]
  found = read_detections(_write(tmp_path / "dets.txt", lines), 2)
  assert found.videos == ["v_0"]
  assert found.frame.tolist() == [2, 1, 2]
  assert found.boxes[:, 0, 2].tolist() == [3, 3, 2]
  assert found.scores.tolist() == [[0.25, 0.5]] * 3
  assert found.actor[1] == 0.699999988079071  # below 0.7, and in float32 it were not
  assert "1 lines repeat others" in caplog.text
  assert read_detections(_write(tmp_path / "dets.txt", lines[:1]), 2).frame.tolist() == [1]


def test_inverted_detections_are_counted(tmp_path, caplog):
  read_detections(_write(tmp_path / "dets.csv", ["a,1,5,2,3,4,1,0.5", "a,1,1,2,3,4,1,0.5"]), 1)
  assert "1 of 2 detections are inverted" in caplog.text


def test_tubelets_come_back_as_they_were(tmp_path):
  rng = np.random.default_rng(0)
  scores = rng.random((2, 3), np.float32)
  scores[0, 1] = np.nan
  found = TubeDetections(
    ["é/a", "b"], np.array([1, 0], np.int32), np.array([1, 7], np.int32), rng.random((2, 5, 4)), np.ones(2), scores
  )
  write_detections(tmp_path / "tubelets.anything", found)
  for a, b in zip(read_detections(tmp_path / "tubelets.anything", 3), found, strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(AnnotationError, match=r"of shapes .*\(2, 3\).* expected .*\(2, 4\)"):
    read_detections(tmp_path / "tubelets.anything", 4)
  data = (tmp_path / "tubelets.anything").read_bytes()
  (tmp_path / "short.npz").write_bytes(data[: len(data) // 2])
  with pytest.raises(AnnotationError, match=r"short.npz: not what write_detections writes, or damaged"):
    read_detections(tmp_path / "short.npz", 3)


@pytest.mark.parametrize(
  ("changes", "complaint"),
  [
    ({"frame": np.array([0, 1])}, "a row's video is none of the 1, or its frame less than 1"),
    ({"video": np.array([0, 1])}, "a row's video is none of the 1"),
    ({"boxes": np.full((2, 1, 4), np.nan)}, "a box is not finite"),
    ({"boxes": np.ones((2, 4))}, "of shapes"),
  ],
)
def test_bad_npz(changes, complaint, tmp_path):
  ones = np.ones(2, np.int32)
  found = TubeDetections(["a"], 0 * ones, ones, np.ones((2, 1, 4)), np.ones(2), np.ones((2, 1), np.float32))
  write_detections(tmp_path / "x.npz", found._replace(**changes))
  with pytest.raises(AnnotationError, match=complaint):
    read_detections(tmp_path / "x.npz", 1)


@pytest.mark.parametrize(
  ("lines", "complaint"),
  [
    ([], "the file is empty"),
    (["", "a,1,1,2,3,4,1,0.5"], "empty"),
    ([_HEADER], "dets: no rows"),
    ([_HEADER.replace("actor", "person"), *_ROWS], r"dets:1: the header is .*; expected .*actor,s0..s1"),
    ([_HEADER + ",s2", *_ROWS], r"dets:1: the header is"),
    ([_HEADER, *_ROWS, _ROWS[1]], r"dets:5: query 1 of frame 1 stands twice"),
    ([_HEADER, _ROWS[0], "", _ROWS[1]], r"dets:3: the line is empty"),
    ([_HEADER, _ROWS[0], _ROWS[1] + ",1"], r"dets:3: 10 numbers, the frame included; expected 9"),
    ([_HEADER, _ROWS[0].replace(",1,0", ",0,0")], r"dets:2: frame 0; frames are whole numbers from 1 up"),
    ([_HEADER, _ROWS[0].replace("0.25", "nan")], r"dets:2: a number is not finite"),
    (["a,1,1,2,3,4,1,0.5", "a,1.5,1,2,3,4,1,0.5"], r"dets:2: frame 1.5; frames are whole numbers"),
    (["a,1,1,2,3,4,1,0.5", ",1,1,2,3,4,1,0.5"], r"dets:2: the line is empty, names no video"),
    (["a,1,1,2,3,4,1"], r"dets:1: 6 numbers, the frame included; expected 7"),
    (["a,1,1,2,3,4,0,0.5"], r"dets:1: class id 0; expected one of 1 to 2"),
    (["a,1,1,2,3,4,1,0.5", "a,1,1,2,3,4,3,0.5"], r"dets:2: class id 3; expected one of 1 to 2"),
    (["a_00 [1, 2, 3, 4, 0.5, 0.5, 1]", "a [1, 2, 3, 4, 0.5, 0.5, 1]"], r"dets:2: the line .* is unlike the first"),
    (["a_00 [1, 2, 3, 4, 0.5, 1]"], r"dets:1: 7 numbers, the frame included; expected 8"),
    (["# not detections"], "dets:1"),
  ],
)
def test_bad_detections_are_named(lines, complaint, tmp_path):
  with pytest.raises(AnnotationError, match=complaint):
    read_detections(_write(tmp_path / "dets", lines if lines else ""), 2)


def _box(**changes):
  content = _json()
  content["videos"]["run/a"] |= changes
  return content


@pytest.mark.parametrize(
  ("content", "complaint"),
  [
    ("{", "gt: not JSON"),
    ({"labels": []}, "gt: the key 'videos' is missing; expected labels, test_videos"),
    (_json(videos=[1]), "gt: unexpected content"),
    (_json(test_videos=["b"]), "gt: the test video b is not annotated"),
    (_json(test_videos=[["run/a"]], train_videos=[[], []]), "gt: 2 splits of train_videos, but 1 of test_videos"),
    (_json(labels=[]), "run/a: label 0, but there are 0 labels"),
    (_box(resolution=240), "gt: unexpected content"),
    (_box(tubes=[{"label": "run", "boxes": _TUBE}]), "run/a: label 'run'; expected an index"),
    (_box(tubes=[{"label": -1, "boxes": _TUBE}]), "run/a: label -1; expected an index"),
    (_box(tubes=[{"label": 0, "boxes": [[1, 2, 3, 4]]}]), "run/a: a tube of class 0 is not a table"),
    (_box(tubes=[{"label": 0, "boxes": []}]), "run/a: a tube of class 0 is not a table"),
    (_box(tubes=[{"label": 0, "boxes": [_TUBE[0], _TUBE[0]]}]), "frames other than 1, 2"),
    (_box(tubes=[{"label": 0, "boxes": [[0, 1, 2, 3, 4]]}]), "frames other than 1, 2"),
    (_box(tubes=[{"label": 0, "boxes": [[1, 5, 2, 3, 4]]}]), r"frame 1: the box \[5.0, 2.0, 3.0, 4.0\] is inverted"),
  ],
)
def test_bad_ground_truth_is_named(content, complaint, tmp_path):
  path = _write(tmp_path / "gt", content if isinstance(content, str) else json.dumps(content))
  with pytest.raises(AnnotationError, match=complaint):
    read_ground_truth(path)


def test_other_files_as_ground_truth(tmp_path):
  path = tmp_path / "gt"
  for data in (b"", b"hello\n", pickle.dumps({"a": 1}), pickle.dumps([1]), pickle.dumps(print)):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="gt: ") as caught:
      read_ground_truth(path)
    assert "\n" not in str(caught.value)
  with pytest.raises(FileNotFoundError):
    read_ground_truth(tmp_path / "nothing")


def test_ground_truth_lines_of_two_classes(tmp_path):
  lines = [f"v_0{k} [0, 1, 1, 2, 3, 4, {1 - k}, {k}, 0]" for k in (0, 1)]
  with pytest.raises(AnnotationError, match="v: the boxes of tube 1 are not all of one class"):
    read_ground_truth(_write(tmp_path / "gt", lines))
  with pytest.raises(AnnotationError, match="gt:1: 6 numbers; expected video index, frame, box and classes"):
    read_ground_truth(_write(tmp_path / "gt", "v_00 [0, 1, 1, 2, 3, 4]"))


def test_positions():
  assert positions(np.array([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]
  assert positions(np.empty(0, np.int64)).tolist() == []


def test_people_with_several_actions_become_tubes(tmp_path):
  """Frames count from 1 then; what goes on is one tube, what is done again another one."""
  labels = [(14, 0, 2), (79, 2, 4), (14, 4, 5), (79, 4, 5)]
  person = {
    "boxes": [[frame, 0.1 * frame, 0.5, 0.5, 1] for frame in range(5)],
    "labels": [{"id": k, "start_frame": a, "end_frame": b} for k, a, b in labels],
  }
  video = {"fps": 25, "num_frames": 6, "size": [50, 100], "tubes": [person]}
  path = tmp_path / "val_tubes.json"
  path.write_text(json.dumps({"a": video}))
  truth = tubes.read_person_tubes([None, path], {79: "talk", 14: "walk"})
  assert (truth.labels, truth.splits) == (["walk", "talk"], [([], ["a"])])
  assert truth.videos["a"][:2] == (6, (50, 100)) and truth.videos["a"].fps == 25
  assert [(tube.label, tube.boxes[:, 0].tolist()) for tube in truth.videos["a"].tubes] == [
    (0, [1, 2]),
    (0, [5]),
    (1, [3, 4, 5]),
  ]
  np.testing.assert_allclose(truth.videos["a"].tubes[2].boxes[0], [3, 20, 25, 50, 50])

  tubes.write_ground_truth(tmp_path / "truth.json", truth)
  again = tubes.read_ground_truth(tmp_path / "truth.json")
  assert again._replace(videos={}) == truth._replace(videos={})
  for tube, expected in zip(again.videos["a"].tubes, truth.videos["a"].tubes, strict=True):
    assert tube.label == expected.label
    np.testing.assert_array_equal(tube.boxes, expected.boxes)

  path.write_text(json.dumps({"a": {**video, "tubes": [{**person, "labels": [{"id": 14}]}]}}))
  with pytest.raises(AnnotationError, match=r"val_tubes\.json: the key 'start_frame' is missing"):
    tubes.read_person_tubes([None, path], {14: "walk"})
