"""Annotated clips as batches: the only file that knows grain.

  dataset = KeyframeDataset(keyframes, RecordFrames("data/mine/records/train"), ClipSpec(), label_map)
  batches = train_batches(dataset, batch_size=8, canvas=(288, 512), short_side=288, max_boxes=16, seed=0)
  batch = next(batches)  # vad_jax.batch.Batch

The stream of batches depends on the seed alone, not on the number of workers; those of all processes, one after the
other, are the batches of a single one. So the number of a batch is all that it takes to go on from there.
"""

import collections
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import cv2
import grain
import numpy as np
from absl import flags

from vad_jax import progress
from vad_jax.annotations import Keyframe
from vad_jax.batch import Batch
from vad_jax.datasets.augment import Augment, Example, area, augment, choose_canvas, place_on_canvas
from vad_jax.datasets.records import RecordFrames
from vad_jax.datasets.video import VideoFrames

__all__ = [
  "ClipDataset",
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

Canvas = tuple[int, int]


class FrameSource(Protocol):
  """Where frames come from."""

  def covers(self, video: str, time: float) -> bool:
    """Whether there are frames of this video around this time."""
    ...

  def frames(self, video: str, times: Sequence[float] | np.ndarray, short_side: float = math.inf) -> np.ndarray:
    """The frames nearest to the times, ``[T, H, W, 3]`` uint8 RGB; maybe smaller where such a short side suffices."""
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


class ClipDataset(Protocol):
  """What batches are made of: `KeyframeDataset`, or `vad_jax.datasets.tube_clips.TubeDataset`.

  Attributes:
    frames: where frames come from.
    clip: which frames make up a clip.
    label_map: class id to name.
    num_classes: length of a label vector, the highest class id.
    tubes: whether targets have a box in every frame of a clip rather than in its keyframe.
    proposals: boxes of people by video and timestamp, best first, or None.
  """

  frames: FrameSource
  clip: ClipSpec
  label_map: dict[int, str]
  num_classes: int
  tubes: bool
  proposals: Mapping[tuple[str, float], np.ndarray] | None

  def __len__(self) -> int: ...

  def example(self, index: int, short_side: float = math.inf) -> Example:
    """An example as `vad_jax.datasets.augment` describes it, and its ``key``, the index.

    The frames may be smaller than they are where such a short side suffices.
    """
    ...

  def place(self, index: int) -> tuple[str, float]:
    """Video and time, in seconds, of an example."""
    ...

  def num_boxes(self, index: int) -> tuple[int, int]:
    """How many targets and how many proposals an example has."""
    ...


class KeyframeDataset:
  """Annotated keyframes with the clips around them; random access.

  Attributes:
    keyframes: those that there are frames of.
    frames: where frames come from.
    clip: which frames make up a clip.
    label_map: class id to name.
    num_classes: length of a label vector, the highest class id.
    proposals: boxes of people by video and timestamp, best first, or None.
  """

  tubes = False

  def __init__(
    self,
    keyframes: Sequence[Keyframe],
    frames: FrameSource,
    clip: ClipSpec,
    label_map: dict[int, str],
    proposals: Mapping[tuple[str, float], np.ndarray] | None = None,
  ):
    """Drops, and logs, keyframes without frames.

    Raises:
      ValueError: there is no keyframe, none has frames or, where proposals are given, proposals; or labels do not fit
        the label map.
    """
    self.frames = frames
    self.clip = clip
    self.label_map = label_map
    self.num_classes = max(label_map)
    self.proposals = proposals
    if not keyframes:
      raise ValueError("the annotations name no keyframe")
    if keyframes[0].labels.shape[1] != self.num_classes:
      num_labels = keyframes[0].labels.shape[1]
      raise ValueError(f"labels of {num_labels} classes; the label map has ids up to {self.num_classes}")
    self.keyframes = [k for k in keyframes if frames.covers(k.video, k.timestamp)]
    if len(self.keyframes) < len(keyframes):
      self._report_missing(keyframes)
    empty = sum(int((~clip_boxes(k.boxes)[1]).sum()) for k in self.keyframes)
    if empty:
      logger.warning("%d boxes are empty or outside the frame; they are no training targets", empty)
    without = 0 if proposals is None else sum(self.place(i) not in proposals for i in range(len(self)))
    if without == len(self):
      raise ValueError(f"none of the {without} keyframes has proposals; check that they are of the same videos")
    if without:
      logger.warning("%d of %d keyframes have no proposals", without, len(self))

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
    return self.example(index)

  def example(self, index: int, short_side: float = math.inf) -> Example:
    """Frames, annotations and proposals of one keyframe; see `ClipDataset`."""
    keyframe = self.keyframes[index]
    boxes, keep = clip_boxes(keyframe.boxes)
    example = {
      "video": self.frames.frames(keyframe.video, self.clip.times(keyframe.timestamp), short_side),
      "boxes": boxes[keep],
      "labels": keyframe.labels[keep],
      "box_mask": np.ones(keep.sum(), bool),
      "key": index,
    }
    if self.proposals is not None:
      found = self.proposals.get(self.place(index), np.zeros((0, 4), np.float32))
      example["proposals"], example["proposal_mask"] = clip_boxes(found)
    return example

  def place(self, index: int) -> tuple[str, float]:
    """Video and timestamp of a keyframe."""
    return self.keyframes[index].video, self.keyframes[index].timestamp

  def num_boxes(self, index: int) -> tuple[int, int]:
    """How many targets and how many proposals a keyframe has."""
    return len(self.keyframes[index].boxes), len((self.proposals or {}).get(self.place(index), ()))


def clip_boxes(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The boxes ``[..., 4]`` as far as they lie in the frame, and which of them have an area there."""
  boxes = boxes.clip(0, 1)
  return boxes, np.all(boxes[..., :2] < boxes[..., 2:], axis=-1)


def train_batches(
  dataset: ClipDataset,
  *,
  batch_size: int,
  canvas: Canvas | Sequence[Canvas],
  short_side: float | None,
  max_boxes: int,
  seed: int,
  start: int = 0,
  max_proposals: int = 0,
  augment: Augment | None = None,
  workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Endless batches: every example once an epoch, over all processes together, in a new order each epoch.

  Records that are at least twice as large as what is needed are decoded in a part of their size, which `eval_batches`
  does not do.

  Args:
    dataset: what to load.
    batch_size: examples in a batch of this process.
    canvas: height and width of the padded frames. Of several, each video gets the one that it fills best, and all
      videos of a batch, in all processes, have the same; those of a canvas then have epochs of their own.
    short_side: of the frames on the canvas in pixels, as far as the canvas has room; None fills the canvas without
      keeping proportions.
    max_boxes: ``M``; where a keyframe has more actors, the largest are kept.
    seed: of order and augmentation.
    start: number of the first batch, which is 0 in a new run.
    max_proposals: ``P``; batches have proposals if it is positive: the targets first, then the best of the data set.
    augment: variation of the clips; none by default.
    workers: processes that load; 0 loads in threads of this process.
    process_index: number of this process.
    process_count: number of processes that share an epoch.

  Returns:
    Iterator of `Batch`.
  """
  parts, sizes = [], []
  _report_crowds(dataset, max_boxes, max_proposals, with_targets=True)
  for shape, indices in _by_canvas(dataset, canvas, short_side).items():
    rows = _Rows(dataset, shape, short_side, max_boxes, max_proposals)
    source: Any = grain.MapDataset.source(indices).seed(seed).shuffle().repeat()
    source = source.random_map(functools.partial(rows.train, options=augment))
    # Shared out last, so that a draw belongs to an example of the epoch and not to its place in one process.
    share = grain.MapDataset.source(_Share(source, batch_size, process_index, process_count))
    parts.append(share.batch(batch_size, drop_remainder=True))
    sizes.append(len(indices))
  return iter(_to_iter(grain.MapDataset.mix(parts, sizes)[start:], workers))


def eval_batches(
  dataset: ClipDataset,
  *,
  batch_size: int,
  canvas: Canvas | Sequence[Canvas],
  short_side: float | None,
  max_boxes: int,
  max_proposals: int = 0,
  workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterable[Batch]:
  """All examples once, in order, one canvas after the other; see `train_batches` for the arguments.

  Proposals are those of the data set alone. Every process gets the same number of batches; rows that only fill the
  last ones up are zero with key -1.
  """
  parts = []
  share = batch_size * process_count
  _report_crowds(dataset, max_boxes, max_proposals, with_targets=False)
  for shape, indices in _by_canvas(dataset, canvas, short_side).items():
    fill = [-1] * (-len(indices) % share)
    rows = _Rows(dataset, shape, short_side, max_boxes, max_proposals)
    source: Any = grain.MapDataset.source(indices + fill).map(rows.evaluate)
    parts.append(source[process_index::process_count].batch(batch_size))
  return _to_iter(grain.MapDataset.concatenate(parts), workers)


def _by_canvas(
  dataset: ClipDataset, canvas: Canvas | Sequence[Canvas], short_side: float | None
) -> dict[Canvas, list[int]]:
  """The examples that go on each canvas, without those that no example goes on."""
  canvases: list[Canvas] = [(height, width) for height, width in np.reshape(canvas, (-1, 2)).tolist()]
  for shape in canvases:
    if min(shape) < 32 or shape[0] % 16 or shape[1] % 16:
      raise ValueError(f"canvas {shape}: height and width have to be multiples of 16, at least 32")
  if short_side is None and len(canvases) > 1:
    raise ValueError(f"{len(canvases)} canvases: frames that are stretched need no other shape, give one")
  if len(canvases) == 1:
    return {canvases[0]: list(range(len(dataset)))}
  times = dict(dataset.place(index) for index in range(len(dataset)))
  with ThreadPoolExecutor() as pool, progress.bar("Measuring videos", len(times)) as advance:
    clips = pool.map(lambda item: dataset.frames.frames(item[0], [item[1]]), times.items())
    best = {}
    for video, clip in zip(times, clips, strict=True):
      best[video] = choose_canvas(clip.shape[1:3], canvases, short_side)
      advance()
  groups: dict[Canvas, list[int]] = {}
  for index in range(len(dataset)):
    groups.setdefault(best[dataset.place(index)[0]], []).append(index)
  logger.info("examples on each canvas: %s", {shape: len(indices) for shape, indices in groups.items()})
  return groups


def _report_crowds(dataset: ClipDataset, max_boxes: int, max_proposals: int, *, with_targets: bool) -> None:
  """Says what does not fit the static shapes."""
  if max_boxes < 1:
    raise ValueError(f"max_boxes {max_boxes} has to be positive")
  counts = np.array([dataset.num_boxes(index) for index in range(len(dataset))])
  crowded = int((counts[:, 0] > max_boxes).sum())
  if crowded:
    logger.warning("%d examples have more than %d actors; only the largest are kept", crowded, max_boxes)
  if max_proposals:
    if dataset.proposals is None:
      raise ValueError(
        f"max_proposals is {max_proposals}, but the data set has no proposals: set data.proposal_threshold or .oracle"
      )
    crowded = int((counts @ [with_targets, 1] > max_proposals).sum())
    if crowded:
      logger.warning("%d examples have more than %d proposals; only the best are kept", crowded, max_proposals)


class _Share:
  """The rows of one process: its place in each batch that all processes share."""

  def __init__(self, rows: Any, batch_size: int, process_index: int, process_count: int):
    self._rows = rows
    self._batch_size = batch_size
    self._offset = process_index * batch_size
    self._stride = process_count * batch_size

  def __len__(self) -> int:
    return len(self._rows) // self._stride * self._batch_size

  def __getitem__(self, index: int) -> Example:
    batch, row = divmod(index, self._batch_size)
    return self._rows[batch * self._stride + self._offset + row]


class _Rows:
  """Makes rows of a `Batch`, of static shapes, out of indices of examples."""

  def __init__(
    self, dataset: ClipDataset, canvas: Canvas, short_side: float | None, max_boxes: int, max_proposals: int
  ):
    if short_side is not None and short_side < 1:
      raise ValueError(f"short_side {short_side} has to be positive")
    self._dataset = dataset
    self._canvas = canvas
    self._short_side = short_side
    self._max_boxes = max_boxes
    self._max_proposals = max_proposals

  def evaluate(self, index: int) -> Example:
    """The row of an example; index -1 gives one that fills the batch up."""
    if index >= 0:
      return self._row(self._dataset.example(index))
    return self._empty(np.zeros((self._dataset.clip.num_frames, *self._canvas, 3), np.uint8))

  def train(self, index: int, rng: np.random.Generator, options: Augment | None) -> Example:
    """The row of an example, augmented; the targets are proposals, too."""
    zoom = max(options.scale[1], 1.0) if options else 1.0
    example = self._dataset.example(index, zoom * (self._short_side or max(self._canvas)))
    if self._max_proposals:
      for proposals, targets in (("proposals", "boxes"), ("proposal_mask", "box_mask")):
        example[proposals] = np.concatenate([example[targets], example[proposals]])
    return self._row(*augment(example, options, rng)) if options else self._row(example)

  def _row(self, example: Example, scale: float = 1.0) -> Example:
    video, size = place_on_canvas(example["video"], self._canvas, self._short_side, scale)
    row = self._empty(video)
    row["video_size"][:] = size
    row["key"] = np.int32(example["key"])
    kept = self._kept_boxes(example)
    mask = example["box_mask"][..., kept]
    row["boxes"][..., : len(kept), :] = example["boxes"][..., kept, :] * mask[..., None]
    row["labels"][..., : len(kept), :] = example["labels"][..., kept, :] * mask[..., None]
    row["box_mask"][..., : len(kept)] = mask
    if self._max_proposals:
      kept = np.flatnonzero(example["proposal_mask"])[: self._max_proposals]
      row["proposals"][: len(kept)] = example["proposals"][kept]
      row["proposal_mask"][: len(kept)] = True
    return row

  def _kept_boxes(self, example: Example) -> np.ndarray:
    """Indices of the actors that become targets, in the order of the annotations."""
    sizes = area(example["boxes"]) * example["box_mask"]  # boxes have an area
    largest = np.atleast_2d(sizes).max(axis=0)  # over the frames, if these are tubes
    kept = np.flatnonzero(largest)
    if len(kept) > self._max_boxes:
      kept = np.sort(kept[np.argsort(-largest[kept], kind="stable")[: self._max_boxes]])
    return kept

  def _empty(self, video: np.ndarray) -> Example:
    slots = (self._max_boxes,)
    if self._dataset.tubes:
      slots = (self._dataset.clip.num_frames, *slots)
    row = {
      "video": video,
      "video_size": np.zeros(2, np.int32),
      "boxes": np.zeros((*slots, 4), np.float32),
      "labels": np.zeros((*slots, self._dataset.num_classes), np.float32),
      "box_mask": np.zeros(slots, bool),
      "key": np.int32(-1),
    }
    if self._max_proposals:
      row["proposals"] = np.zeros((self._max_proposals, 4), np.float32)
      row["proposal_mask"] = np.zeros(self._max_proposals, bool)
    return row


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
