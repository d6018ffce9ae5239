"""People of one video on their way from one format to another: what all formats share."""

import collections
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vad_jax.annotations import AnnotationError, PathLike
from vad_jax.datasets import custom, export_formats, exports
from vad_jax.datasets.loader import clip_boxes
from vad_jax.datasets.source_set import Problems
from vad_jax.datasets.video import VideoReader, nearest
from vad_jax.person_boxes import Tracker
from vad_jax.predictions import Action, KeyframeDetections, Prediction

logger = logging.getLogger(__name__)

LabelMap = Mapping[int, str]  # of class ids, from 1 up

UNTRACKED = -1
_AFTER_END = 1.0  # seconds; the last times may lie behind the last frame
_LARGEST_NUMBER = 2**31 - 2
_NOT_IN_XML = re.compile("[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class Person(NamedTuple):
  """Somebody at a keyframe.

  Attributes:
    box: xyxy in [0, 1].
    score: of the person.
    actions: in any order.
    number: of the person, from 0 or 1 up; `UNTRACKED` or another negative one where it is not known who it is.
  """

  box: Any
  score: float
  actions: list[Action]
  number: int


def people_of(keyframe: KeyframeDetections) -> Iterable[tuple[np.ndarray, float, list[Action], int]]:
  """Box, score, actions and number of each person, as numbers of Python."""
  boxes, scores = keyframe.boxes.astype(np.float64), keyframe.actor_score.tolist()
  return zip(boxes, scores, keyframe.actions, keyframe.person.tolist(), strict=True)


def classes_of(result: Prediction, label_map: LabelMap | None) -> dict[int, str]:
  """The actions in order of ids; formats that know them by name need names that can be told apart."""
  found = {action.id: action.name for keyframe in result.keyframes for of in keyframe.actions for action in of}
  for index, name in found.items():
    if label_map and (other := label_map.get(index)) != name:
      raise AnnotationError(f"class {index} is {name!r} in the detections, {other!r} in the label map; use the model's")
  classes = dict(sorted((label_map or found).items()))
  for name, count in collections.Counter(classes.values()).items():
    if count > 1 or not export_formats.is_readable_action(name) or _NOT_IN_XML.search(name):
      reason = "is the name of two classes" if count > 1 else "would not be read as an action"
      raise AnnotationError(f"class {name!r} {reason} in this format; rename it in the label map of the model")
  return classes


def on_frames(result: Prediction) -> tuple[dict[int, KeyframeDetections], int]:
  """Keyframes by number of their frame, from 0, and how many frames the video has."""
  if not result.source.exists():
    raise FileNotFoundError(f"{result.source}: the video of these detections is not there; say where it is (--video)")
  with VideoReader(result.source) as reader:
    if reader.size != tuple(result.size):
      is_, was = (f"{width} x {height}" for height, width in (reader.size, result.size))
      raise AnnotationError(f"{result.source}: is {is_}, the detections are of {was}; another video?")
    times = reader.frame_times()
  frames: dict[int, KeyframeDetections] = {}
  for keyframe in result.keyframes:
    if keyframe.time > times[-1] + _AFTER_END:
      ends = f"ends at {times[-1]:.2f} s, there are detections at {keyframe.time:.2f} s"
      raise AnnotationError(f"{result.source}: {ends}; another video?")
    frames.setdefault(nearest(times, keyframe.time), keyframe)
  if left_out := len(result.keyframes) - len(frames):
    logger.warning("%s: %d keyframes left out, whose frame is that of the one before", result.source, left_out)
  return frames, len(times)


def read_export(path: PathLike, video: PathLike, label_map: LabelMap | None, kind: str | None = None) -> Prediction:
  """Reads what annotation tools write, in the way that training does."""
  video, problems = Path(video), Problems()
  export = exports.read(Path(path), problems, kind=kind, keep_idle=True)
  if export.format not in ("coco", "cvat"):
    raise AnnotationError(f"{path}: is of {export.format}, which does not say who is who; expected COCO or CVAT")
  name = video.stem.replace(",", "_")
  entries = custom.match(export.videos, {name: video}, video.parent, problems)[name]
  entries = [entry if entry.drawn is None else entry._replace(moments=entry.drawn) for entry in entries]
  ids = {name: index for index, name in (label_map or export.label_map).items()}
  found: dict[float, list[Person]] = {}
  for time, boxes in custom.boxes_by_time(video, entries, 0, problems).items():
    people = found[time] = []
    for box in boxes:
      if unknown := set(box.actions) - ids.keys():
        raise AnnotationError(f"{path}: class {min(unknown)!r} is not in the label map")
      scores = box.action_scores or (1.0,) * len(box.actions)
      actions = [Action(ids[name], name, score) for name, score in zip(box.actions, scores, strict=True)]
      people.append(Person(box.corners, box.score, actions, box.person))
  problems.counts.pop(export_formats.NO_ACTION, None)  # they are kept
  for line in problems.summary():
    logger.warning("%s: %s", path, line)
  return prediction(video, found)


def prediction(video: PathLike, found: Mapping[float, list[Person]]) -> Prediction:
  """Puts people together.

  Args:
    video: the video.
    found: people by time in seconds; one that stands there several times with the same box does all of the actions.

  Returns:
    Boxes clipped, empty ones left out; people numbered from 1, or linked by their boxes where nobody knows who they
    are; ``action_score`` is 0 for actions that were not reported.

  Raises:
    AnnotationError: a number of a person is too large.
    VideoError: the video cannot be read.
  """
  with VideoReader(video) as reader:
    size, fps = reader.size, reader.fps
  numbers = [person.number for people in found.values() for person in people]
  lowest, tracker = min(numbers, default=1), Tracker()
  if max(numbers, default=1) > _LARGEST_NUMBER:
    raise AnnotationError(f"{video}: person {max(numbers)}; expected numbers up to {_LARGEST_NUMBER}")
  num_classes = max((a.id for people in found.values() for person in people for a in person.actions), default=0)
  keyframes, left_out = [], 0
  for time, listed in sorted(found.items()):
    people = _merged(listed)
    boxes, in_frame = clip_boxes(np.array([person.box for person in people], np.float32).reshape(-1, 4))
    left_out += len(boxes) - in_frame.sum()
    order = sorted(np.flatnonzero(in_frame).tolist(), key=lambda row: -people[row].score)
    boxes, people = boxes[order], [people[row] for row in order]
    actions = [sorted(person.actions, key=lambda action: -action.score) for person in people]
    action_score = np.zeros((len(people), num_classes), np.float32)
    for row, of_person in zip(action_score, actions, strict=True):
      row[[action.id - 1 for action in of_person]] = [action.score for action in of_person]
    number = np.array([person.number for person in people], np.int32) + (lowest == 0)
    number = tracker.number(time, boxes) if lowest < 0 else number
    actor_score = np.array([person.score for person in people], np.float32)
    keyframes.append(KeyframeDetections(time, boxes, actor_score, action_score, actions, number))
  if left_out:
    logger.warning("%s: %d boxes left out, which are empty or outside the frame", video, left_out)
  return Prediction(Path(video), size, fps, 0, keyframes)


def _merged(people: list[Person]) -> list[Person]:
  merged: dict[tuple, Person] = {}
  for person in people:
    key = (person.number, *person.box)
    known = merged.get(key, person._replace(actions=[]))
    merged[key] = known._replace(score=max(known.score, person.score), actions=known.actions + person.actions)
  return list(merged.values())
