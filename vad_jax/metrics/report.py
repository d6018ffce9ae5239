"""One HTML page on a set of detections: how good they are, what is wrong with them, how that looks.

The page opens offline and needs no JavaScript: charts and pictures are part of it, and so is a small video. The
same numbers stand as JSON beside it.
"""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from vad_jax.annotations import PathLike
from vad_jax.metrics.analysis import KINDS, Analysis, Confusion, Example, compare
from vad_jax.metrics.frame_map import FrameMap
from vad_jax.metrics.page import Chart, chart, data_uri, duration, percent, write_page

_PICTURE_WIDTH = 560
_NUM_CONFUSED_CLASSES = 20
_NUM_CONFUSED_PAIRS = 10
_HEADLINE = {"person_ap_50": "person AP@0.5", "wall_seconds": "wall time"}  # of metrics; the others go to a table
_MEANINGS = {
  "correct": "claims a box of its class",
  "localisation": "right class, box too far off",
  "confusion": "on a person who does something else",
  "duplicate": "on a box that a better one has claimed",
  "background": "on nobody",
  "missed": "annotated, and no detection claims it",
}

Frames = Callable[[str, float], np.ndarray | None]


class _ClassRow(NamedTuple):
  name: str
  ap: float
  num_ground_truth: int
  num_detections: int
  num_train: int | None
  train_share: float  # of the largest class, on a logarithmic scale
  kinds: dict[str, int]  # of the best detections
  precision: np.ndarray  # at 101 recalls


class _HeatRow(NamedTuple):
  name: str
  num_people: int
  cells: list[tuple[float, float, str]]  # share of the people, depth of the colour, in words


class _Box(NamedTuple):
  mark: str
  kind: str
  x: float
  y: float
  width: float
  height: float


class _Person(NamedTuple):
  mark: str
  labels: list[tuple[str, float]]  # class, score of the detection that found it or NaN


class _Picture(NamedTuple):
  title: str
  score: float
  source: str | None
  width: int
  height: int
  boxes: list[_Box]
  people: list[_Person]
  mistakes: list[tuple[str, str, float, str]]  # mark, class, score, kind


def write_report(
  path: PathLike,
  analysis: Analysis,
  *,
  title: str,
  label_map: Mapping[int, str],
  facts: Mapping[str, Any] | None = None,
  metrics: Mapping[str, Any] | None = None,
  train_counts: Mapping[int, int] | None = None,
  frames: Frames | None = None,
  video: PathLike | None = None,
  maps: Sequence[PathLike] = (),
  config: Mapping[str, Any] | None = None,
  warnings: Sequence[str] = (),
  before: tuple[str, FrameMap] | None = None,
) -> None:
  """Writes the page, and its numbers to a file of the same name that ends in ``.json``.

  Args:
    path: the HTML file; its directory has to exist.
    analysis: what the page shows.
    title: heading, for example the name of the run.
    label_map: class id to name.
    facts: what was scored and how, such as protocol, label map and files; shown as a table.
    metrics: name to number; ``person_ap_50`` (a fraction) and ``wall_seconds`` become part of the headline, the
      rest a table.
    train_counts: class id to number of training boxes; they order the classes.
    frames: gives the picture of a keyframe, ``[H, W, 3]`` uint8 RGB, or None where there is none.
    video: an mp4; becomes part of the page when it is small, else a link relative to the page.
    maps: pictures of what the model sees where in that video.
    config: settings of the run, shown folded.
    warnings: sentences that the reader should know before the numbers.
    before: name and scores of another run, to compare with.

  Raises:
    FileNotFoundError: there is no such video or directory.
  """
  scores = analysis.frame_map
  metrics = {name: value for name, value in (metrics or {}).items() if name != "frame_map_50"}
  changes = compare(before[1], scores) if before else []
  rows = _class_rows(analysis, label_map, train_counts)
  numbers = {
    "label_map": label_map,
    "facts": facts or {},
    "metrics": metrics,
    "train_counts": train_counts,
    "analysis": analysis._asdict() | {"frame_map": scores._replace(curves={})},
    "compared_with": before and {"name": before[0], "mean_ap": before[1].mean_ap, "changes": changes},
  }
  write_page(
    path,
    "report.html",
    title=title,
    headline=_headline(analysis, metrics),
    facts=_counts(analysis) | dict(facts or {}) | {k: v for k, v in metrics.items() if k not in _HEADLINE},
    numbers=numbers,
    video=video,
    maps=maps,
    config=config,
    warnings=warnings,
    frame_map=scores,
    charts=_charts(analysis),
    oracle=analysis.oracle,
    kinds=KINDS,
    meanings=_MEANINGS,
    errors=analysis.errors,
    best_totals={kind: sum(counts.values()) for kind, counts in analysis.errors.best_counts.items()},
    totals={kind: sum(counts.values()) for kind, counts in analysis.errors.counts.items()},
    scored=[row for row in rows if not math.isnan(row.ap)],
    unscored=[row.name for row in rows if math.isnan(row.ap)],
    has_train_counts=train_counts is not None,
    curve=_curve,
    heat=_heat_map(analysis.confusion, label_map),
    pairs=_confused_pairs(analysis.confusion, label_map),
    pictures=[
      (name, [_picture(example, label_map, frames) for example in examples])
      for name, examples in (("Best keyframes", analysis.best), ("Worst keyframes", analysis.worst))
    ],
    before=before,
    changes=[(label_map[change.action], change) for change in changes],
    largest_change=max((abs(change.gain) for change in changes), default=0.0) or 1.0,
  )


def scalars(analysis: Analysis) -> dict[str, float]:
  """The numbers of an analysis under flat names, such as ``oracle/boxes``; those that are NaN are left out."""
  result = {f"mean_ap/iou_{iou:.2f}": value for iou, value in analysis.by_iou.items()}
  result |= {f"oracle/{name}": value for name, value in analysis.oracle._asdict().items()}
  result |= {f"gain/{name}": value for name, value in analysis.errors.gain.items()}
  for group, subsets in (("area", analysis.by_area), ("actors", analysis.by_actors)):
    result |= {f"mean_ap_by_{group}/{re.sub('[^0-9a-z.]+', '_', s.name).strip('_')}": s.mean_ap for s in subsets}
  return {name: value for name, value in result.items() if not math.isnan(value)}


def _headline(analysis: Analysis, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
  tiles = [
    (f"frame-mAP@{analysis.frame_map.iou:g}", percent(analysis.frame_map.mean_ap)),
    ("frame-mAP@0.5:0.95", percent(float(np.mean(list(analysis.by_iou.values()))))),
  ]
  for name, label in _HEADLINE.items():
    if name in metrics:
      tiles.append((label, duration(metrics[name]) if name == "wall_seconds" else percent(metrics[name])))
  return tiles


def _counts(analysis: Analysis) -> dict[str, int]:
  scores = analysis.frame_map
  return {
    "annotated keyframes": scores.num_keyframes,
    "annotated boxes, one for each action": sum(scores.num_ground_truth.values()),
    "scored detections": sum(scores.num_detections.values()),
    "of these correct": sum(scores.num_true_positives.values()),
    "classes with ground truth": sum(count > 0 for count in scores.num_ground_truth.values()),
  }


def _class_rows(
  analysis: Analysis, label_map: Mapping[int, str], train_counts: Mapping[int, int] | None
) -> list[_ClassRow]:
  """The classes; those with most training data come first, or without such counts those with most ground truth."""
  scores = analysis.frame_map
  order = train_counts or scores.num_ground_truth
  most = math.log1p(max(order.values(), default=0)) or 1.0
  return [
    _ClassRow(
      label_map[index],
      scores.ap[index],
      scores.num_ground_truth[index],
      scores.num_detections[index],
      None if train_counts is None else int(train_counts.get(index, 0)),
      math.log1p(order.get(index, 0)) / most,
      {kind: counts[index] for kind, counts in analysis.errors.best_counts.items()},
      analysis.precision[index],
    )
    for index in sorted(scores.ap, key=lambda index: (-order.get(index, 0), index))
  ]


def _charts(analysis: Analysis) -> dict[str, Chart]:
  oracle = analysis.oracle
  return {
    "iou": chart("mAP by IoU", "least IoU", [(f"{iou:.2f}"[1:], ap, "") for iou, ap in analysis.by_iou.items()]),
    "area": chart(
      "mAP by size of the person",
      "box, share of the frame",
      [(s.name, s.mean_ap, f"{s.num_boxes:,}") for s in analysis.by_area],
    ),
    "actors": chart(
      "mAP by number of people",
      "annotated people in the keyframe",
      [(s.name, s.mean_ap, f"{s.num_boxes:,}") for s in analysis.by_actors],
    ),
    "oracle": chart(
      "With help from the ground truth",
      "taken from the ground truth",
      [
        ("nothing", oracle.detections, ""),
        ("boxes", oracle.boxes, ""),
        ("labels", oracle.labels, ""),
        ("both", oracle.both, ""),
      ],
    ),
    "gain": chart(
      "What mending mistakes would gain",
      "mistake",
      [(name, gain, "") for name, gain in analysis.errors.gain.items()],
      colored=True,
    ),
  }


def _heat_map(confusion: Confusion, label_map: Mapping[int, str]) -> list[_HeatRow]:
  """The most confused classes, in the order of their ids."""
  chosen: set[int] = set()
  for _, pair in _pairs(confusion):
    if len(chosen | set(pair)) > _NUM_CONFUSED_CLASSES:
      break
    chosen |= set(pair)
  index = sorted(chosen)
  share = confusion.matrix[np.ix_(index, index)] / np.maximum(confusion.num_people[index], 1)[:, None]
  depth = np.where(
    np.eye(len(index), dtype=bool), share, share / max((share - np.diag(share.diagonal())).max(initial=0), 1e-9)
  )
  names = [label_map[int(confusion.classes[i])] for i in index]
  rows = []
  for i, name in enumerate(names):
    people = int(confusion.num_people[index[i]])
    words = [
      f"{name}: {names[j]} found on {confusion.matrix[index[i], index[j]]:,} of {people:,}" for j in range(len(names))
    ]
    rows.append(_HeatRow(name, people, list(zip(share[i].tolist(), depth[i].tolist(), words, strict=True))))
  return rows


def _confused_pairs(confusion: Confusion, label_map: Mapping[int, str]) -> list[tuple[str, str, int, int]]:
  return [
    (
      label_map[int(confusion.classes[row])],
      label_map[int(confusion.classes[column])],
      count,
      int(confusion.num_people[row]),
    )
    for count, (row, column) in _pairs(confusion)[:_NUM_CONFUSED_PAIRS]
  ]


def _pairs(confusion: Confusion) -> list[tuple[int, tuple[int, int]]]:
  """Count, row and column of all confusions, the most frequent first."""
  matrix = confusion.matrix * (1 - np.eye(len(confusion.classes), dtype=np.int64))
  rows, columns = np.nonzero(matrix)
  counts = matrix[rows, columns]
  order = np.argsort(-counts, kind="stable")
  return [(int(counts[i]), (int(rows[i]), int(columns[i]))) for i in order]


def _picture(example: Example, label_map: Mapping[int, str], frames: Frames | None) -> _Picture:
  frame = frames(example.video, example.timestamp) if frames else None
  height, width = frame.shape[:2] if frame is not None else (9, 16)
  height, width = round(_PICTURE_WIDTH * height / width), _PICTURE_WIDTH
  scale = np.array([width, height, width, height])
  boxes, people, mistakes = [], [], []

  def add(mark: str, kind: str, box: np.ndarray) -> None:
    x1, y1, x2, y2 = np.clip(box, 0, 1) * scale
    boxes.append(_Box(mark, kind, x1, y1, x2 - x1, y2 - y1))

  truth = example.ground_truth
  for number, box in enumerate(dict.fromkeys(map(tuple, truth.boxes.tolist()))):
    of_person = np.flatnonzero((truth.boxes == box).all(1))
    labels = [(label_map[int(truth.action[i])], float(example.found_score[i])) for i in of_person]
    letters = string.ascii_uppercase
    mark = letters[number % 26] * (number // 26 + 1)
    people.append(_Person(mark, labels))
    add(mark, "person", np.array(box))
  found = example.detections
  wrong: dict[tuple[float, ...], str] = {}
  for i in np.argsort(-found.extra, kind="stable"):
    kind = KINDS[example.kind[i]]
    if kind == "correct":
      add("", kind, found.boxes[i])
      continue
    box = tuple(found.boxes[i].tolist())
    if box not in wrong:
      wrong[box] = str(len(wrong) + 1)
      add(wrong[box], kind, found.boxes[i])
    mistakes.append((wrong[box], label_map[int(found.action[i])], float(found.extra[i]), kind))
  source = None if frame is None else _jpeg(frame, (width, height))
  title = f"{example.video} at {example.timestamp:g} s"
  return _Picture(title, example.score, source, width, height, boxes, people, mistakes)


def _jpeg(image: np.ndarray, size: tuple[int, int]) -> str:
  small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if size[0] < image.shape[1] else cv2.INTER_CUBIC)
  _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 84])
  return data_uri("image/jpeg", data.tobytes())


def _curve(precision: np.ndarray, width: float, height: float) -> str:
  """Points of an SVG path, up to the largest recall."""
  last = int(np.flatnonzero(precision).max(initial=0))
  return "L".join(f"{width * i / 100:.4g} {height * (1 - precision[i]):.4g}" for i in range(last + 1))
