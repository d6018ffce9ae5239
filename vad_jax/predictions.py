"""What was found in a video: as AVA's CSV, as JSON, and drawn on its frames."""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import av
import jax
import numpy as np

import vad_jax
from vad_jax import annotations, progress, visualize
from vad_jax.batch import Detections
from vad_jax.datasets.video import VideoReader, VideoWriter
from vad_jax.ops.nms import nms as suppress
from vad_jax.person_boxes import Tracker


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
    person: ``[n]`` int32 number of each person, from 1; the same person has the same one through the whole video.
  """

  time: float
  boxes: np.ndarray
  actor_score: np.ndarray
  action_score: np.ndarray
  actions: list[list[Action]]
  person: np.ndarray


class Selection(NamedTuple):
  """What is reported of that which a model found.

  Attributes:
    label_map: class id to name.
    actor_threshold: lowest actor score of a person.
    action_threshold: lowest score of an action.
    top_k: most actions for one person.
    nms: drops people whose box overlaps a better one by more than this IoU, or is empty; None keeps all.
  """

  label_map: dict[int, str]
  actor_threshold: float
  action_threshold: float
  top_k: int
  nms: float | None

  def slots(self, found: Detections) -> np.ndarray:
    """The slots of one frame that are reported, best actor score first."""
    order = np.argsort(-found.actor_score, kind="stable")
    order = order[(found.valid & (found.actor_score >= self.actor_threshold))[order]]
    return order if self.nms is None else order[suppress(found.boxes[order], found.actor_score[order], self.nms)]

  def keyframe(self, time: float, found: Detections, slots: np.ndarray, tracker: Tracker) -> KeyframeDetections:
    """These slots of a keyframe; the tracker has seen those before it."""
    boxes, action_score = found.boxes[slots], found.action_score[slots]
    actions = [self._actions(scores) for scores in action_score]
    return KeyframeDetections(time, boxes, found.actor_score[slots], action_score, actions, tracker.number(time, boxes))

  def _actions(self, scores: np.ndarray) -> list[Action]:
    """What one person does, best first."""
    best = [int(k) + 1 for k in np.argsort(-scores, kind="stable") if k + 1 in self.label_map][: self.top_k]
    return [Action(k, self.label_map[k], float(scores[k - 1])) for k in best if scores[k - 1] >= self.action_threshold]


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
    num_frames: how many the video has, as far as it says.
    seconds: what the whole work took: decoding, model, drawing, writing; None where it was done before.
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
  num_frames: int | None = None
  seconds: float | None = None


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
  }
  with path.open("w", encoding="utf-8") as file:
    file.write(json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}"))
    _write_list(file, "keyframes", map(keyframe_as_json, result.keyframes))
    if result.tubes is not None:
      _write_list(file, "tubes", itertools.starmap(_tube_as_json, enumerate(result.tubes, 1)))
    file.write("\n}\n")


def _write_list(file: TextIO, name: str, items: Iterable[Any]) -> None:
  """Adds a list to an object, an item a line: of a long video they would take much memory together."""
  file.write(f',\n "{name}": [')
  for number, item in enumerate(items):
    file.write((",\n  " if number else "\n  ") + json.dumps(item, ensure_ascii=False))
  file.write("\n ]")


def _tube_as_json(number: int, tube: ActionTube) -> dict[str, Any]:
  boxes = [
    {"time": round(float(time), 6), "box": _rounded(box)} for time, box in zip(tube.times, tube.boxes, strict=True)
  ]
  return {"id": number, "action": _action(tube.action), "boxes": boxes}


def keyframe_as_json(keyframe: KeyframeDetections) -> dict[str, Any]:
  """Time and people of a keyframe, each with number, box, score and actions, as `write_json` writes them."""
  return {
    "time": round(keyframe.time, 6),
    "actors": [
      {
        "person": int(person),
        "box": _rounded(box),
        "score": round(float(score), 4),
        "actions": [_action(action) for action in actions],
      }
      for person, box, score, actions in zip(
        keyframe.person, keyframe.boxes, keyframe.actor_score, keyframe.actions, strict=True
      )
    ],
  }


def read_json(path: annotations.PathLike) -> Prediction:
  """Reads what `write_json` wrote.

  Returns:
    the same, to the digits that are in the file; ``action_score`` is 0 for actions that were not reported, and has as
    many classes as the largest id that was.

  Raises:
    AnnotationError: it is not such a file; says what is missing.
    FileNotFoundError: there is no such file.
  """
  try:
    content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    num_classes = max(
      (a["id"] for keyframe in content["keyframes"] for actor in keyframe["actors"] for a in actor["actions"]),
      default=0,
    )
    keyframes = [_read_keyframe(keyframe, num_classes) for keyframe in content["keyframes"]]
    tubes = content.get("tubes")
    return Prediction(
      *(Path(content["video"]), (content["height"], content["width"]), content["fps"], content["broken_frames"]),
      keyframes=keyframes,
      tubes=tubes and [_read_tube(tube) for tube in tubes],
      json=Path(path),
    )
  except json.JSONDecodeError as error:
    raise annotations.AnnotationError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
  except KeyError as error:
    raise annotations.AnnotationError(f"{path}: not detections of vad_jax.predict: {error} is missing") from None
  except (IndexError, TypeError, ValueError) as error:
    raise annotations.AnnotationError(f"{path}: not detections of vad_jax.predict: {error}") from None


def _read_keyframe(keyframe: dict[str, Any], num_classes: int) -> KeyframeDetections:
  actors = keyframe["actors"]
  actions = [[Action(a["id"], a["name"], a["score"]) for a in actor["actions"]] for actor in actors]
  scores = np.zeros((len(actors), num_classes), np.float32)
  for row, of_person in zip(scores, actions, strict=True):
    row[[action.id - 1 for action in of_person]] = [action.score for action in of_person]
  return KeyframeDetections(
    keyframe["time"],
    np.array([actor["box"] for actor in actors], np.float32).reshape(-1, 4),
    np.array([actor["score"] for actor in actors], np.float32),
    scores,
    actions,
    np.array([actor["person"] for actor in actors], np.int32),
  )


def _read_tube(tube: dict[str, Any]) -> ActionTube:
  return ActionTube(
    Action(**tube["action"]),
    np.array([box["time"] for box in tube["boxes"]]),
    np.array([box["box"] for box in tube["boxes"]], np.float32).reshape(-1, 4),
  )


def _action(action: Action) -> dict[str, Any]:
  return {"id": action.id, "name": action.name, "score": round(action.score, 4)}


def _rounded(box: np.ndarray) -> list[float]:
  return [round(float(value), 4) for value in box]


def watched(
  reader: VideoReader, doing: str, on_progress: Callable[[float], None]
) -> Generator[tuple[float, np.ndarray], None, None]:
  """Frames of a video, while a bar and calls with the share of the frames that are done tell how far it is."""
  with progress.bar(f"{reader.path.name}: {doing}", reader.num_frames) as advance:
    for count, frame in enumerate(reader, 1):
      yield frame
      advance()
      on_progress(min(count / (reader.num_frames or math.inf), 1.0))


def annotate(result: Prediction, path: Path, on_progress: Callable[[float], None] = lambda share: None) -> None:
  """Decodes the video again and writes it with the detections drawn.

  Args:
    result: what was found in it.
    path: the mp4 to write.
    on_progress: called with the share that is done, in [0, 1].
  """
  current = 0
  with contextlib.ExitStack() as stack:
    reader = stack.enter_context(VideoReader(result.source))
    writer = None
    for time, frame in stack.enter_context(contextlib.closing(watched(reader, "draw", on_progress))):
      while current + 1 < len(result.keyframes) and result.keyframes[current + 1].time <= time:
        current += 1
      drawn = draw_between(time, frame, *result.keyframes[current : current + 2])
      if writer is None:
        writer = stack.enter_context(VideoWriter(path, size=drawn.shape[:2], fps=result.fps, audio_from=result.source))
      writer.write(drawn, time)


def draw_between(
  time: float, frame: np.ndarray, now: KeyframeDetections, then: KeyframeDetections | None = None
) -> np.ndarray:
  """Draws the people of a keyframe on an enlarged copy of a frame between it and the next one.

  Who is in both moves from the one box to the other; the others stay where they are, and actions what they are.
  """
  boxes = now.boxes
  if then is not None:
    boxes = boxes.copy()
    _, here, there = np.intersect1d(now.person, then.person, return_indices=True)
    boxes[here] += (time - now.time) / (then.time - now.time) * (then.boxes[there] - boxes[here])
  captions = [[f"{action.name} {action.score:.2f}" for action in actions] for actions in now.actions]
  colors = [visualize.color_of(int(person) - 1) for person in now.person]
  return visualize.draw_detections(visualize.upscale(frame), boxes, captions, colors)
