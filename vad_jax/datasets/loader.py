"""Keyframe clips as batches: the only file that knows grain.

  dataset = KeyframeDataset(keyframes, RecordFrames("data/mine/records/train"), ClipSpec(), label_map)
  batches = train_batches(dataset, batch_size=8, canvas=(288, 512), short_side=288, max_boxes=16, seed=0)
  batch = next(batches)  # vad_jax.batch.Batch
  state = batches.get_state()  # and later: batches.set_state(state)

The stream of batches depends on the seed alone: not on the number of workers, and the examples of all
processes together not on the number of processes.
"""

import collections
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import cv2
import grain
import numpy as np
from absl import flags

from vad_jax.annotations import Keyframe
from vad_jax.batch import Batch
from vad_jax.datasets import augment as augmentation
from vad_jax.datasets.augment import Augment, Example, place_on_canvas
from vad_jax.datasets.records import RecordFrames
from vad_jax.datasets.video import VideoFrames

__all__ = [
  "ClipSpec",
  "FrameSource",
  "KeyframeDataset",
  "RecordFrames",
  "VideoFrames",
  "eval_batches",
  "train_batches",
]

logger = logging.getLogger(__name__)

_MAX_THREADS = 8  # each holds a batch or two in memory


class FrameSource(Protocol):
  """Where frames come from."""

  def covers(self, video: str, time: float) -> bool:
    """Whether there are frames of this video around this time."""
    ...

  def frames(self, video: str, times: Sequence[float] | np.ndarray) -> np.ndarray:
    """The frames nearest to the times, ``[T, H, W, 3]`` uint8 RGB."""
    ...


@dataclasses.dataclass(frozen=True)
class ClipSpec:
  """The frames around a keyframe that make up a clip.

  Attributes:
    num_frames: frames of a clip; the keyframe is number ``num_frames // 2``.
    frame_stride: distance of two of them, in frames of a video of `fps`.
    fps: frames a second that the stride refers to, whatever a video really has.
  """

  num_frames: int = 16
  frame_stride: int = 4
  fps: float = 30.0

  def __post_init__(self) -> None:
    if self.num_frames < 1 or self.frame_stride < 1 or not self.fps > 0:
      raise ValueError(f"{self}: expected positive numbers")

  def times(self, keyframe_time: float) -> np.ndarray:
    """Seconds of the frames, ``[num_frames]``; the reader clamps those outside the video."""
    steps = np.arange(self.num_frames) - self.num_frames // 2
    return keyframe_time + steps * (self.frame_stride / self.fps)


class KeyframeDataset:
  """Annotated keyframes with the clips around them; random access.

  Attributes:
    keyframes: those that there are frames of.
    frames: where frames come from.
    clip: which frames make up a clip.
    label_map: class id to name.
    num_classes: length of a label vector, the highest class id.
  """

  def __init__(self, keyframes: Sequence[Keyframe], frames: FrameSource, clip: ClipSpec, label_map: dict[int, str]):
    """Drops, and logs, keyframes without frames.

    Raises:
      ValueError: there is no keyframe, none has frames, or labels do not fit the label map.
    """
    self.frames = frames
    self.clip = clip
    self.label_map = label_map
    self.num_classes = max(label_map)
    if not keyframes:
      raise ValueError("the annotations name no keyframe")
    if keyframes[0].labels.shape[1] != self.num_classes:
      num_labels = keyframes[0].labels.shape[1]
      raise ValueError(f"labels of {num_labels} classes; the label map has ids up to {self.num_classes}")
    self.keyframes = [k for k in keyframes if frames.covers(k.video, k.timestamp)]
    if len(self.keyframes) < len(keyframes):
      self._report_missing(keyframes)
    empty = sum(int((~_clip_boxes(k.boxes)[1]).sum()) for k in self.keyframes)
    if empty:
      logger.warning("%d boxes are empty or outside the frame; they are no training targets", empty)

  def _report_missing(self, keyframes: Sequence[Keyframe]) -> None:
    lost = collections.Counter(k.video for k in keyframes) - collections.Counter(k.video for k in self.keyframes)
    names = ", ".join(sorted(lost)[:5]) + (", ..." if len(lost) > 5 else "")
    if not self.keyframes:
      raise ValueError(
        f"none of the {len(keyframes)} annotated keyframes has video frames (videos: {names}); check "
        "that the annotations name the video files, and that timestamps are seconds from a video's start"
      )
    logger.warning(
      "%d of %d keyframes left out: no frames of %d videos (%s) at these times",
      lost.total(), len(keyframes), len(lost), names,
    )  # fmt: skip

  def __len__(self) -> int:
    return len(self.keyframes)

  def __getitem__(self, index: int) -> Example:
    """Frames and annotations of one keyframe: video, boxes, labels and key (its index)."""
    keyframe = self.keyframes[index]
    boxes, keep = _clip_boxes(keyframe.boxes)
    return {
      "video": self.frames.frames(keyframe.video, self.clip.times(keyframe.timestamp)),
      "boxes": boxes[keep],
      "labels": keyframe.labels[keep],
      "key": index,
    }


def _clip_boxes(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The boxes as far as they lie in the frame, and which of them have an area there."""
  boxes = boxes.clip(0, 1)
  return boxes, np.all(boxes[:, :2] < boxes[:, 2:], axis=1)


def train_batches(
  dataset: KeyframeDataset,
  *,
  batch_size: int,
  canvas: tuple[int, int],
  short_side: int,
  max_boxes: int,
  seed: int,
  augment: Augment | None = None,
  workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Endless batches: every example once an epoch, over all processes together, in a new order each epoch.

  Args:
    dataset: what to load.
    batch_size: examples in a batch of this process.
    canvas: height and width of the padded frames.
    short_side: of the frames on the canvas in pixels, as far as the canvas has room.
    max_boxes: ``M``; where a keyframe has more actors, the largest are kept.
    seed: of order and augmentation.
    augment: variation of the clips; none by default.
    workers: processes that load; 0 loads in threads of this process.
    process_index: number of this process.
    process_count: number of processes that share an epoch.

  Returns:
    Iterator of `Batch`, with ``get_state`` and ``set_state``; a restored one goes on with exactly the batches
    that the saved one would have given.
  """
  finish = _Finish(dataset, canvas, short_side, max_boxes)
  source: Any = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat()
  if augment is not None:
    source = source.random_map(functools.partial(finish.augmented, options=augment))
  else:
    source = source.map(finish.finish)
  # Sliced last, so that a draw belongs to an example of the epoch and not to its place in one process.
  source = source[process_index::process_count].batch(batch_size, drop_remainder=True)
  return iter(_to_iter(source, workers))


def eval_batches(
  dataset: KeyframeDataset,
  *,
  batch_size: int,
  canvas: tuple[int, int],
  short_side: int,
  max_boxes: int,
  workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterable[Batch]:
  """All examples once, in order; see `train_batches` for the arguments.

  Every process gets the same number of batches; rows that only fill the last ones up are zero with key -1.
  """
  finish = _Finish(dataset, canvas, short_side, max_boxes)
  share = batch_size * process_count
  total = math.ceil(len(dataset) / share) * share
  source: Any = grain.MapDataset.range(total).map(finish)
  return _to_iter(source[process_index::process_count].batch(batch_size), workers)


class _Finish:
  """Raw examples (or their indices) to rows of a `Batch`: of static shapes."""

  def __init__(self, dataset: KeyframeDataset, canvas: tuple[int, int], short_side: int, max_boxes: int):
    if min(canvas) < 32 or canvas[0] % 32 or canvas[1] % 32:
      raise ValueError(f"canvas {canvas}: height and width have to be multiples of 32")
    if min(short_side, max_boxes) < 1:
      raise ValueError(f"short_side {short_side} and max_boxes {max_boxes} have to be positive")
    crowded = sum(len(keyframe.boxes) > max_boxes for keyframe in dataset.keyframes)
    if crowded:
      logger.warning("%d keyframes have more than %d actors; only the largest are kept", crowded, max_boxes)
    self._dataset = dataset
    self._canvas = canvas
    self._short_side = short_side
    self._max_boxes = max_boxes

  def __call__(self, index: int) -> Example:
    """The example of an index; one past the end gives a row that fills the batch up."""
    if index < len(self._dataset):
      return self.finish(self._dataset[index])
    return self._row(np.zeros((self._dataset.clip.num_frames, *self._canvas, 3), np.uint8))

  def augmented(self, example: Example, rng: np.random.Generator, options: Augment) -> Example:
    return self.finish(*augmentation.augment(example, options, rng))

  def finish(self, example: Example, scale: float = 1.0) -> Example:
    video, size = place_on_canvas(example["video"], self._canvas, self._short_side * scale)
    row = self._row(video, size, example["key"])
    boxes = example["boxes"]
    # A stable order: with room for all, boxes stay as the annotations have them.
    kept = np.arange(len(boxes))
    if len(boxes) > self._max_boxes:
      area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
      kept = np.sort(np.argsort(-area, kind="stable")[: self._max_boxes])
    row["boxes"][: len(kept)] = boxes[kept]
    row["labels"][: len(kept)] = example["labels"][kept]
    row["box_mask"][: len(kept)] = True
    return row

  def _row(self, video: np.ndarray, size: tuple[int, int] = (0, 0), key: int = -1) -> Example:
    return {
      "video": video,
      "video_size": np.array(size, np.int32),
      "boxes": np.zeros((self._max_boxes, 4), np.float32),
      "labels": np.zeros((self._max_boxes, self._dataset.num_classes), np.float32),
      "box_mask": np.zeros(self._max_boxes, bool),
      "key": np.int32(key),
    }


def _to_iter(batches: grain.MapDataset, workers: int) -> grain.IterDataset:
  """Reads batches ahead, in order, in threads or in processes.

  Each thread or process makes whole batches: the stream does not depend on their number.
  """
  _one_thread_per_image()
  if workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # in a notebook nobody parses them, and grain's workers ask
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return batches.to_iter_dataset(ahead).mp_prefetch(options, worker_init_fn=_one_thread_per_image)
  threads = min(os.cpu_count() or 1, _MAX_THREADS)
  return batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))


def _one_thread_per_image(*_) -> None:
  """Examples are what is done in parallel; OpenCV's own threads would only get in the way."""
  cv2.setNumThreads(0)
