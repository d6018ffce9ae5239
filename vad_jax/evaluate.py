"""Runs a model over a data set and scores what it found.

Knows no model: it is handed a function from batches to detections. As a command line,

    python -m vad_jax.evaluate --detections results.csv --ground-truth ava_val_v2.2.csv

it scores files that any tool wrote, and starts without JAX; see `vad_jax.metrics.score`.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from vad_jax import progress
from vad_jax.annotations import Keyframe, Rows
from vad_jax.batch import Batch, Detections
from vad_jax.metrics import score as score_files
from vad_jax.metrics.frame_map import FrameMap, frame_map, person_ap
from vad_jax.metrics.video_map import Dataset, VideoMap, video_map
from vad_jax.metrics.video_map import Protocol as TubeProtocol
from vad_jax.tubes import TubeDetections, TubeGroundTruth

if TYPE_CHECKING:
  from jax.sharding import Mesh

_TUBE_METRICS = {
  "frame_map_50": "frame-mAP@0.5",
  "video_map_20": "video-mAP@0.2",
  "video_map_50": "video-mAP@0.5",
  "video_map_75": "video-mAP@0.75",
  "video_map_50_95": "video-mAP@0.5:0.95",
}


class Annotated(Protocol):
  """What is asked of a data set: its annotated keyframes; the keys of batches are their indices."""

  @property
  def keyframes(self) -> Sequence[Keyframe]: ...

  def __len__(self) -> int: ...


class Clips(Protocol):
  """What is asked of a set of tubes: its clips, each a video's name and numbers of frames, in order of time."""

  truth: TubeGroundTruth

  @property
  def clips(self) -> Sequence[tuple[str, np.ndarray]]: ...

  def __len__(self) -> int: ...


class Evaluation(NamedTuple):
  """Scores, and the rows that they were computed from.

  Attributes:
    metrics: ``frame_map_50`` and ``person_ap_50``, fractions.
    frame_map: the same by class.
    ground_truth: one row for each box and action.
    detections: one row for each box and action, in order of the keyframes; ``extra`` is the score.
    persons: one row for each box; ``extra`` is the actor score.
  """

  metrics: dict[str, float]
  frame_map: FrameMap
  ground_truth: Rows
  detections: Rows
  persons: Rows


class TubeEvaluation(NamedTuple):
  """Scores of tubes, and what they were computed from.

  Attributes:
    metrics: ``frame_map_50``, ``video_map_20``, ``video_map_50``, ``video_map_75``, ``video_map_50_95``, fractions.
    video_map: the same by class, and more.
    ground_truth: the annotations of the videos that were shown; these are its only test videos.
    detections: one row for each box, in order of videos and frames; boxes in pixels of the annotations.
  """

  metrics: dict[str, float]
  video_map: VideoMap
  ground_truth: TubeGroundTruth
  detections: TubeDetections


def evaluate(
  predict_fn: Callable[[Batch], Detections],
  dataset: Annotated,
  batches: Iterable[Batch],
  label_map: dict[int, str],
  *,
  mesh: "Mesh",
  protocol: str = "activitynet",
  score: Literal["action", "product"] = "product",
  actor_threshold: float = 0.0,
  score_threshold: float = 0.0,
  should_stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
  """Predicts the whole set and scores it by a protocol of AVA. All processes get the same result.

  Args:
    predict_fn: from a batch on the devices to detections; best compiled.
    dataset: its keyframes are the ground truth.
    batches: this process's share of the set, each keyframe once; rows with key -1 are skipped.
    label_map: class id to name; the classes that count.
    mesh: the devices that the batches are spread over.
    protocol: see `frame_maps`.
    score: what ranks a detection: the score of the action alone (the AVA papers), or times that of the actor.
    actor_threshold: boxes below this actor score say nothing about actions, unless that leaves a keyframe
      without any.
    score_threshold: rows below this score are left out.
    should_stop: asked before each batch.

  Returns:
    The scores, or None where it was told to stop.

  Raises:
    ValueError: the batches did not cover the set exactly once.
  """
  found = _gather(predict_fn, len(dataset), batches, mesh, should_stop, tubes=False)
  if found is None:
    return None
  ground_truth = ground_truth_rows(dataset.keyframes)
  persons, detections = _to_rows(
    dataset.keyframes, found, sorted(label_map), score == "product", actor_threshold, score_threshold
  )
  result = frame_map(ground_truth, detections, label_map, iou=0.5, protocol=protocol)
  metrics = {"frame_map_50": result.mean_ap, "person_ap_50": person_ap(ground_truth, persons, iou=0.5)}
  return Evaluation(metrics, result, ground_truth, detections, persons)


def evaluate_tubes(
  predict_fn: Callable[[Batch], Detections],
  dataset: Clips,
  batches: Iterable[Batch],
  *,
  mesh: "Mesh",
  protocol: TubeProtocol,
  rules: Dataset | None = None,
  should_stop: Callable[[], bool] | None = None,
) -> TubeEvaluation | None:
  """Predicts all clips of a set and scores what was found in their frames, those that fill clips up left out.

  Args:
    predict_fn: from a batch on the devices to detections of tubes, whose action scores are final.
    dataset: its clips hold every frame of its videos once; keys of batches are their indices.
    batches: this process's share of the set, each clip once; rows with key -1 are skipped.
    mesh: the devices that the batches are spread over.
    protocol: see `vad_jax.metrics.video_map`.
    rules: the data set whose rules it shall take, for a protocol that has several.
    should_stop: asked before each batch.

  Returns:
    The scores, or None where it was told to stop. All processes get the same.

  Raises:
    ValueError: the batches did not cover the set exactly once, or the system does not detect tubes.
  """
  found = _gather(predict_fn, len(dataset), batches, mesh, should_stop, tubes=True)
  if found is None:
    return None
  names = list(dict.fromkeys(video for video, _ in dataset.clips))
  videos = {name: dataset.truth.videos[name] for name in names}
  truth = dataset.truth._replace(videos=videos, splits=[([], names)])
  detections = _to_tubes(dataset, names, found)
  result = video_map(truth, detections, protocol=protocol, dataset=rules)
  metrics = {name: result.summary[of] for name, of in _TUBE_METRICS.items()}
  return TubeEvaluation(metrics, result, truth, detections)


def _gather(
  predict_fn: Callable[[Batch], Detections],
  count: int,
  batches: Iterable[Batch],
  mesh: "Mesh",
  should_stop: Callable[[], bool] | None,
  *,
  tubes: bool,
) -> dict[int, Detections] | None:
  """What was found in each example, without its empty slots; None where it was told to stop."""
  from jax.experimental import multihost_utils  # not at the top: scoring files needs no JAX

  from vad_jax.sharding import to_global

  found: dict[int, Detections] = {}
  with progress.bar("evaluate", count) as advance:
    for host_batch in batches:
      if should_stop is not None and should_stop():
        return None
      batch = to_global(host_batch, mesh)
      # Keys take the same way as the rest, so that rows belong together however processes lie on the mesh.
      keys, out = multihost_utils.process_allgather((batch["key"], predict_fn(batch)), tiled=True)
      if (out.boxes.ndim == 4) != tubes:
        raise ValueError(
          "evaluation: the system answers for keyframes, the data set is one of tubes: set config.data.tubes=False"
          if tubes
          else "evaluation: the system answers for every frame, the data set is one of keyframes: set config.data.tubes"
        )
      rows = np.flatnonzero(keys >= 0)
      for row in rows:
        if keys[row] in found:
          raise ValueError(f"evaluation: example {keys[row]} came twice")
        slots = np.flatnonzero(out.valid[row])
        found[int(keys[row])] = Detections(
          *(out.boxes[row][..., slots, :], out.actor_score[row][..., slots], out.action_score[row][..., slots, :]),
          out.valid[row][slots],
        )
      advance(len(rows))
  if len(found) != count:
    raise ValueError(f"evaluation: {len(found)} of {count} examples came")
  return found


def _to_tubes(dataset: Clips, names: list[str], found: dict[int, Detections]) -> TubeDetections:
  """Detections of the frames that clips show, in the order of the clips."""
  index = {name: number for number, name in enumerate(names)}
  parts = []
  for key, (name, numbers) in enumerate(dataset.clips):
    video = dataset.truth.videos[name]
    height, width = video.size or (1, 1)
    shown = (numbers >= 1) & (numbers <= video.num_frames)
    boxes, actor, action = (values[shown] for values in found[key][:3])
    frame = np.repeat(numbers[shown], boxes.shape[1])
    parts.append(
      (
        np.full(len(frame), index[name], np.int32),
        frame.astype(np.int32),
        boxes.reshape(-1, 1, 4).astype(np.float64) * (width, height, width, height),
        actor.reshape(-1).astype(np.float64),
        action.reshape(-1, action.shape[-1]).astype(np.float32),
      )
    )
  columns: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
  return TubeDetections(names, *columns)


def ground_truth_rows(keyframes: Sequence[Keyframe]) -> Rows:
  """Annotations as rows: one for each box and action; one with action 0 for a keyframe that holds nobody."""
  parts = []
  for keyframe in keyframes:
    actor, label = np.nonzero(keyframe.labels)
    if len(actor):
      parts.append(_rows(keyframe, keyframe.boxes[actor], label + 1, keyframe.person_ids[actor]))
    else:
      parts.append(_rows(keyframe, np.full((1, 4), np.nan), np.zeros(1), np.ones(1)))
  return _concatenate(parts)


def _to_rows(
  keyframes: Sequence[Keyframe],
  found: dict[int, Detections],
  classes: list[int],
  product: bool,
  actor_threshold: float,
  score_threshold: float,
) -> tuple[Rows, Rows]:
  """Persons and detections, in the order of the keyframes."""
  persons, detections = [], []
  for key in range(len(keyframes)):
    boxes, actor_score, action_score = (np.asarray(values, np.float64) for values in found[key][:3])
    persons.append(_rows(keyframes[key], boxes, np.ones(len(boxes)), actor_score))
    kept = actor_score >= actor_threshold
    if not kept.any():
      kept[:] = True
    scores = action_score[kept][:, np.array(classes) - 1]
    if product:
      scores = scores * actor_score[kept, None]
    actor, column = np.nonzero(scores >= score_threshold)
    action = np.array(classes)[column]
    detections.append(_rows(keyframes[key], boxes[kept][actor], action, scores[actor, column]))
  return _concatenate(persons), _concatenate(detections)


def _rows(keyframe: Keyframe, boxes: np.ndarray, action: np.ndarray, extra: np.ndarray) -> Rows:
  count = len(boxes)
  return Rows(
    np.full(count, keyframe.video, object),
    np.full(count, keyframe.timestamp, np.float64),
    boxes.astype(np.float64),
    action.astype(np.int32),
    extra.astype(np.float64),
  )


def _concatenate(parts: Sequence[Rows]) -> Rows:
  columns: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
  return Rows(*columns)


if __name__ == "__main__":
  try:
    sys.exit(score_files.main())
  except KeyboardInterrupt:
    sys.exit("stopped; nothing was written")
