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

if TYPE_CHECKING:
  from jax.sharding import Mesh


class Annotated(Protocol):
  """What is asked of a data set: its annotated keyframes; the keys of batches are their indices."""

  @property
  def keyframes(self) -> Sequence[Keyframe]: ...

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
  from jax.experimental import multihost_utils  # not at the top: scoring files needs no JAX

  from vad_jax.sharding import to_global

  found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
  with progress.bar("evaluate", len(dataset)) as advance:
    for host_batch in batches:
      if should_stop is not None and should_stop():
        return None
      batch = to_global(host_batch, mesh)
      # Keys take the same way as the rest, so that rows belong together however processes lie on the mesh.
      keys, out = multihost_utils.process_allgather((batch["key"], predict_fn(batch)), tiled=True)
      rows = np.flatnonzero(keys >= 0)
      for row in rows:
        if keys[row] in found:
          raise ValueError(f"evaluation: keyframe {keys[row]} came twice")
        valid = out.valid[row]
        boxes, actor, action = (np.asarray(values[row][valid], np.float64) for values in out[:3])
        found[int(keys[row])] = boxes, actor, action
      advance(len(rows))
  if len(found) != len(dataset):
    raise ValueError(f"evaluation: {len(found)} of {len(dataset)} keyframes came")
  ground_truth = ground_truth_rows(dataset.keyframes)
  persons, detections = _to_rows(
    dataset.keyframes, found, sorted(label_map), score == "product", actor_threshold, score_threshold
  )
  result = frame_map(ground_truth, detections, label_map, iou=0.5, protocol=protocol)
  metrics = {"frame_map_50": result.mean_ap, "person_ap_50": person_ap(ground_truth, persons, iou=0.5)}
  return Evaluation(metrics, result, ground_truth, detections, persons)


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
  found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]],
  classes: list[int],
  product: bool,
  actor_threshold: float,
  score_threshold: float,
) -> tuple[Rows, Rows]:
  """Persons and detections, in the order of the keyframes."""
  persons, detections = [], []
  for key in range(len(keyframes)):
    boxes, actor_score, action_score = found[key]
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
