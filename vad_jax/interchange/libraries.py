"""Detections of supervision and FiftyOne, which are imported where they are used."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vad_jax.annotations import AnnotationError, PathLike
from vad_jax.datasets.video import VideoReader
from vad_jax.interchange.people import UNTRACKED, Person, on_frames, people_of, prediction
from vad_jax.predictions import Action, Prediction


def to_supervision(result: Prediction) -> dict[float, Any]:
  """The ``supervision.Detections`` of each keyframe, by time in seconds.

  A row is a person: ``xyxy`` in pixels, ``confidence`` of the person, ``tracker_id`` the person's number, ``class_id``
  and ``data["class_name"]`` of the best action (0 and "" of somebody without one), ``data["actions"]`` all of them, as
  `predictions.Action`.

  Raises:
    ImportError: supervision is not installed.
  """
  sv = _optional("supervision")
  height, width = result.size
  return {
    keyframe.time: sv.Detections(
      xyxy=keyframe.boxes * np.array([width, height, width, height], np.float32),
      confidence=keyframe.actor_score,
      class_id=np.array([actions[0].id if actions else 0 for actions in keyframe.actions], int),
      tracker_id=keyframe.person.astype(int),
      data={
        "class_name": np.array([actions[0].name if actions else "" for actions in keyframe.actions], str),
        "actions": np.fromiter(keyframe.actions, object, len(keyframe.actions)),
      },
    )
    for keyframe in result.keyframes
  }


def from_supervision(detections: Mapping[float, Any], video: PathLike) -> Prediction:
  """Takes back what `to_supervision` gave, filtered or tracked by supervision or not.

  Args:
    detections: ``supervision.Detections`` by time in seconds; without ``tracker_id``, people are linked by their boxes.
    video: the video.

  Raises:
    AnnotationError: there is no ``data["actions"]``.
    VideoError: the video cannot be read.
  """
  with VideoReader(video) as reader:
    height, width = reader.size
  found: dict[float, list[Person]] = {}
  for time, people in detections.items():
    if len(people) and "actions" not in people.data:
      raise AnnotationError(f"detections at {time:g} s: no data['actions']; expected what to_supervision gives")
    found[time] = [
      Person(
        people.xyxy[row] / (width, height, width, height),
        1.0 if people.confidence is None else float(people.confidence[row]),
        list(people.data["actions"][row]),
        UNTRACKED if people.tracker_id is None else int(people.tracker_id[row]),
      )
      for row in range(len(people))
    ]
  return prediction(video, found)


def to_fiftyone(result: Prediction) -> Any:
  """A ``fiftyone.Sample`` of the video, to be given to ``dataset.add_samples``.

  Keyframes are its frames with a field ``people``: ``fiftyone.Detections`` with label "person", ``confidence``, the
  person's number as ``index``, and lists ``actions`` (names), ``action_ids`` and ``action_scores``, best first.

  Raises:
    AnnotationError: the video is another one.
    ImportError: FiftyOne is not installed.
    VideoError: the video cannot be read.
  """
  fo = _optional("fiftyone")
  sample = fo.Sample(filepath=str(result.source.resolve()))
  for frame, keyframe in on_frames(result)[0].items():
    people = [
      fo.Detection(
        label="person",
        bounding_box=[*corners[:2].tolist(), *(corners[2:] - corners[:2]).tolist()],
        confidence=score,
        index=person,
        actions=[action.name for action in actions],
        action_ids=[action.id for action in actions],
        action_scores=[action.score for action in actions],
      )
      for corners, score, actions, person in people_of(keyframe)
    ]
    sample.frames[frame + 1] = fo.Frame(people=fo.Detections(detections=people))
  return sample


def from_fiftyone(sample: Any) -> Prediction:
  """Takes back what `to_fiftyone` gave, edited there or not.

  Raises:
    AnnotationError: a frame is not in the video.
    VideoError: the video cannot be read.
  """
  with VideoReader(sample.filepath) as reader:
    times = reader.frame_times()
  found: dict[float, list[Person]] = {}
  for number, frame in sample.frames.items():
    if frame.people is None:
      continue
    if number > len(times):
      raise AnnotationError(f"{sample.filepath}: has {len(times)} frames; the sample has detections in frame {number}")
    found[float(times[number - 1])] = [
      Person(
        np.cumsum(np.reshape(person.bounding_box, (2, 2)), 0).ravel(),
        1.0 if person.confidence is None else person.confidence,
        list(map(Action, person.action_ids, person.actions, person.action_scores)),
        UNTRACKED if person.index is None else person.index,
      )
      for person in frame.people.detections
    ]
  return prediction(sample.filepath, found)


def _optional(package: str) -> Any:
  try:
    return importlib.import_module(package)
  except ImportError:
    raise ImportError(f"{package} is not installed; pip install {package}") from None
