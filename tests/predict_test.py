"""Prediction on video files, with a stand-in model whose answers say which frames it was shown."""

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import av
import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.clip_readers import CLIP, LABEL_MAP, LOADED, ClipReader, ClipReaderOfPeople, TubeReader
from vad_jax import annotations, checkpoint, models, predict, predictions
from vad_jax.datasets.loader import ClipSpec, KeyframeDataset, VideoFrames, eval_batches
from vad_jax.datasets.video import VideoError, VideoReader, VideoWriter

FPS = 30.0


@pytest.fixture(scope="module")
def loaded():
  return LOADED


@pytest.fixture(scope="module")
def of_people(loaded):
  return loaded._replace(model=ClipReaderOfPeople(), info={**loaded.info, "model": {"name": "of people"}})


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
  """Four seconds that brighten by 1 / 128 a frame, with sound."""
  path = tmp_path_factory.mktemp("videos") / "ramp.mp4"
  silent = path.with_name("silent.mp4")
  with VideoWriter(silent, size=(64, 80), fps=FPS) as writer:
    for index in range(120):
      writer.write(np.full((64, 80, 3), 2 * index, np.uint8))
  with av.open(str(silent)) as source, av.open(str(path), "w") as target:
    video = target.add_stream_from_template(source.streams.video[0])
    sound = target.add_stream("aac", rate=16_000, layout="mono")
    for packet in source.demux(video=0):
      if packet.dts is not None:
        packet.stream = video
        target.mux(packet)
    for start in range(0, 64_000, 1024):
      tone = np.sin(np.arange(start, start + 1024) / 10, dtype=np.float32)[None]
      frame = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
      frame.sample_rate, frame.pts = 16_000, start
      target.mux(sound.encode(frame))
    target.mux(sound.encode(None))
  return path


def expected_scores(time):
  """Brightness of a clip's first, middle and last frame, clamped to the video."""
  offsets = np.array([-4, 0, 3]) * CLIP["frame_stride"]
  return np.clip(round(time * FPS) + offsets, 0, 119) * 2 / 255


@pytest.mark.parametrize("batch_size", [1, 3])
def test_clips_are_read_at_the_keyframes(loaded, ramp, batch_size):
  result = predict.predict_video(loaded, ramp, batch_size=batch_size)
  assert [keyframe.time for keyframe in result.keyframes] == [0, 1, 2, 3]
  for keyframe in result.keyframes:
    np.testing.assert_allclose(keyframe.action_score[0], expected_scores(keyframe.time), atol=0.012)
  assert result.csv is result.json is result.video is None


def test_people_are_found_by_another_model(loaded, of_people, ramp):
  alone = predict.predict_video(loaded, ramp)
  result = predict.predict_video(of_people, ramp, boxes=loaded)
  for found, keyframe in zip(alone.keyframes, result.keyframes, strict=True):
    np.testing.assert_array_equal(keyframe.boxes, found.boxes)
    np.testing.assert_array_equal(keyframe.actor_score, found.actor_score)
    np.testing.assert_allclose(keyframe.action_score, np.tile(expected_scores(keyframe.time), (2, 1)), atol=0.012)


def test_people_come_from_a_file(of_people, ramp, tmp_path):
  boxes = tmp_path / "boxes.csv"
  boxes.write_text("ramp,1,0.1,0.2,0.3,0.4,1,0.6\nramp,3,0.5,0.2,0.9,0.4,1,0.4\nramp,3.02,0.1,0.2,0.7,0.4,1,0.9\n")
  result = predict.predict_video(of_people, ramp, tmp_path / "out", boxes=boxes, draw=False)
  assert [len(keyframe.boxes) for keyframe in result.keyframes] == [0, 1, 0, 0]  # the third second's is below 0.5
  assert json.loads(result.json.read_text())["settings"]["boxes"] == str(boxes)
  boxes.write_text("ramp,1.5,0.1,0.2,0.3,0.4,1,0.6\n")
  with pytest.raises(ValueError, match=r"boxes of .*ramp\.mp4 are at 1\.5, \.\.\. seconds and at no keyframe"):
    predict.predict_video(of_people, ramp, boxes=boxes)


def test_models_that_need_people_say_so(loaded, of_people, ramp, monkeypatch, capsys):
  assert run(of_people, monkeypatch, "--video", ramp) == 1
  assert "of people classifies given people: name a model that finds them, or a file" in capsys.readouterr().err
  assert run(loaded, monkeypatch, "--video", ramp, "--boxes", "boxes.csv") == 1
  assert capsys.readouterr().err == "error: stand-in finds people itself: leave --boxes out\n"
  assert run(of_people, monkeypatch, "--video", ramp, "--boxes", "none.csv") == 1
  assert capsys.readouterr().err == "error: none.csv: neither a checkpoint nor a file of person boxes\n"


@pytest.fixture(scope="module")
def checkpoint_of_evad(tmp_path_factory):
  model = {"name": "evad", "variant": "quickstart", "num_classes": 3}
  info = {
    "model": model,
    "clip": CLIP,
    "canvas": [64, 96],
    "short_side": 64,
    "label_map": LABEL_MAP,
    "step": 1,
    "metrics": {},
  }
  _, params, rest = checkpoint.split_model(models.build(**model, rngs=nnx.Rngs(0)))
  directory = tmp_path_factory.mktemp("checkpoint") / "evad"
  checkpoint.save_inference(directory, params, rest, info)
  return directory


def test_a_real_model_finds_what_it_finds_in_evaluation(checkpoint_of_evad, ramp, tmp_path, capsys):
  times = [0.0, 1.0, 2.0, 3.0]
  empty = np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32), np.zeros(0, np.int64)
  dataset = KeyframeDataset(
    [annotations.Keyframe("ramp", time, *empty) for time in times],
    VideoFrames(ramp.parent),
    ClipSpec(**CLIP),
    LABEL_MAP,
  )
  (batch,) = eval_batches(dataset, batch_size=4, canvas=(64, 96), short_side=64, max_boxes=1)
  model = predict.load(checkpoint_of_evad).model
  expected = nnx.jit(lambda model, batch: model.detections(model(batch), batch))(model, batch)

  arguments = ["--video", str(ramp), "--output-dir", str(tmp_path), "--actor-threshold", "0", "--no-video"]
  assert predict.main(["--checkpoint", str(checkpoint_of_evad), *arguments]) == 0
  assert re.search(
    r"120 frames in [\d.]+ s: [\d.]+ a second, [\d.]+ times as fast as they are", capsys.readouterr().out
  )
  found = json.loads((tmp_path / "ramp_detections.json").read_text())["keyframes"]
  assert [keyframe["time"] for keyframe in found] == times
  for row, keyframe in enumerate(found):
    order = np.argsort(-expected.actor_score[row], stable=True)
    order = order[(expected.boxes[row, order, 2:] > expected.boxes[row, order, :2]).all(-1)]  # empty ones go
    scores = [actor["score"] for actor in keyframe["actors"]]
    np.testing.assert_allclose(scores, expected.actor_score[row][order], atol=1e-3)
    boxes = [actor["box"] for actor in keyframe["actors"]]
    np.testing.assert_allclose(boxes, expected.boxes[row][order], atol=2e-3)


def test_every_frame_is_a_keyframe(loaded, ramp):
  result = predict.predict_video(loaded, ramp, stride=None, batch_size=16)
  assert len(result.keyframes) == 120
  for keyframe in result.keyframes:
    np.testing.assert_allclose(keyframe.action_score[0], expected_scores(keyframe.time), atol=0.012)


def test_thresholds_order_and_top_k(loaded, ramp):
  (_, _, keyframe, _) = predict.predict_video(loaded, ramp, action_threshold=0.45, top_k=1).keyframes
  np.testing.assert_allclose(keyframe.actor_score, [0.9, 0.6])  # the best first, the invalid one gone
  np.testing.assert_allclose(keyframe.boxes[0], [0.1, 0.2, 0.3, 0.4])
  assert [action.name for action in keyframe.actions[0]] == ["last frame"]
  assert keyframe.actions[1] == []
  assert not len(predict.predict_video(loaded, ramp, actor_threshold=0.95).keyframes[0].boxes)


def test_files(loaded, ramp, tmp_path):
  result = predict.predict_video(loaded, ramp, tmp_path / "new" / "out", stride=0.5)
  rows = annotations.read_ava_csv(result.csv)
  assert set(rows.video) == {"ramp"}
  assert rows.timestamp.tolist() == sorted(rows.timestamp) and rows.timestamp.max() == 3.5
  np.testing.assert_allclose(rows.boxes[0], [0.1, 0.2, 0.3, 0.4])

  content = json.loads(result.json.read_text())
  assert (content["width"], content["height"], content["fps"], content["model"]["step"]) == (80, 64, FPS, 7)
  assert len(content["keyframes"]) == 8
  best = content["keyframes"][4]["actors"][0]["actions"][0]
  assert best["name"] == "last frame" and best["score"] == pytest.approx(expected_scores(2)[2], abs=0.012)

  with VideoReader(result.video) as reader:
    assert reader.fps == FPS and reader.size[0] >= 360  # enlarged, so that captions are readable
    frames = [(time, frame) for time, frame in reader]
  np.testing.assert_allclose([time for time, _ in frames], np.arange(120) / FPS, atol=1e-3)
  for index in (0, 59, 119):  # the border of a box stands out, the rest is the source
    height, width = frames[index][1].shape[:2]
    assert abs(int(frames[index][1][int(0.95 * height), int(0.05 * width)].mean()) - 2 * index) < 8
    row = frames[index][1][int(0.3 * height), : int(0.2 * width)].astype(int)
    assert np.ptp(row) > 30
  with av.open(str(result.video)) as container:
    sound = container.streams.audio[0]
    assert float(sound.duration * sound.time_base) == pytest.approx(4, abs=0.2)


def test_maps_on_request(loaded, ramp, tmp_path, monkeypatch):
  graph = type(loaded.model)
  maps = lambda self, out, batch: {"left": jnp.broadcast_to(jnp.array([1.0, 0.0]), (len(batch["key"]), 1, 2))}  # noqa: E731
  monkeypatch.setattr(graph, "maps", maps, raising=False)
  result = predict.predict_video(loaded, ramp, tmp_path, draw=False, save_maps=True)
  assert result.maps == tmp_path / "ramp_maps"
  pictures = sorted(result.maps.iterdir())
  assert [picture.name for picture in pictures] == [f"000{time}.000.png" for time in range(4)]
  sheet = cv2.imread(str(pictures[1]))[8:-8]
  heat = sheet[:, 8 : 8 + (sheet.shape[1] - 4 * 8) // 3]
  assert heat[:, :100].mean() > heat[:, -100:].mean() + 50


class Looker(ClipReader):
  """Slot 0 looks to the left for class 3, slot 1 to the right; what is below is padding."""

  def maps(self, out, batch):
    attention = jnp.zeros((len(batch["key"]), 3, 3, 4, 6)).at[:, 0, 2, 1, 0].set(0.5).at[:, 1, 2, 1, 4].set(0.25)
    return {"attention": attention.at[..., 3, :].set(9)}


def test_attention_of_each_person_and_class(loaded, ramp, tmp_path):
  info = {**loaded.info, "label_map": {2: "middle", 3: "last / frame"}}
  loaded = loaded._replace(model=Looker(), info=info)
  result = predict.predict_video(loaded, ramp, tmp_path, draw=False, save_maps=True, action_threshold=0.0)
  names = sorted(str(path.relative_to(result.maps)) for path in result.maps.rglob("*") if path.is_file())
  assert [name for name in names if name.startswith("0002.000")] == [
    "0002.000.npz",
    "0002.000.png",
    "0002.000/person1_class2_middle.png",
    "0002.000/person1_class3_last_frame.png",
    "0002.000/person2_class2_middle.png",
    "0002.000/person2_class3_last_frame.png",
  ]
  with np.load(result.maps / "0002.000.npz") as arrays:
    assert set(arrays) >= {"time", "boxes", "actor_score", "action_score", "attention", "class_id", "class_name"}
    assert arrays["person"].tolist() == [1, 2]
    assert arrays["class_name"].tolist() == ["", "middle", "last / frame"]
    # The first person is slot 1. The placed video is 48 of 64 rows high and 60 of 64 columns wide.
    assert arrays["attention"].shape == (2, 3, 3, 6)
    np.testing.assert_allclose(arrays["attention"][0, 2, 1], [0, 0, 0, 0, 0.25, 0])
    np.testing.assert_allclose(arrays["attention"][1, 2, 1], [0.5, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(arrays["boxes"], result.keyframes[2].boxes)
  left = cv2.imread(str(result.maps / "0002.000" / "person2_class3_last_frame.png")).astype(int)
  right = cv2.imread(str(result.maps / "0002.000" / "person1_class3_last_frame.png")).astype(int)
  height, width = left.shape[:2]
  bright = (left - right)[height // 3 : 2 * height // 3].mean((0, 2))
  assert bright[: width // 6].mean() > 50 and bright[-width // 3 : -width // 6].mean() < -50


@pytest.fixture(scope="module")
def of_tubes(loaded):
  clip = {"num_frames": 16, "frame_stride": 1, "fps": 25.0}
  info = {**loaded.info, "model": {"name": "of tubes"}, "clip": clip, "label_map": {1: "bright", 2: "dark"}}
  return loaded._replace(model=TubeReader(), info=info)


def test_tubes_answer_for_every_frame_once(of_tubes, ramp, tmp_path):
  """120 frames in clips of 16: the first clip begins with four frames that fill it up."""
  result = predict.predict_video(of_tubes, ramp, tmp_path, batch_size=3)
  times = np.arange(120) / FPS
  np.testing.assert_allclose([keyframe.time for keyframe in result.keyframes], times, atol=1e-6)
  for index, keyframe in enumerate(result.keyframes):
    np.testing.assert_allclose(keyframe.boxes[:, 0], [(index + 4) % 16 / 1000], atol=1e-6)
    np.testing.assert_allclose(keyframe.action_score[0, 0], 2 * index / 255, atol=0.012)
  # Frames 39 to 119 are brighter than 0.3, and frames 0 to 89 darker than 0.7. The box jumps back a little
  # where a clip ends.
  assert [tube.action.name for tube in result.tubes] == ["dark", "bright"]
  for tube, frames in zip(result.tubes, (np.arange(90), np.arange(39, 120)), strict=True):
    assert abs(len(tube.times) - len(frames)) <= 2
    assert tube.action.score == pytest.approx(
      np.mean(2 * frames / 255 if tube.action.id == 1 else 1 - 2 * frames / 255), abs=0.02
    )
    np.testing.assert_allclose(tube.boxes[:, 0], (np.rint(tube.times * FPS) + 4) % 16 / 1000, atol=1e-6)

  content = json.loads(result.json.read_text())
  assert [keyframe["time"] for keyframe in content["keyframes"]] == [round(index / FPS, 6) for index in range(120)]
  assert [(tube["id"], tube["action"]["name"], len(tube["boxes"])) for tube in content["tubes"]] == [
    (number, tube.action.name, len(tube.times)) for number, tube in enumerate(result.tubes, 1)
  ]
  assert content["settings"]["stride"] is None
  for old, new in zip(result.tubes, predictions.read_json(result.json).tubes, strict=True):
    assert new.action == old.action._replace(score=pytest.approx(old.action.score, abs=1e-4))
    np.testing.assert_allclose(new.times, old.times, atol=1e-6)
    np.testing.assert_allclose(new.boxes, old.boxes, atol=1e-4)
  assert all(keyframe.person.tolist() == [1] for keyframe in result.keyframes)
  rows = annotations.read_ava_csv(result.csv)
  np.testing.assert_allclose(np.unique(rows.timestamp), times, atol=1e-6)
  with VideoReader(result.video) as reader:
    assert sum(1 for _ in reader) == 120


class TubeLooker(TubeReader):
  def maps(self, out, batch):
    return {"attention": jnp.ones((len(batch["key"]), 2, 2, 4, 6))}


def test_maps_of_tubes_are_of_the_middle_of_clips(of_tubes, ramp, tmp_path):
  of_tubes = of_tubes._replace(model=TubeLooker())
  result = predict.predict_video(of_tubes, ramp, tmp_path, draw=False, save_maps=True, top_k=1)
  pictures = sorted(float(path.stem) for path in result.maps.glob("*.png"))
  np.testing.assert_allclose(pictures, (np.arange(8) * 16 + 4) / FPS, atol=1e-3)


def test_a_video_shorter_than_a_clip(of_tubes, tmp_path):
  with VideoWriter(tmp_path / "short.mp4", size=(64, 80), fps=FPS) as writer:
    for index in range(5):
      writer.write(np.full((64, 80, 3), 50 * index, np.uint8))
  result = predict.predict_video(of_tubes, tmp_path / "short.mp4", tmp_path / "out")
  found = [keyframe.action_score[0, 0] for keyframe in result.keyframes]
  np.testing.assert_allclose(found, np.arange(5) * 50 / 255, atol=0.012)
  assert result.tubes == []
  with VideoReader(result.video) as reader:
    assert sum(1 for _ in reader) == 5


def test_model_without_maps(loaded, ramp, tmp_path, monkeypatch, capsys):
  assert run(loaded, monkeypatch, "--video", str(ramp), "--output-dir", str(tmp_path), "--save-maps") == 1
  assert "has no maps to save" in capsys.readouterr().err


def test_no_video_on_request(loaded, ramp, tmp_path):
  result = predict.predict_video(loaded, ramp, tmp_path, draw=False)
  assert result.video is None and result.csv.exists() and not (tmp_path / "ramp.mp4").exists()


def test_a_long_prediction_is_linked_and_written_in_little_memory(tmp_path):
  """Each of a minute's frames has a person with two actions; a dictionary of all would take several times as much."""
  random = np.random.default_rng(0)
  boxes = np.array([[0.1, 0.1, 0.4, 0.6]], np.float32)
  actions = [[predictions.Action(1, "walk", 0.9), predictions.Action(7, "wave", 0.8)]]
  empty = np.zeros((1, 0), np.float32)
  keyframes = [
    predictions.KeyframeDetections(
      *(index / FPS, boxes + random.normal(0, 0.005, (1, 4)).astype(np.float32), np.ones(1, np.float32), empty),
      *(actions, np.ones(1, np.int32)),
    )
    for index in range(1800)
  ]
  result = predictions.Prediction(tmp_path / "x.mp4", (64, 80), FPS, 0, keyframes)
  tracemalloc.start()
  result = result._replace(tubes=predict.link_tubes(result))
  predictions.write_json(result, tmp_path / "x.json", {"model": {"name": "m"}, "step": 1, "clip": {}}, {})
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert [(tube.action.name, len(tube.times)) for tube in result.tubes] == [("walk", 1800), ("wave", 1800)]
  assert peak < 4e6
  assert len(predictions.read_json(tmp_path / "x.json").tubes) == 2


def keyframe(time, *boxes, first=1):
  empty = np.zeros((len(boxes), 0))
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  person = np.arange(first, first + len(boxes), dtype=np.int32)
  return predict.KeyframeDetections(time, boxes, np.ones(len(boxes)), empty, [[] for _ in boxes], person)


def test_boxes_hold_until_the_next_keyframe(tmp_path):
  source = tmp_path / "grey.mp4"
  with VideoWriter(source, size=(400, 400), fps=10) as writer:
    for _ in range(30):
      writer.write(np.full((400, 400, 3), 128, np.uint8))
  keyframes = [keyframe(0, [0.1, 0.1, 0.3, 0.3]), keyframe(1, [0.6, 0.6, 0.9, 0.9], first=2), keyframe(2)]
  predict.annotate(predict.Prediction(source, (400, 400), 10.0, 0, keyframes), tmp_path / "drawn.mp4")
  with VideoReader(tmp_path / "drawn.mp4") as reader:
    frames = reader.frames_at([0.0, 0.9, 1.0, 1.9, 2.0]).astype(int)
  drawn = [np.argwhere(np.ptp(frame, -1) > 40) / 400 for frame in frames]
  for points, start, stop in zip(drawn, [0.1, 0.1, 0.6, 0.6], [0.3, 0.3, 0.9, 0.9], strict=False):
    np.testing.assert_allclose([points.min(0), points.max(0)], [[start] * 2, [stop] * 2], atol=0.02)
  assert not len(drawn[4])


def test_who_is_in_the_next_keyframe_too_moves_there(tmp_path):
  source = tmp_path / "grey.mp4"
  with VideoWriter(source, size=(400, 400), fps=10) as writer:
    for _ in range(11):
      writer.write(np.full((400, 400, 3), 128, np.uint8))
  keyframes = [keyframe(0, [0.1, 0.1, 0.3, 0.3]), keyframe(1, [0.6, 0.1, 0.8, 0.3])]
  predict.annotate(predict.Prediction(source, (400, 400), 10.0, 0, keyframes), tmp_path / "drawn.mp4")
  with VideoReader(tmp_path / "drawn.mp4") as reader:
    (frame,) = reader.frames_at([0.5]).astype(int)
  points = np.argwhere(np.ptp(frame, -1) > 40) / 400
  np.testing.assert_allclose([points.min(0), points.max(0)], [[0.1, 0.35], [0.3, 0.55]], atol=0.02)


def test_json_is_read_again(loaded, ramp, tmp_path):
  result = predict.predict_video(loaded, ramp, tmp_path, draw=False)
  found = predictions.read_json(result.json)
  assert found[:4] == result[:4] and found.tubes is None and found.json == result.json
  for old, new in zip(result.keyframes, found.keyframes, strict=True):
    assert (new.time, new.person.tolist(), new.person.dtype) == (old.time, [1, 2], np.int32)
    np.testing.assert_allclose(new.boxes, old.boxes, atol=1e-4)
    np.testing.assert_allclose(new.actor_score, old.actor_score, atol=1e-4)
    assert [[a[:2] for a in actions] for actions in new.actions] == [
      [a[:2] for a in actions] for actions in old.actions
    ]
    reported = old.action_score >= 0.3
    np.testing.assert_allclose(
      new.action_score, (old.action_score * reported)[:, : new.action_score.shape[1]], atol=1e-4
    )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "x.json:1: not valid JSON"),
    ('{"keyframes": []}', "not detections of vad_jax.predict: 'video' is missing"),
    ("[]", "not detections of vad_jax.predict"),
  ],
)
def test_other_json_is_refused(tmp_path, text, message):
  (tmp_path / "x.json").write_text(text)
  with pytest.raises(annotations.AnnotationError, match=message):
    predictions.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_progress_is_told_from_nothing_to_all(loaded, of_people, ramp, tmp_path, parts):
  shares = []
  model, boxes = (of_people, loaded) if parts == 3 else (loaded, None)
  predict.predict_video(model, ramp, tmp_path, boxes=boxes, draw=parts > 1, on_progress=shares.append)
  assert shares == sorted(shares) and shares[0] < 0.02 and shares[-1] == 1
  assert len(shares) > 120 * parts and np.diff(shares).max() < 0.02


class Stopped(Exception):
  pass


@pytest.mark.parametrize(("at", "left"), [(0.4, set()), (0.9, {"ramp_detections.csv", "ramp_detections.json"})])
def test_work_is_stopped_and_leaves_no_half_of_a_file(loaded, ramp, tmp_path, at, left):
  def stop(share):
    if share > at:
      raise Stopped

  with pytest.raises(Stopped):
    predict.predict_video(loaded._replace(model=Looker()), ramp, tmp_path, save_maps=at < 0.5, on_progress=stop)
  assert {path.name for path in tmp_path.iterdir()} == left


def run(loaded, monkeypatch, *arguments):
  monkeypatch.setattr(predict, "load", lambda name: loaded)
  return predict.main(["--checkpoint", "any", *map(str, arguments)])


def test_broken_videos_are_reported_and_the_others_go_on(loaded, ramp, tmp_path, monkeypatch, capsys):
  text = tmp_path / "text.mp4"
  text.write_text("not a video")
  missing = tmp_path / "missing.mp4"
  code = run(loaded, monkeypatch, "--output-dir", tmp_path / "out", "--video", missing, text, ramp)
  output = capsys.readouterr()
  assert code == 1
  errors = [line for line in output.err.splitlines() if line.startswith("error:")]
  assert len(errors) == 3 and "missing.mp4" in errors[0] and "text.mp4" in errors[1] and "2 of 3" in errors[2]
  assert (tmp_path / "out" / "ramp.mp4").exists() and "8 people in 4 keyframes" in output.out


def test_truncated_video_is_annotated_as_far_as_it_goes(loaded, ramp, tmp_path, monkeypatch, capsys):
  whole = tmp_path / "whole.mkv"  # a container that can be cut anywhere
  with av.open(str(ramp)) as source, av.open(str(whole), "w") as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    for packet in source.demux(video=0):
      if packet.dts is not None:
        packet.stream = stream
        target.mux(packet)
  cut = tmp_path / "cut.mkv"
  data = whole.read_bytes()
  cut.write_bytes(data[: len(data) * 6 // 10])
  assert run(loaded, monkeypatch, "--video", cut, "--output-dir", tmp_path / "out") == 0
  content = json.loads((tmp_path / "out" / "cut_detections.json").read_text())
  assert 1 <= len(content["keyframes"]) < 4
  with VideoReader(tmp_path / "out" / "cut.mp4") as reader:
    assert 20 < sum(1 for _ in reader) < 115


def test_nothing_found_says_which_threshold_to_lower(loaded, ramp, tmp_path, monkeypatch, capsys):
  out = tmp_path / "out"
  common = "--video", ramp, "--output-dir", out, "--no-video"
  assert run(loaded, monkeypatch, *common, "--actor-threshold", 1) == 0
  assert "lower --actor-threshold" in capsys.readouterr().out
  assert annotations.read_ava_csv(out / "ramp_detections.csv").video.tolist() == []
  assert run(loaded, monkeypatch, *common, "--action-threshold", 1) == 0
  assert "lower --action-threshold" in capsys.readouterr().out


def test_output_directory_that_cannot_be_written(loaded, ramp, tmp_path, monkeypatch, capsys):
  blocked = tmp_path / "file"
  blocked.write_text("")
  assert run(loaded, monkeypatch, "--video", ramp, "--output-dir", blocked / "out") == 1
  assert capsys.readouterr().err.startswith(f"error: {blocked / 'out'}: cannot write there")


def test_source_is_never_replaced(loaded, ramp):
  before = ramp.read_bytes()
  with pytest.raises(OSError, match="would replace it"):
    predict.predict_video(loaded, ramp, ramp.parent)
  assert ramp.read_bytes() == before


def test_missing_video(loaded, tmp_path):
  with pytest.raises(VideoError, match=r"none\.mp4"):
    predict.predict_video(loaded, tmp_path / "none.mp4", tmp_path / "out")


def test_missing_checkpoint(ramp, tmp_path, capsys):
  assert predict.main(["--checkpoint", str(tmp_path / "none"), "--video", str(ramp)]) == 1
  assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--video", "a.mp4", "--top-k", "0"], "'0' is not a whole number from 1 up"),
    (["--video", "a.mp4", "--nms", "2"], "'2' is not a number from 0 to 1"),
    (["--video", "a.mp4", "--stride", "0"], "'0' is not a number of seconds above 0"),
    (["--video", "x/a.mp4", "y/a.avi"], "several videos are named a"),
    (["--video", "a.mp4", "--stride", "2", "--every-frame"], "not allowed with"),
  ],
)
def test_bad_options(arguments, message, capsys):
  with pytest.raises(SystemExit):
    predict.main(["--checkpoint", "quickstart", *arguments])
  assert message in capsys.readouterr().err


def test_starts_without_tensorflow():
  code = "import vad_jax.predict, sys; sys.exit(any(m in sys.modules for m in ('tensorflow', 'clu', 'torch')))"
  root = Path(predict.__file__).parents[1]
  assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
