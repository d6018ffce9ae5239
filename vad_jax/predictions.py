"""What was found in a video: as AVA's CSV, as JSON, and drawn on its frames."""

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import av
import jax
import numpy as np

import vad_jax
from vad_jax import annotations, person_boxes, progress, visualize
from vad_jax.datasets.video import VideoReader, VideoWriter


class Action(NamedTuple):
  """One action of one person: id of the label map, its name, score in [0, 1]."""

  id: int
  name: str
  score: float


class KeyframeDetections(NamedTuple):
  """The ``n`` people found at one keyframe, best actor score first.

  Attributes:
    time: seconds from the video's first frame.
    boxes: ``[n, 4]`` float32 xyxy in [0, 1].
    actor_score: ``[n]`` float32.
    action_score: ``[n, K]`` float32, all classes.
    actions: for each person the actions that passed the threshold, best first.
  """

  time: float
  boxes: np.ndarray
  actor_score: np.ndarray
  action_score: np.ndarray
  actions: list[list[Action]]


class ActionTube(NamedTuple):
  """One action of one person through frames without a gap.

  Attributes:
    action: what is done; its score is the mean over the frames.
    times: ``[n]`` seconds from the video's first frame.
    boxes: ``[n, 4]`` float32 xyxy in [0, 1].
  """

  action: Action
  times: np.ndarray
  boxes: np.ndarray


class Prediction(NamedTuple):
  """What was found in one video and where it was written.

  Attributes:
    source: the video.
    size: its height and width in pixels.
    fps: its average frame rate.
    broken: damaged or missing frames; their neighbours stood in.
    keyframes: detections in order of time; of models for tubes every frame is one.
    tubes: actions linked through the frames, those that begin first come first; None of models for keyframes.
    csv: AVA result CSV, or None where nothing was written.
    json: readable file of the same, or None.
    video: annotated mp4, or None.
    maps: folder of pictures and arrays of what the model sees where, or None; see `vad_jax.predict.predict_video`.
  """

  source: Path
  size: tuple[int, int]
  fps: float
  broken: int
  keyframes: list[KeyframeDetections]
  tubes: list[ActionTube] | None = None
  csv: Path | None = None
  json: Path | None = None
  video: Path | None = None
  maps: Path | None = None


def write_csv(result: Prediction, path: Path) -> None:
  """Writes the actions in AVA's result format."""
  name = result.source.stem.replace(",", "_")  # a comma would end the column
  rows = [
    (name, keyframe.time, box, action.id, action.score)
    for keyframe in result.keyframes
    for box, actions in zip(keyframe.boxes, keyframe.actions, strict=True)
    for action in actions
  ]
  video, time, boxes, action, score = zip(*rows, strict=True) if rows else ((),) * 5
  annotations.write_ava_csv(
    path,
    annotations.Rows(
      np.array(video, object),
      np.array(time, np.float64),
      np.array(boxes, np.float64).reshape(-1, 4),
      np.array(action, np.int32),
      np.array(score, np.float64),
    ),
  )


def write_json(result: Prediction, path: Path, info: dict[str, Any], settings: dict[str, Any]) -> None:
  """Writes people, actions and tubes, with what they were found by.

  Args:
    result: what to write.
    path: the file.
    info: of the model, see `vad_jax.checkpoint.Loaded`.
    settings: thresholds and the like.
  """
  height, width = result.size
  content = {
    "video": str(result.source),
    "width": width,
    "height": height,
    "fps": round(result.fps, 3),
    "broken_frames": result.broken,
    "model": {"name": info["model"]["name"], "step": info["step"], "clip": info["clip"]},
    "settings": settings,
    "made_with": {
      "vad_jax": vad_jax.__version__,
      "jax": jax.__version__,
      "av": av.__version__,
      "ffmpeg": av.ffmpeg_version_info,
    },
    "boxes": "x1, y1, x2, y2 in [0, 1] of the frame",
    "keyframes": [
      {
        "time": round(keyframe.time, 6),
        "actors": [
          {
            "box": _rounded(box),
            "score": round(float(score), 4),
            "actions": [_action(action) for action in actions],
          }
          for box, score, actions in zip(keyframe.boxes, keyframe.actor_score, keyframe.actions, strict=True)
        ],
      }
      for keyframe in result.keyframes
    ],
  }
  if result.tubes is not None:
    content["tubes"] = [
      {
        "id": number,
        "action": _action(tube.action),
        "boxes": [
          {"time": round(float(time), 6), "box": _rounded(box)}
          for time, box in zip(tube.times, tube.boxes, strict=True)
        ],
      }
      for number, tube in enumerate(result.tubes, 1)
    ]
  path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _action(action: Action) -> dict[str, Any]:
  return {"id": action.id, "name": action.name, "score": round(action.score, 4)}


def _rounded(box: np.ndarray) -> list[float]:
  return [round(float(value), 4) for value in box]


def annotate(result: Prediction, path: Path) -> None:
  """Decodes the video again and writes it with the detections drawn.

  Args:
    result: what was found in it.
    path: the mp4 to write.
  """
  keyframes = result.keyframes
  links = [person_boxes.link(now.boxes, then.boxes) for now, then in itertools.pairwise(keyframes)]
  people = person_boxes.number_people([len(keyframe.boxes) for keyframe in keyframes], links)
  current = 0
  with contextlib.ExitStack() as stack:
    reader = stack.enter_context(VideoReader(result.source))
    advance = stack.enter_context(progress.bar(f"{result.source.name}: draw", reader.num_frames))
    writer = None
    for time, frame in reader:
      advance()
      while current < len(links) and keyframes[current + 1].time <= time:
        current += 1
      boxes = keyframes[current].boxes
      if current < len(links):
        begin, end = (keyframe.time for keyframe in keyframes[current : current + 2])
        share = (time - begin) / (end - begin)
        boxes = person_boxes.boxes_between(boxes, keyframes[current + 1].boxes, links[current], share)
      captions = [[f"{action.name} {action.score:.2f}" for action in a] for a in keyframes[current].actions]
      colors = [visualize.color_of(number) for number in people[current]]
      drawn = visualize.draw_detections(visualize.upscale(frame), boxes, captions, colors)
      if writer is None:
        writer = stack.enter_context(VideoWriter(path, size=drawn.shape[:2], fps=result.fps, audio_from=result.source))
      writer.write(drawn, time)
