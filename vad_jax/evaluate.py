"""Scores detections: of a model over a data set, or of a file that any tool wrote.

    python -m vad_jax.evaluate --detections results.csv --ground-truth ava_val_v2.2.csv

prints mAP, the AP of every class, and what about these files lets evaluators disagree. It reads the result CSVs and
ground truth of AVA, and what `vad_jax.predict` writes; it needs no JAX. `evaluate` knows no model: it is handed a
function from batches to detections.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

import vad_jax
from vad_jax import progress
from vad_jax.annotations import (
  LABEL_MAPS,
  AnnotationError,
  Keyframe,
  Rows,
  iterate_ava_csv,
  read_ava_csv,
  read_detections_json,
  read_excluded,
  read_label_map,
)
from vad_jax.batch import Batch, Detections
from vad_jax.metrics.frame_map import (
  FrameMap,
  SplitKeyframeError,
  frame_map,
  frame_maps,
  person_ap,
)
from vad_jax.metrics.protocols import PROTOCOLS

if TYPE_CHECKING:
  from jax.sharding import Mesh  # starts JAX up, which scoring files can do without


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
  from jax.experimental import multihost_utils

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


# --- command line -------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  options = _parse(arguments)
  try:
    content = _score_keyframes(options)
    if options.json:
      options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  _print(content)
  return 0


def _score_keyframes(options: argparse.Namespace) -> dict[str, Any]:
  """Scores files by a protocol of AVA."""
  label_map = read_label_map(options.label_map)
  excluded = read_excluded(options.excluded) if options.excluded else set()
  truth = read_ava_csv(options.ground_truth)
  if not len(truth.video):
    raise AnnotationError(f"{options.ground_truth}: empty file; expected annotations")
  kwargs: Any = {"ious": options.iou, "protocol": options.protocol, "excluded": excluded}
  persons = None
  if _holds_json(options.detections):
    rows, persons = read_detections_json(options.detections)
    results = frame_maps(truth, rows, label_map, **kwargs)
  else:
    try:
      results = frame_maps(truth, _counted(options.detections), label_map, **kwargs)
    except SplitKeyframeError:  # takes more memory
      results = frame_maps(truth, read_ava_csv(options.detections), label_map, **kwargs)
  by_iou = {f"{result.iou:g}": result.mean_ap for result in results}
  ap = {index: float(np.mean([result.ap[index] for result in results])) for index in sorted(label_map)}
  first = results[0]
  return {
    "mAP": _or_null(float(np.mean(list(by_iou.values())))),
    "AP": {str(index): _or_null(value) for index, value in ap.items()},
    "mAP_by_iou": {iou: _or_null(value) for iou, value in by_iou.items()},
    **({"person_AP": person_ap(truth, persons, iou=first.iou)} if persons else {}),
    "protocol": options.protocol,
    "iou": options.iou[0] if len(options.iou) == 1 else options.iou,
    "classes": {str(index): name for index, name in sorted(label_map.items())},
    "num_keyframes": first.num_keyframes,
    "num_boxes": first.num_boxes,
    "num_ground_truth": {str(index): count for index, count in first.num_ground_truth.items()},
    "num_detections": {str(index): count for index, count in first.num_detections.items()},
    "warnings": first.differences(),
    "files": {
      name: {"path": str(path), "sha256": _fingerprint(path)}
      for name in ("detections", "ground_truth", "label_map", "excluded")
      if (path := getattr(options, name))
    },
    "vad_jax": vad_jax.__version__,
  }


def _holds_json(path: Path) -> bool:
  with path.open("rb") as file:
    return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _counted(path: Path) -> Iterator[Rows]:
  count = 0
  with progress.bar(f"{path.name}: rows", None) as advance:
    for rows in iterate_ava_csv(path):
      yield rows
      count += len(rows.action)
      advance(len(rows.action))
  if not count:
    raise AnnotationError(f"{path}: empty file; expected detections")


def _or_null(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _fingerprint(path: str | Path) -> str:
  with open(LABEL_MAPS.get(str(path), path), "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _print(content: dict[str, Any]) -> None:
  percent = lambda value: "-" if value is None else f"{100 * value:.2f}"  # noqa: E731
  console = Console()
  table = Table("id", "class", "AP %", "boxes", "detections", title=f"AP by class ({content['protocol']})")
  for column in table.columns[2:]:
    column.justify = "right"
  for index, name in content["classes"].items():
    counts = (str(content[key][index]) for key in ("num_ground_truth", "num_detections"))
    table.add_row(index, name, percent(content["AP"][index]), *counts)
  console.print(table)
  summary = Table(show_header=False, title="summary")
  summary.add_row("protocol", content["protocol"])
  summary.add_row("label map", f"{content['files']['label_map']['path']}, {len(content['classes'])} classes")
  summary.add_row("keyframes", f"{content['num_keyframes']:,}")
  summary.add_row("annotated boxes", f"{content['num_boxes']:,}")
  for iou, value in content["mAP_by_iou"].items():
    summary.add_row(f"mAP@{iou} %", percent(value))
  if len(content["mAP_by_iou"]) > 1:
    summary.add_row("mean of these %", percent(content["mAP"]))
  if "person_AP" in content:
    summary.add_row("person AP %", percent(content["person_AP"]))
  console.print(summary)
  for warning in content["warnings"]:
    print(f"warning: {warning}", file=sys.stderr)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m vad_jax.evaluate", description="Scores detections in a file.")
  parser.add_argument("--detections", required=True, type=Path, help="AVA result CSV, or JSON of vad_jax.predict")
  parser.add_argument("--ground-truth", required=True, type=Path, help="AVA annotation CSV")
  parser.add_argument("--protocol", choices=list(PROTOCOLS), default="activitynet", help="default: %(default)s")
  parser.add_argument(
    "--label-map", default="ava_60", help="pbtxt file, ava_60 or ava_80: the classes to score; default: %(default)s"
  )
  parser.add_argument("--excluded", type=Path, help="CSV of video_id,timestamp: keyframes to leave out")
  parser.add_argument(
    "--iou", type=_ious, default=[0.5], help="0.5, or a list 0.2,0.5, or start:step:stop 0.5:0.05:0.95; default: 0.5"
  )
  parser.add_argument("--json", type=Path, help="file to write the numbers to")
  return parser.parse_args(arguments)


def _ious(text: str) -> list[float]:
  try:
    values = [float(value) for value in text.replace(":", ",").split(",")]
    if ":" in text:
      start, step, stop = values
      values = np.linspace(start, stop, round((stop - start) / step) + 1).tolist()
    if not values or not all(0 < value <= 1 for value in values):
      raise ValueError
  except (ValueError, ZeroDivisionError, OverflowError):
    raise argparse.ArgumentTypeError(
      f"{text!r}: expected fractions in (0, 1], as 0.5 or 0.2,0.5 or 0.5:0.05:0.95"
    ) from None
  return values


if __name__ == "__main__":
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit("stopped; nothing was written")
