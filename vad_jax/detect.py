"""Runs a model over the frames of a video: around keyframes, or in consecutive clips that hold every frame once."""

import collections
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx

from vad_jax.batch import Batch, Detections
from vad_jax.datasets.augment import place_on_canvas
from vad_jax.datasets.loader import ClipSpec
from vad_jax.datasets.video import nearest
from vad_jax.person_boxes import PersonBoxes

ATTENTION = "attention"  # the map that is one of each slot and class, or of each slot
_CANVAS_MULTIPLE = 32
_TIME_EPSILON = 1e-3  # seconds; time stamps of frames are rounded

Frame = tuple[float, np.ndarray]  # time and picture
Clip = tuple[list[tuple[float, int]], np.ndarray]  # times that are answered with their place in the clip, and frames


class Seen(NamedTuple):
  """A frame as a model saw it, without padding, and its maps of it; see `vad_jax.models.System`."""

  frame: np.ndarray
  maps: dict[str, np.ndarray]


class Detector:
  """A model and how it takes the frames of a video.

  Attributes:
    tubes: whether it answers for every frame of a clip.
    offsets: ``[T]`` times of a clip's frames from its keyframe, in seconds.
  """

  def __init__(self, model: Any, info: dict[str, Any], size: tuple[int, int], *, batch_size: int, with_maps: bool):
    """Finds out what the model answers for, which compiles nothing.

    Args:
      model: the model.
      info: of its checkpoint, see `vad_jax.checkpoint.Loaded`.
      size: height and width of the video.
      batch_size: clips at once.
      with_maps: whether its maps are wanted.
    """
    self._graphdef, self._state = nnx.split(model)
    self.offsets = ClipSpec(**info["clip"]).times(0.0)
    self._canvas = video_canvas(size, info["short_side"], info["canvas"])
    self._place = functools.partial(place_on_canvas, canvas=self._canvas, short_side=info["short_side"])
    self._placed_size = self._place(np.zeros((1, *size, 3), np.uint8))[1]
    self._batch_size, self._with_maps = batch_size, with_maps
    nobody = PersonBoxes("", np.array([]), [], []) if getattr(model, "takes_proposals", False) else None
    shapes = _run_model.eval_shape(self._graphdef, self._state, self._inputs([], [], nobody), with_maps)
    self.tubes = len(shapes[0].boxes.shape) == 4

  def place(self, frame: np.ndarray) -> np.ndarray:
    """A frame as the model takes it: resized, on its canvas."""
    return self._place(frame[None])[0][0]

  def run(
    self, frames: Iterable[Frame], num_frames: int | None, stride: float | None, people: PersonBoxes | None
  ) -> Iterator[tuple[float, Detections, Seen | None]]:
    """Detects in a stream of frames.

    Args:
      frames: of the video, from its start.
      num_frames: how many there are, as far as it is known.
      stride: seconds between keyframes, see `clips`; tubes have every frame.
      people: as for `answer`.

    Yields:
      What `answer` does.
    """
    placed = ((time, self.place(frame)) for time, frame in frames)
    if self.tubes:
      return self.answer(consecutive_clips(placed, len(self.offsets), num_frames), people)
    return self.answer((([(time, 0)], clip) for time, clip in clips(placed, self.offsets, stride)), people)

  def answer(
    self, source: Iterable[Clip], people: PersonBoxes | None
  ) -> Iterator[tuple[float, Detections, Seen | None]]:
    """Detects in clips.

    Args:
      source: clips of placed frames.
      people: whom the model is to classify, or None where it finds them.

    Yields:
      Time and detections (no batch axis) of each keyframe, and what was seen, if asked for. Of tubes these are of each
      frame, and what was seen of the middle one of a clip.
    """

    def runs() -> Iterator[tuple[list[list[tuple[float, int]]], np.ndarray, Any]]:
      for batch in _batched(source, self._batch_size):
        moments = [moments for moments, _ in batch]
        inputs = self._inputs([clip for _, clip in batch], [times[0][0] for times in moments], people)
        shown = inputs["video"][:, len(self.offsets) // 2].copy() if self._with_maps else np.empty(0)
        yield moments, shown, _run_model(self._graphdef, self._state, inputs, self._with_maps)

    # One batch behind: the device works on a batch while the next one is being decoded.
    for (batch, shown, run), _ in itertools.pairwise(itertools.chain(runs(), [([], np.empty(0), None)])):
      found, maps = jax.device_get(run[0]), run[1]
      for row, moments in enumerate(batch):
        middle = min(moments, key=lambda moment: abs(moment[1] - len(self.offsets) // 2))
        for moment in moments:
          at = (row, moment[1]) if self.tubes else row
          detections = Detections(found.boxes[at], found.actor_score[at], found.action_score[at], found.valid[row])
          seen = self._seen(shown[row], maps, row) if self._with_maps and moment == middle else None
          yield moment[0], detections, seen

  def _inputs(self, batch: list[np.ndarray], times: list[float], people: PersonBoxes | None) -> dict[str, np.ndarray]:
    """A batch without annotations, which only a loss reads; the rows that no clip fills have key -1."""
    video = np.zeros((self._batch_size, len(self.offsets), *self._canvas, 3), np.uint8)
    for row, clip in enumerate(batch):
      video[row] = clip
    key = np.where(np.arange(self._batch_size) < len(batch), 0, -1).astype(np.int32)
    video_size = np.tile(np.array(self._placed_size, np.int32), (self._batch_size, 1))
    inputs = {"video": video, "video_size": video_size, "key": key}
    return inputs | (people.batch(times, self._batch_size) if people else {})

  def _seen(self, frame: np.ndarray, maps: dict[str, jax.Array], row: int) -> Seen:
    """Takes the padding away. Maps come from the device row by row: those of people and classes are many."""
    height, width = self._placed_size
    real = {}
    for name, values in maps.items():
      sides = values.shape[-2:] if name == ATTENTION else values.shape[1:3]
      rows, columns = (
        slice(round(n * side / padded)) for n, side, padded in zip(sides, self._placed_size, self._canvas, strict=True)
      )
      place = (..., rows, columns) if name == ATTENTION else (rows, columns)
      real[name] = np.asarray(values[row], np.float32)[place]
    return Seen(frame[:height, :width], real)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run_model(graphdef: Any, state: Any, inputs: dict[str, np.ndarray], with_maps: bool) -> tuple[Detections, Any]:
  batch = cast(Batch, inputs)
  model = nnx.merge(graphdef, state)
  out = model(batch)
  return model.detections(out, batch), model.maps(out, batch) if with_maps else {}


def video_canvas(size: tuple[int, int], short_side: int | None, training_canvas: tuple[int, int]) -> tuple[int, int]:
  """Height and width of the padded frames for a video of any shape: the smallest multiples of 32 that do.

  The short side becomes ``short_side``, unless the long side would then be longer than in training; a
  portrait video is treated like a landscape one.

  Args:
    size: height and width of the video.
    short_side: of the frames in training; None where they were stretched to the canvas, as this video is then.
    training_canvas: height and width that the training frames were padded to.
  """
  if short_side is None:
    return training_canvas
  scale = min(short_side / min(size), max(training_canvas) / max(size))
  height, width = (math.ceil(round(side * scale) / _CANVAS_MULTIPLE) * _CANVAS_MULTIPLE for side in size)
  return max(height, _CANVAS_MULTIPLE), max(width, _CANVAS_MULTIPLE)


def clips(
  frames: Iterable[tuple[float, np.ndarray]], offsets: np.ndarray, stride: float | None
) -> Iterator[tuple[float, np.ndarray]]:
  """Cuts the clips of all keyframes out of a stream and forgets frames that no coming clip needs.

  Args:
    frames: times (rising) and frames.
    offsets: ``[T]`` rising times of a clip's frames from its keyframe, in seconds.
    stride: seconds between keyframes, the first at 0; None makes every frame one.

  Yields:
    time of the keyframe and ``[T, ...]`` the frames nearest to its times, clamped to the stream's ends.
  """
  window: collections.deque[tuple[float, np.ndarray]] = collections.deque()
  waiting: collections.deque[float] = collections.deque()  # keyframes whose last frames have not come yet
  count = 0

  def cut(keyframe: float) -> tuple[float, np.ndarray]:
    times = np.array([time for time, _ in window])
    return keyframe, np.stack([window[nearest(times, keyframe + offset)][1] for offset in offsets])

  for time, frame in frames:
    window.append((time, frame))
    if stride is None:
      waiting.append(time)
    while stride is not None and count * stride <= time + _TIME_EPSILON:
      waiting.append(count * stride)
      count += 1
    while waiting and waiting[0] + offsets[-1] <= time:
      yield cut(waiting.popleft())
    coming = waiting[0] if waiting else time if stride is None else count * stride
    while len(window) > 1 and window[1][0] <= coming + offsets[0]:
      window.popleft()
  for keyframe in waiting:
    yield cut(keyframe)


def consecutive_clips(frames: Iterable[Frame], length: int, num_frames: int | None) -> Iterator[Clip]:
  """Cuts a stream into clips that hold every frame once; the first and the last frame are repeated to fill them up.

  Where the number of frames is right, these are the clips of `vad_jax.datasets.tube_clips.cut`.

  Args:
    frames: times and frames.
    length: ``T``, frames of a clip.
    num_frames: how many there are, as far as it is known.
  """
  before = -(num_frames or 0) % length // 2
  moments: list[tuple[float, int]] = []
  clip: list[np.ndarray] = []
  for time, frame in frames:
    clip += [frame] * (before + 1)
    moments.append((time, len(clip) - 1))
    before = 0
    if len(clip) == length:
      yield moments, np.stack(clip)
      moments, clip = [], []
  if clip:
    yield moments, np.stack(clip + [clip[-1]] * (length - len(clip)))


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  iterator = iter(items)
  while batch := list(itertools.islice(iterator, size)):
    yield batch
