"""Whole videos with their tubes, cut into clips of consecutive frames: targets in every frame.

A tube is one action of one person. Tubes that lie on each other become one target, whose labels change with the frame.

A video is cut into as few clips as hold it; the first and the last frame are repeated to fill them up, by halves before
and after. (For videos of a multiple of the clip length the class-query code starts half a clip early and never sees the
other half of the last clip; here they need no filling.)
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vad_jax.datasets.augment import Example
from vad_jax.datasets.loader import ClipSpec, FrameSource, clip_boxes
from vad_jax.tubes import Tube, TubeGroundTruth

logger = logging.getLogger(__name__)


class TubeClip(NamedTuple):
  """A part of a video.

  Attributes:
    video: its name.
    frames: ``[T]`` int64 numbers of its frames, from 1 up; numbers below 1 and above the video's length fill it up.
  """

  video: str
  frames: np.ndarray


class TubeDataset:
  """Annotated videos in clips; random access.

  Attributes:
    clips: in order of time, video by video, of all videos that there are frames of.
    truth: the annotations.
    frames: where frames come from.
    clip: length of the clips.
    label_map: class id to name.
    num_classes: length of a label vector.
  """

  tubes = True
  proposals: Mapping[tuple[str, float], np.ndarray] | None = None

  def __init__(self, truth: TubeGroundTruth, videos: Iterable[str], frames: FrameSource, clip: ClipSpec):
    """Drops, and logs, videos without frames.

    Args:
      truth: annotations; frame ``k`` of a video is shown at ``(k - 1) / fps``.
      videos: names of those to take.
      frames: where frames come from.
      clip: its number of frames counts, its stride has to be 1.

    Raises:
      ValueError: there are no frames, or annotations or clips are unfit.
    """
    if clip.frame_stride != 1:
      raise ValueError(f"frame_stride {clip.frame_stride}: tubes have a box in every frame, it has to be 1")
    self.truth = truth
    self.frames = frames
    self.clip = clip
    self.label_map = dict(enumerate(truth.labels, 1))
    self.num_classes = len(truth.labels)
    names = list(videos)
    there = [name for name in names if name in truth.videos and frames.covers(name, 0.0)]
    missing = sorted(set(names) - set(there))
    if not there:
      raise ValueError(f"none of the {len(names)} videos has both tubes and frames ({', '.join(missing[:5])})")
    if missing:
      logger.warning(
        "%d of %d videos left out: no tubes or frames (%s)", len(missing), len(names), ", ".join(missing[:5])
      )
    for name in there:
      if truth.videos[name].size is None or truth.videos[name].fps is None:
        raise ValueError(f"{name}: the tubes name no resolution or no fps; prepare the data set again")
    self.clips = [
      TubeClip(name, numbers) for name in there for numbers in cut(truth.videos[name].num_frames, clip.num_frames)
    ]
    self._people = {name: _people(truth.videos[name].tubes) for name in there}

  def __len__(self) -> int:
    return len(self.clips)

  def __getitem__(self, index: int) -> Example:
    return self.example(index)

  def example(self, index: int, short_side: float = math.inf) -> Example:
    """Frames and people of one clip: `boxes` are ``[T, n, 4]``, `labels` ``[T, n, K]``. See `loader.ClipDataset`."""
    name, numbers = self.clips[index]
    video = self.truth.videos[name]
    shown = numbers.clip(1, video.num_frames)
    people = self._shown(index)
    boxes = np.zeros((len(numbers), len(people), 4), np.float32)
    labels = np.zeros((len(numbers), len(people), self.num_classes), np.float32)
    mask = np.zeros((len(numbers), len(people)), bool)
    height, width = video.size or (0, 0)
    for slot, tubes in enumerate(people):
      for label, table in tubes:
        rows = table[:, 0].astype(np.int64) - numbers[0]
        boxes[rows, slot], mask[rows, slot] = clip_boxes(table[:, 1:] / (width, height, width, height))
        labels[rows, slot, label] = 1
    return {
      "video": self.frames.frames(name, (shown - 1) / video.fps, short_side),
      "boxes": boxes,
      "labels": labels,
      "box_mask": mask,
      "key": index,
    }

  def place(self, index: int) -> tuple[str, float]:
    """Video of a clip, and its start."""
    return self.clips[index].video, 0.0

  def num_boxes(self, index: int) -> tuple[int, int]:
    """How many people a clip has, and no proposals."""
    return len(self._shown(index)), 0

  def _shown(self, index: int) -> list[list[Tube]]:
    """The people of a clip: for each the parts of its tubes that are in the clip."""
    name, numbers = self.clips[index]
    people: dict[int, list[Tube]] = {}
    for person, (label, boxes) in zip(self._people[name], self.truth.videos[name].tubes, strict=True):
      here = boxes[(boxes[:, 0] >= numbers[0]) & (boxes[:, 0] <= numbers[-1])]
      if len(here):
        people.setdefault(person, []).append(Tube(label, here))
    return list(people.values())


def cut(num_frames: int, length: int) -> list[np.ndarray]:
  """Numbers of the frames of each clip, from 1 up; those outside of a video repeat its first or last frame.

  Args:
    num_frames: of the video.
    length: frames of a clip.
  """
  count = -(-num_frames // length)
  before = (count * length - num_frames) // 2
  return [np.arange(length) + (1 - before + start) for start in range(0, count * length, length)]


def _people(tubes: list[Tube]) -> list[int]:
  """Number of the person of each tube; tubes of one person have the same boxes in all frames that they share."""
  people: list[dict[float, list[float]]] = []  # frame to box
  numbers = [0] * len(tubes)
  for index in sorted(range(len(tubes)), key=lambda index: -len(tubes[index].boxes)):
    boxes = {frame: box for frame, *box in tubes[index].boxes.tolist()}
    number = next((number for number, known in enumerate(people) if _agree(boxes, known)), len(people))
    if number == len(people):
      people.append({})
    people[number] |= boxes
    numbers[index] = number
  return numbers


def _agree(boxes: dict[float, list[float]], known: dict[float, list[float]]) -> bool:
  common = boxes.keys() & known.keys()
  return bool(common) and all(boxes[frame] == known[frame] for frame in common)
