"""Detections on their way to other tools and back, on a video of variable frame rate."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from tests import numbered_video, stand_in
from vad_jax import annotations, checkpoint, interchange, predict, predictions
from vad_jax.annotations import AnnotationError
from vad_jax.datasets import exports, prepare
from vad_jax.datasets.source_set import Problems
from vad_jax.datasets.video import VideoReader, VideoWriter
from vad_jax.interchange import __main__ as command
from vad_jax.predictions import Action, KeyframeDetections, Prediction

SIZE = (48, 80)
PIXELS = np.array([80, 48, 80, 48])
WALK, SAY, RUN = Action(2, "walk, then wave", 0.9), Action(3, "say \"<&>'", 0.71), Action(7, "走る — naïve", 0.333333)
LABEL_MAP = {2: WALK.name, 3: SAY.name, 5: "nobody does this", 7: RUN.name}


def keyframe(time: float, *people: tuple[int, list[Action]]) -> KeyframeDetections:
  """People at their places, of which the number is the first share of the box."""
  numbers = np.array([number for number, _ in people], np.int32)
  left = numbers[:, None] / 10 + time / 100
  boxes = np.concatenate([left, left + 0.031, left + 0.15, left + 0.5], 1).astype(np.float32).reshape(-1, 4)
  score = np.linspace(0.95, 0.55, len(people), dtype=np.float32)
  action_score = np.zeros((len(people), 7), np.float32)
  for row, (_, actions) in zip(action_score, people, strict=True):
    row[[action.id - 1 for action in actions]] = [action.score for action in actions]
  return KeyframeDetections(time, boxes, score, action_score, [actions for _, actions in people], numbers)


@pytest.fixture(scope="module")
def times() -> np.ndarray:
  return np.cumsum([0, *np.resize([0.02, 0.05, 0.031], 89)]).round(3)


@pytest.fixture(scope="module")
def result(tmp_path_factory, times) -> Prediction:
  """A person who is missed once, one without an action, moments without anybody, and one who comes late."""
  video = tmp_path_factory.mktemp("vidéos") / "häfen, <b> & 'c'.mp4"
  numbered_video.encode(video, times, codec="libx264")
  with VideoReader(video) as reader:
    fps = reader.fps
  keyframes = [
    keyframe(0.0, (1, [WALK, SAY])),
    keyframe(0.5, (2, []), (1, [WALK])),
    keyframe(1.0, (2, [])),
    keyframe(1.5, (1, [RUN])),
    keyframe(2.0),
    keyframe(2.5, (3, [WALK, RUN]), (1, [SAY])),
  ]
  return Prediction(video, SIZE, fps, 0, keyframes)


def on_frames(result: Prediction, times: np.ndarray) -> Prediction:
  """The same with keyframes at the times of the nearest frames."""
  return result._replace(keyframes=[k._replace(time=times[np.abs(times - k.time).argmin()]) for k in result.keyframes])


def check(found: Prediction, expected: Prediction, *, pixels: float, scores: float) -> None:
  """Everything but the order of people with the same score is equal."""
  assert (found.source, found.size, found.fps) == (expected.source, expected.size, expected.fps)
  np.testing.assert_allclose([k.time for k in found.keyframes], [k.time for k in expected.keyframes], atol=1e-6)
  for here, there in zip(found.keyframes, expected.keyframes, strict=True):
    assert here.person.tolist() == there.person.tolist() and here.person.dtype == np.int32
    assert here.boxes.dtype == here.actor_score.dtype == here.action_score.dtype == np.float32
    np.testing.assert_allclose(here.boxes * PIXELS, there.boxes * PIXELS, atol=pixels, rtol=1e-6)
    np.testing.assert_allclose(here.actor_score, there.actor_score, atol=scores)
    np.testing.assert_allclose(here.action_score, there.action_score, atol=scores)
    for mine, theirs in zip(here.actions, there.actions, strict=True):
      assert [action[:2] for action in mine] == [action[:2] for action in theirs]
      np.testing.assert_allclose([a.score for a in mine], [a.score for a in theirs], atol=scores)


def without_scores(result: Prediction, label_map: dict[int, str]) -> Prediction:
  """What CVAT keeps: ids of a label map, people in order of number and actions in that of ids, all with score 1."""
  ids = {name: index for index, name in label_map.items()}
  keyframes = []
  for frame in result.keyframes:
    if not len(frame.person):
      continue
    order = np.argsort(frame.person)
    actions = [sorted(Action(ids[a.name], a.name, 1.0) for a in frame.actions[row]) for row in order]
    score = np.zeros((len(order), 7), np.float32)
    for row, of_person in zip(score, actions, strict=True):
      row[[action.id - 1 for action in of_person]] = 1
    ones = np.ones(len(order), np.float32)
    keyframes.append(frame._replace(boxes=frame.boxes[order], actor_score=ones, action_score=score, actions=actions,
                                    person=frame.person[order]))  # fmt: skip
  return result._replace(keyframes=keyframes)


# --- there and back -------------------------------------------------------------------------------------------


def test_coco(tmp_path, result, times):
  interchange.write_coco(result, tmp_path / "a.json")
  check(interchange.read_coco(tmp_path / "a.json", result.source), on_frames(result, times), pixels=2e-3, scores=1e-6)


def test_cvat(tmp_path, result, times):
  interchange.write_cvat(result, tmp_path / "a.xml", LABEL_MAP)
  found = interchange.read_cvat(tmp_path / "a.xml", result.source, LABEL_MAP)
  check(found, without_scores(on_frames(result, times), LABEL_MAP), pixels=0.0051, scores=0)
  [label] = json.loads((tmp_path / "a.labels.json").read_text())
  assert [attribute["name"] for attribute in label["attributes"]] == list(LABEL_MAP.values())
  # Without a label map, classes are numbered in the order of the file.
  found = interchange.read_cvat(tmp_path / "a.xml", result.source)
  assert found.keyframes[-1].actions == [[Action(2, SAY.name, 1)], [Action(1, WALK.name, 1), Action(4, RUN.name, 1)]]


def test_ava(tmp_path, result):
  interchange.write_ava(result, tmp_path / "a.csv")
  found = interchange.read_ava(tmp_path / "a.csv", result.source, LABEL_MAP)
  assert [k.time for k in found.keyframes] == [0, 0.5, 1.5, 2.5]  # those with an action
  assert [k.person.tolist() for k in found.keyframes] == [[1], [1], [1], [2, 1]]
  for here in found.keyframes:
    there = next(k for k in result.keyframes if k.time == here.time)
    doing = [row for row, actions in enumerate(there.actions) if actions]
    np.testing.assert_allclose(here.boxes, there.boxes[doing], atol=2e-6)
    np.testing.assert_allclose(here.action_score, there.action_score[doing][:, : here.action_score.shape[1]], atol=1e-6)
    assert [[a[:2] for a in actions] for actions in here.actions] == [[a[:2] for a in there.actions[n]] for n in doing]
    np.testing.assert_allclose(here.actor_score, here.action_score.max(1))


def test_ava_annotations_have_ids_of_people(tmp_path, result):
  name = result.source.stem.replace(",", "_")
  rows = ["0000,0,0,0.2,1,2,4", "0000,0,0,0.2,1,3,4", "0000,0.5,0,1,1,3,0", "0002"]
  (tmp_path / "a.csv").write_text("".join(f"{name},{row}\n" for row in [*rows, "0001,0.5,0,1,1,3,4"]))
  found = interchange.read_ava(tmp_path / "a.csv", result.source)
  assert [k.time for k in found.keyframes] == [0, 1, 2]
  assert [k.person.tolist() for k in found.keyframes] == [[5, 1], [5], []]
  assert found.keyframes[0].actions[0] == [Action(2, "class 2", 1.0), Action(3, "class 3", 1.0)]


def test_supervision(result):
  import supervision as sv

  detections = interchange.to_supervision(result)
  check(interchange.from_supervision(detections, result.source), result, pixels=1e-4, scores=0)
  last = detections[2.5]
  assert isinstance(last, sv.Detections) and last.class_id.tolist() == [WALK.id, SAY.id]
  np.testing.assert_allclose(last.xyxy, result.keyframes[-1].boxes * PIXELS, rtol=1e-6)
  assert last.tracker_id.tolist() == [3, 1] and last["class_name"].tolist() == [WALK.name, SAY.name]
  assert detections[0.5].class_id.tolist() == [0, WALK.id]
  kept = {time: people[people.class_id == WALK.id] for time, people in detections.items()}
  assert [k.person.tolist() for k in interchange.from_supervision(kept, result.source).keyframes] == [
    *([1], [1], [], [], [], [3])
  ]
  last.tracker_id = None
  assert interchange.from_supervision({2.5: last, 3.0: last}, result.source).keyframes[1].person.tolist() == [1, 2]
  with pytest.raises(AnnotationError, match=r"at 1 s: no data\['actions'\]; expected what to_supervision gives"):
    interchange.from_supervision({1.0: sv.Detections(np.ones((1, 4)))}, result.source)


def test_fiftyone(result, times):
  import fiftyone as fo

  sample = interchange.to_fiftyone(result)
  check(interchange.from_fiftyone(sample), on_frames(result, times), pixels=1e-5, scores=1e-7)
  frames = {number: frame.people.detections for number, frame in sample.frames.items()}
  assert list(frames) == [1 + np.abs(times - k.time).argmin() for k in result.keyframes]
  person = frames[1][0]
  assert (person.label, person.index, person.actions) == ("person", 1, [WALK.name, SAY.name])
  np.testing.assert_allclose(person.bounding_box, [0.1, 0.131, 0.15, 0.469], atol=1e-6)
  sample.frames[200] = fo.Frame(people=fo.Detections(detections=[]))
  with pytest.raises(AnnotationError, match="has 90 frames; the sample has detections in frame 200"):
    interchange.from_fiftyone(sample)


def test_missing_packages_are_named(result, monkeypatch):
  for package, convert in (("supervision", interchange.to_supervision), ("fiftyone", interchange.to_fiftyone)):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{package} is not installed; pip install {package}"):
      convert(result)


# --- what other tools and training see ------------------------------------------------------------------------


def test_frame_numbers_are_frames(tmp_path, result):
  interchange.write_coco(result, tmp_path / "a.json")
  frames = [image["frame_id"] for image in json.loads((tmp_path / "a.json").read_text())["images"]]
  with VideoReader(result.source) as reader:
    assert numbered_video.numbers(reader.frames_at([k.time for k in result.keyframes])) == frames


def test_coco_is_read_for_training(tmp_path, result):
  interchange.write_coco(result, tmp_path / "a.json", LABEL_MAP)
  problems = Problems()
  export = exports.read(tmp_path / "a.json", problems)
  assert export.format == "coco" and export.label_map == LABEL_MAP
  [video] = export.videos
  assert video.names == [result.source.name] and len(video.moments) == 6
  found = [[(box.person, set(box.actions)) for box in video.boxes_at(moment)] for moment in video.moments]
  walk, say, run = WALK.name, SAY.name, RUN.name
  assert found == [[(1, {walk, say})], [(1, {walk})], [], [(1, {run})], [], [(3, {walk, run}), (1, {say})]]
  assert problems.counts["boxes without an action, left out"].total() == 2


def test_coco_frames_count_from_0_also_where_none_is_0(tmp_path, result, times):
  late = result._replace(keyframes=[keyframe(times[1], (1, [WALK])), keyframe(times[3], (1, []))])
  interchange.write_coco(late, tmp_path / "a.json")
  cut = late._replace(keyframes=[k._replace(action_score=k.action_score[:, :2]) for k in late.keyframes])
  check(interchange.read_coco(tmp_path / "a.json", result.source), cut, pixels=2e-3, scores=1e-6)


def test_coco_of_other_tools(tmp_path, result, times):
  """Actions are categories, boxes stand once for each, and nobody is tracked."""
  box = {"bbox": [8, 12, 40, 24], "score": 0.25}
  other = {"bbox": [60, 0, 20, 48]}
  content = {
    "videos": [{"id": 1, "name": result.source.name}, {"id": 2, "name": "another.mp4"}],
    "images": [{"id": n, "video_id": 1 + n // 2, "frame_id": 12 * n} for n in range(3)],
    "categories": [{"id": 4, "name": "sit"}, {"id": 6, "name": "eat"}],
    "annotations": [
      {"image_id": 0, "category_id": 4, **box},
      {"image_id": 0, "category_id": 6, **box, "score": 0.75},
      {"image_id": 0, "category_id": 4, **other},
      {"image_id": 1, "category_id": 4, **box},
      {"image_id": 2, "category_id": 4, **box},
    ],
  }
  (tmp_path / "a.json").write_text(json.dumps(content))
  first, second = interchange.read_coco(tmp_path / "a.json", result.source).keyframes
  assert (first.time, second.time) == (times[0], times[12])
  assert first.actions == [[Action(4, "sit", 1)], [Action(6, "eat", 0.75), Action(4, "sit", 0.25)]]
  np.testing.assert_allclose(first.boxes, [[0.75, 0, 1, 1], [0.1, 0.25, 0.6, 0.75]], atol=1e-6)
  assert first.person.tolist() == [1, 2] and second.person.tolist() == [2]


def test_cvat_tracks_end_where_people_are_missed(tmp_path, result, times):
  interchange.write_cvat(result, tmp_path / "a.xml")
  frames = [int(np.abs(times - k.time).argmin()) for k in result.keyframes]
  tracks = {}
  for track in ElementTree.parse(tmp_path / "a.xml").iter("track"):
    tracks[track.get("id")] = [(int(box.get("frame", "")), box.get("outside")) for box in track.iter("box")]
  assert tracks == {
    "1": [(frames[0], "0"), (frames[1], "0"), (frames[2], "1"), (frames[3], "0"), (frames[4], "1"), (frames[5], "0")],
    "2": [(frames[1], "0"), (frames[2], "0"), (frames[3], "1")],
    "3": [(frames[5], "0")],
  }
  rare = result._replace(keyframes=[*result.keyframes[:3], result.keyframes[5]])
  interchange.write_cvat(rare, tmp_path / "a.xml")
  last = list(ElementTree.parse(tmp_path / "a.xml").iterfind("track[@id='2']/box"))[-1]
  assert (last.get("frame"), last.get("outside")) == (
    str(frames[2] + int(1.5 * np.median(np.diff([*frames[:3], frames[5]])))),
    "1",
  )  # not up to 2.5 s


def test_cvat_of_cvat_itself(tmp_path):
  """An archive, in which most boxes are interpolated, and tracks count from 0."""
  sample = Path(__file__).parents[1] / "data" / "sample"
  xml = sample / "exports" / "cvat" / "easy_val_00000.xml"
  with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
    archive.write(xml, "annotations.xml")
  found = interchange.read(tmp_path / "task.zip", sample / "videos" / "val" / "easy_val_00000.mp4")
  tracks = list(ElementTree.parse(xml).iter("track"))
  drawn = {int(box.get("frame", "")) for box in ElementTree.parse(xml).iterfind("track/box[@keyframe='1']")}
  assert {round(k.time * 25) for k in found.keyframes} == drawn and 0 < len(drawn) < 30
  assert sorted(set().union(*(k.person.tolist() for k in found.keyframes))) == [int(t.get("id")) + 1 for t in tracks]


def test_corrections_in_cvat_are_trained_on(tmp_path):
  video = tmp_path / "videos" / "yard.mp4"
  with VideoWriter(video, size=(32, 32), fps=10) as writer:
    for index in range(30):
      writer.write(np.random.default_rng(index).integers(0, 255, (32, 32, 3), np.uint8))
  model = nnx.view(stand_in.StandIn(width=8, rngs=nnx.Rngs(0)), deterministic=True)
  loaded = checkpoint.Loaded(model, {**stand_in.INFO, "step": 0})
  found = predict.predict_video(loaded, video, actor_threshold=0, action_threshold=0, nms=None)
  interchange.write_cvat(found, tmp_path / "yard.xml")
  tree = ElementTree.parse(tmp_path / "yard.xml")
  [box] = [box for box in tree.iterfind("track[@id='1']/box") if box.get("frame") == "10"]
  for name, value in zip(("xtl", "ytl", "xbr", "ybr"), (4, 8, 20, 30), strict=True):
    box.set(name, str(value))
  for attribute in box.iter("attribute"):
    attribute.text = str(attribute.get("name") == "run").lower()
  tree.write(tmp_path / "yard.xml", encoding="utf-8")
  output = tmp_path / "set"
  prepare.main(
    [
      "custom",
      *("--source", str(video.parent)),
      *("--annotations", str(tmp_path / "yard.xml"), "--output", str(output)),
    ]
  )
  rows = annotations.read_ava_csv(output / "annotations" / "train.csv")
  names = annotations.read_label_map(output / "annotations" / "label_map.pbtxt")
  assert names == stand_in.LABEL_MAP and sorted(set(rows.timestamp)) == [0, 1, 2, 2.9]
  changed = rows.select((rows.timestamp == 1) & (rows.extra == 1))
  np.testing.assert_allclose(changed.boxes, [[4 / 32, 8 / 32, 20 / 32, 30 / 32]])
  assert changed.action.tolist() == [3]
  same = rows.select((rows.timestamp == 2) & (rows.extra == 1))
  there = found.keyframes[2]
  row = there.person.tolist().index(1)
  np.testing.assert_allclose(same.boxes, [there.boxes[row]] * 3, atol=0.006 / 32)
  assert same.action.tolist() == [1, 2, 3]


# --- what is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["outside"], "class 'outside' would not be read as an action"),
    (["none"], "class 'none' would not be read as an action"),
    (["a\x07b"], "would not be read as an action"),
    (["walk", "walk"], "class 'walk' is the name of two classes"),
    (["walk", "fly"], "class 2 is 'fly' in the detections, None in the label map"),
  ],
)
def test_classes_that_a_format_cannot_hold(tmp_path, result, names, message):
  actions = [Action(index, name, 1.0) for index, name in enumerate(names, 1)]
  wrong = result._replace(keyframes=[keyframe(0, (1, actions))])
  for write in (interchange.write_coco, interchange.write_cvat):
    with pytest.raises(AnnotationError, match=re.escape(message)):
      write(wrong, tmp_path / "a", {1: names[0]} if "fly" in names else None)
  assert not (tmp_path / "a").exists()


def test_another_video(tmp_path, result):
  with pytest.raises(AnnotationError, match="is 80 x 48, the detections are of 64 x 48; another video"):
    interchange.write_coco(result._replace(size=(48, 64)), tmp_path / "a")
  late = result._replace(keyframes=[keyframe(9.5)])
  with pytest.raises(AnnotationError, match=r"ends at 3.00 s, there are detections at 9.50 s; another video"):
    interchange.write_cvat(late, tmp_path / "a", LABEL_MAP)
  with pytest.raises(AnnotationError, match=r"nothing of .*; it has other"):
    (tmp_path / "a.csv").write_text("other,1,0,0,1,1,1,0.5\n")
    interchange.read_ava(tmp_path / "a.csv", result.source)
  with pytest.raises(AnnotationError, match="nobody does anything; name the actions"):
    interchange.write_cvat(result._replace(keyframes=[keyframe(0, (1, []))]), tmp_path / "a")


def test_keyframes_of_one_frame_are_told(tmp_path, result, caplog):
  twice = result._replace(keyframes=[keyframe(0.0, (1, [WALK])), keyframe(0.004, (1, [SAY])), keyframe(1)])
  interchange.write_coco(twice, tmp_path / "a.json")
  assert "1 keyframes left out, whose frame is that of the one before" in caplog.text
  assert interchange.read_coco(tmp_path / "a.json", result.source).keyframes[0].actions[0][0].name == WALK.name


def test_boxes_are_brought_into_the_frame(result, caplog):
  import supervision as sv

  boxes = np.array([[-8.0, 12, 40, 60], [90, 0, 100, 20]])
  people = sv.Detections(boxes, data={"actions": np.fromiter([[], []], object)})
  [found] = interchange.from_supervision({0.0: people}, result.source).keyframes
  np.testing.assert_allclose(found.boxes, [[0, 0.25, 0.5, 1]])
  assert "1 boxes left out, which are empty or outside the frame" in caplog.text


# --- command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def detections(tmp_path, result) -> Path:
  info = {"model": {"name": "stand_in"}, "step": 1, "clip": {}}
  predictions.write_json(result, tmp_path / "a_detections.json", info, {})
  return tmp_path / "a_detections.json"


def test_command_goes_around(tmp_path, detections, result, times, capsys):
  """JSON to COCO to CVAT to JSON."""
  annotations.write_label_map(tmp_path / "labels.pbtxt", {k: v.replace('"', "'") for k, v in LABEL_MAP.items()})
  video = ["--video", str(result.source)]
  assert command.main([str(detections), "--to", "coco"]) == 0
  assert command.main([str(tmp_path / "a_detections.coco.json"), "--to", "cvat", *video]) == 0
  assert "a_detections.coco.cvat.labels.json: the label, for the tab Raw" in capsys.readouterr().out
  assert (
    command.main(
      [str(tmp_path / "a_detections.coco.cvat.xml"), *video, "--to", "json", "--output", f"{tmp_path}/b.json"]
    )
    == 0
  )
  found = predictions.read_json(tmp_path / "b.json")
  expected = without_scores(on_frames(result, times), {1: WALK.name, 2: SAY.name, 3: RUN.name})
  cut = [k._replace(action_score=k.action_score[:, :3]) for k in expected.keyframes]
  check(found._replace(fps=result.fps), expected._replace(keyframes=cut), pixels=0.01, scores=0)
  assert command.main([str(detections), "--to", "ava"]) == 0
  assert command.main([str(tmp_path / "a_detections.ava.csv"), *video, "--to", "json", "--labels", "ava_80"]) == 0
  assert predictions.read_json(tmp_path / "a_detections.ava.json").keyframes[0].actions[0][0].name == "crawl"


@pytest.mark.parametrize(
  ("name", "content", "options", "message"),
  [
    ("a.txt", "hello", [], "a.txt: neither JSON of vad_jax.predict nor COCO JSON, AVA CSV or CVAT XML"),
    ("a.json", "{", [], "a.json:1: not valid JSON"),
    ("a.json", '{"keyframes": []}', [], "a.json: not detections of vad_jax.predict: 'video' is missing"),
    ("a.csv", "a,1,0,0,1,1,1,0.5\n", [], "a.csv: does not say where its video is; give it with --video"),
    ("a.csv", "VIDEO,1,0,0,1,1,4,0.5\n", ["--labels", "LABELS"], "a.csv: class 4 is not in the label map"),
    ("a.csv", "VIDEO,1,0,0,1,1,4,0.5\n", ["--video", "b.mp4"], "a.csv: nothing of 'b'; it has"),
    ("none.csv", None, [], "No such file"),
  ],
)
def test_command_says_what_is_wrong(tmp_path, result, capsys, name, content, options, message):
  video = result.source.stem.replace(",", "_")
  annotations.write_label_map(tmp_path / "labels.pbtxt", {1: "walk"})
  options = [str(tmp_path / "labels.pbtxt") if option == "LABELS" else option for option in options]
  if content is not None:
    (tmp_path / name).write_text(content.replace("VIDEO", video))
  if "LABELS" in str(options).upper():
    options += ["--video", str(result.source)]
  assert command.main([str(tmp_path / name), "--to", "coco", *options]) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_command_replaces_nothing(detections, result, capsys):
  for options in (["json", "--output", str(detections)], ["json"]):
    assert command.main([str(detections), "--to", *options]) == 1
    assert "a_detections.json: is there already; choose another --output" in capsys.readouterr().err
  moved = detections.with_name("moved.json")
  moved.write_text(detections.read_text().replace(str(result.source), "/nowhere/x.mp4"))
  assert command.main([str(moved), "--to", "cvat"]) == 1
  assert "/nowhere/x.mp4: the video of these detections is not there; say where it is (--video)" in (
    capsys.readouterr().err
  )
