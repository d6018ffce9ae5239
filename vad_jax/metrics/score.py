"""Scores files of detections by any protocol: what ``python -m vad_jax.evaluate`` does.

    python -m vad_jax.evaluate --detections results.csv --ground-truth ava_val_v2.2.csv

prints mAP, the AP of every class, and what about these files lets evaluators disagree. With ``--json`` the same goes to
a file, as fractions: ``mAP`` and ``AP`` (by class id) are those of boxes in frames, ``video_mAP`` and ``video_AP``
those of tubes; where ``--iou`` is a list they are means over it. Classes that a protocol leaves out are null.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

import vad_jax
from vad_jax import progress, tubes
from vad_jax.annotations import (
  LABEL_MAPS,
  AnnotationError,
  Rows,
  iterate_ava_csv,
  read_ava_csv,
  read_detections_json,
  read_excluded,
  read_label_map,
)
from vad_jax.metrics.frame_map import SplitKeyframeError, frame_maps, person_ap
from vad_jax.metrics.protocols import PROTOCOLS
from vad_jax.metrics.video_map import Dataset, mean_over_splits, video_map
from vad_jax.metrics.video_map import Protocol as TubeProtocol


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  options = _parse(arguments)
  try:
    content = _score_keyframes(options) if options.protocol in PROTOCOLS else _score_tubes(options)
    content["files"] = {name: _fingerprint(path) for name, path in _files(options).items()}
    content["vad_jax"] = vad_jax.__version__
    if options.protocol in PROTOCOLS and options.report:
      _write_report(options, content)
    if options.json:
      options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  _print(content)
  return 0


def _score_keyframes(options: argparse.Namespace) -> dict[str, Any]:
  """Scores files by a protocol of AVA."""
  path = options.detections[0]
  label_map = read_label_map(options.label_map)
  excluded = read_excluded(options.excluded) if options.excluded else set()
  truth = read_ava_csv(options.ground_truth)
  if not len(truth.video):
    raise AnnotationError(f"{options.ground_truth}: empty file; expected annotations")
  kwargs: Any = {"ious": options.iou, "protocol": options.protocol, "excluded": excluded}
  person = {}
  if _holds_json(path):
    rows, persons = read_detections_json(path)
    results = frame_maps(truth, rows, label_map, **kwargs)
    kept = [keyframe not in excluded for keyframe in zip(truth.video, truth.timestamp, strict=True)]
    person["person_AP"] = person_ap(truth.select(np.array(kept)), persons, iou=options.iou[0])
  else:
    try:
      results = frame_maps(truth, _counted(path), label_map, **kwargs)
    except SplitKeyframeError:  # takes more memory
      results = frame_maps(truth, _whole(path), label_map, **kwargs)
  first = results[0]
  return {
    "protocol": options.protocol,
    "label_map": options.label_map,
    **_means(options.iou, [result.mean_ap for result in results]),
    **person,
    "AP": _by_class(np.mean([[result.ap[index] for index in label_map] for result in results], axis=0), label_map),
    "num_keyframes": first.num_keyframes,
    "num_boxes": first.num_boxes,
    "num_ground_truth": _by_class(first.num_ground_truth.values(), first.num_ground_truth),
    "num_detections": _by_class(first.num_detections.values(), first.num_detections),
    "classes": _by_class(label_map.values(), label_map),
    "warnings": first.differences(),
  }


def _write_report(options: argparse.Namespace, content: dict[str, Any]) -> None:
  """Writes the page on detections of AVA, compared with others where they are given."""
  from vad_jax.metrics.analysis import analyse
  from vad_jax.metrics.report import write_report

  label_map = read_label_map(options.label_map)
  truth = read_ava_csv(options.ground_truth)
  kwargs: Any = {
    "protocol": options.protocol,
    "excluded": read_excluded(options.excluded) if options.excluded else set(),
  }
  before, counts = None, None
  if options.compare:
    before = (
      options.compare.name,
      frame_maps(truth, _whole(options.compare), label_map, ious=options.iou[:1], **kwargs)[0],
    )
  if options.train_annotations:
    actions = read_ava_csv(options.train_annotations).action
    counts = {index: int(np.count_nonzero(actions == index)) for index in label_map}
  files = {role: f"{file['path']} (sha256 {file['sha256'][:12]})" for role, file in content["files"].items()}
  write_report(
    options.report,
    analyse(truth, _whole(options.detections[0]), label_map, iou=options.iou[0], **kwargs),
    title=options.detections[0].name,
    label_map=label_map,
    facts={"protocol": options.protocol, "label map": options.label_map, **files},
    metrics={"person_ap_50": content["person_AP"]} if "person_AP" in content else {},
    train_counts=counts,
    warnings=content["warnings"],
    before=before,
  )


def _whole(path: Path) -> Rows:
  """All detections of a file at once."""
  return read_detections_json(path)[0] if _holds_json(path) else read_ava_csv(path)


def _score_tubes(options: argparse.Namespace) -> dict[str, Any]:
  """Scores files by a protocol of JHMDB51-21, UCF101-24 or MultiSports; class ids count from 1."""
  truth = tubes.read_ground_truth(options.ground_truth)
  splits = range(len(options.detections)) if len(options.detections) > 1 else [options.split - 1]
  results = [
    video_map(
      truth,
      tubes.read_detections(path, len(truth.labels)),
      protocol=options.protocol,
      dataset=options.dataset,
      split=split,
    )
    for path, split in zip(options.detections, splits, strict=True)
  ]
  result = mean_over_splits(results) if len(results) > 1 else results[0]
  ious = [round(iou, 2) for iou in options.iou]
  if missing := set(ious) - set(result.frame_ap):
    raise ValueError(f"--iou {missing.pop():g}: tubes are scored at multiples of 0.05 only")
  frame_ap, video_ap = ([ap[iou] for iou in ious] for ap in (result.frame_ap, result.video_ap))
  ids = range(1, len(truth.labels) + 1)
  return {
    "protocol": options.protocol,
    **({"dataset": options.dataset} if options.dataset else {}),
    "splits": [split + 1 for split in splits],
    **_means(ious, np.nanmean(frame_ap, axis=1).tolist()),
    **{f"video_{key}": value for key, value in _means(ious, np.nanmean(video_ap, axis=1).tolist()).items()},
    "summary": {name: _json(value) for name, value in result.summary.items()},
    "AP": _by_class(np.mean(frame_ap, axis=0), ids),
    "video_AP": _by_class(np.mean(video_ap, axis=0), ids),
    "num_videos": result.num_videos,
    "num_ground_truth": _by_class(result.num_boxes, ids),
    "num_ground_truth_tubes": _by_class(result.num_tubes, ids),
    "num_detected_tubes": _by_class(result.num_linked, ids),
    "classes": _by_class(truth.labels, ids),
    "warnings": [f"detections in videos that are no test videos (left out): {result.num_ignored:,}"]
    if result.num_ignored
    else [],
  }


def _means(ious: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
  by_iou = {f"{iou:g}": _json(value) for iou, value in zip(ious, values, strict=True)}
  return {"mAP": _json(np.mean(values)), "mAP_by_iou": by_iou}


def _by_class(values: Iterable[Any], ids: Iterable[int]) -> dict[str, Any]:
  return {str(index): _json(value) for index, value in sorted(zip(ids, values, strict=True))}


def _json(value: Any) -> Any:
  """A number or text that JSON can hold; None where there is no number."""
  value = value.item() if isinstance(value, np.generic) else value
  return None if isinstance(value, float) and math.isnan(value) else value


def _holds_json(path: Path) -> bool:
  with path.open("rb") as file:
    return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _counted(path: Path) -> Iterator[Rows]:
  """The rows of a result CSV, with progress."""
  count = 0
  with progress.bar(f"{path.name}: rows", None) as advance:
    for rows in iterate_ava_csv(path):
      yield rows
      count += len(rows.action)
      advance(len(rows.action))
  if not count:
    raise AnnotationError(f"{path}: empty file; expected detections")


def _files(options: argparse.Namespace) -> dict[str, Path]:
  """What was read, by role."""
  many = len(options.detections) > 1
  files = {f"detections_{n}" if many else "detections": path for n, path in enumerate(options.detections, 1)}
  files["ground_truth"] = options.ground_truth
  if options.protocol in PROTOCOLS:
    files["label_map"] = LABEL_MAPS.get(options.label_map, Path(options.label_map))
  return files | ({"excluded": options.excluded} if options.excluded else {})


def _fingerprint(path: Path) -> dict[str, str]:
  with path.open("rb") as file:
    return {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


_COLUMNS = {
  "AP": "AP %",
  "video_AP": "video AP %",
  "num_ground_truth": "annotated",
  "num_ground_truth_tubes": "tubes",
  "num_detections": "detected",
  "num_detected_tubes": "detected tubes",
}
_ROWS = {
  "protocol": "protocol",
  "dataset": "rules of",
  "splits": "splits",
  "label_map": "label map",
  "num_keyframes": "annotated keyframes",
  "num_boxes": "annotated boxes",
  "num_videos": "test videos",
  "mAP": "mAP %",
  "mAP_by_iou": "mAP@{} %",
  "video_mAP": "video-mAP %",
  "video_mAP_by_iou": "video-mAP@{} %",
  "person_AP": "person AP %",
  "summary": "{} %",
}


def _print(content: dict[str, Any]) -> None:
  """Prints what is there, as one table of classes and one of everything else."""
  columns = [key for key in _COLUMNS if key in content]
  table = Table("id", "class", *(_COLUMNS[key] for key in columns), title="by class")
  for column in table.columns[2:]:
    column.justify = "right"
  for index, name in content["classes"].items():
    table.add_row(index, name, *(_text(content[key][index]) for key in columns))
  overall = Table(show_header=False, title="overall")
  for key, label in _ROWS.items():
    value = content.get(key)
    for name, number in value.items() if isinstance(value, dict) else [("", value)] if key in content else []:
      overall.add_row(label.format(name), _text(number))
  console = Console(markup=False, highlight=False)  # names of classes and files may hold brackets
  console.print(table, overall)
  for warning in content["warnings"]:
    print(f"warning: {warning}", file=sys.stderr)


def _text(value: Any) -> str:
  if isinstance(value, int):
    return f"{value:,}"
  return "-" if value is None else f"{100 * value:.2f}" if isinstance(value, float) else str(value)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.evaluate",
    description="Scores detections in a file, whoever wrote it.",
    epilog="Files of AVA: CSV; detections of vad_jax.predict: JSON. Files of JHMDB51-21, UCF101-24, MultiSports: the "
    "published pickles (no code of theirs is run), JSON, CSV, lines of the class-query code.",
  )
  parser.add_argument(
    "--detections", required=True, type=Path, nargs="+", help="several only for tubes: one for each split, from 1 up"
  )
  parser.add_argument("--ground-truth", required=True, type=Path)
  parser.add_argument(
    "--protocol",
    choices=[*PROTOCOLS, *get_args(TubeProtocol)],
    default="activitynet",
    help="AVA: activitynet (official), slowfast (also of EVAD), mmaction2; JHMDB51-21 and UCF101-24: act, class_query; "
    "MultiSports: multisports; default: %(default)s",
  )
  parser.add_argument("--label-map", help="AVA: ava_60 (default), ava_80 or a pbtxt file: the classes to score")
  parser.add_argument("--excluded", type=Path, help="AVA: CSV of video_id,timestamp: keyframes to leave out")
  parser.add_argument("--dataset", choices=get_args(Dataset), help="class_query: whose rules to take")
  parser.add_argument("--split", type=int, default=1, help="tubes: which split, from 1 up; default: %(default)s")
  parser.add_argument(
    "--iou",
    type=_ious,
    default=[0.5],
    help="least IoU of a hit: 0.5 (default), a list 0.2,0.5 or start:step:stop 0.5:0.05:0.95; AP and mAP are means",
  )
  parser.add_argument("--json", type=Path, help="file to write the numbers to, as fractions")
  parser.add_argument("--report", type=Path, help="AVA: HTML page to write, with its numbers as JSON beside it")
  parser.add_argument("--compare", type=Path, help="AVA: other detections, for the report to say what changed")
  parser.add_argument(
    "--train-annotations", type=Path, help="AVA: CSV; the report sorts classes by their training count"
  )
  options = parser.parse_args(arguments)
  if (options.compare or options.train_annotations) and not options.report:
    parser.error("--compare and --train-annotations are for --report")
  if options.protocol in PROTOCOLS:
    if len(options.detections) > 1:
      parser.error(f"--protocol {options.protocol} takes one file of detections")
    options.label_map = options.label_map or "ava_60"
  elif options.label_map or options.excluded or options.report:
    parser.error(f"--label-map, --excluded and --report are for AVA, not for --protocol {options.protocol}")
  if (options.dataset is not None) != (options.protocol == "class_query"):
    parser.error("--dataset belongs to --protocol class_query, which needs it")
  return options


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
