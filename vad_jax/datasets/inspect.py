"""What is in a data set: ``python -m vad_jax.datasets.inspect PATH --sheet sheet.png``.

Counts, sizes and times of a set in the layout of data/README.md, and a picture of random keyframes with their boxes:
most mistakes in annotations are seen at a glance, and hardly ever otherwise.
"""

import argparse
import collections
import json
import logging
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from vad_jax import visualize
from vad_jax.annotations import AnnotationError
from vad_jax.datasets import open_directory
from vad_jax.datasets.loader import ClipSpec, KeyframeDataset, RecordFrames
from vad_jax.datasets.video import VideoError, VideoReader, video_files

_SHEET = (3, 4)  # rows and columns
_SHORT_SIDE = (240, 360)  # of a frame on the sheet, at least and at most


def open_set(path: Path, split: str | None = None) -> dict[str, KeyframeDataset]:
  """Opens what there is of a set, without making anything.

  Args:
    path: the set.
    split: only this one, such as "train"; of a set with several divisions, such as "split2/val".

  Returns:
    The splits by name.

  Raises:
    AnnotationError: there are no annotations, or no such split.
  """
  labels = sorted(path.glob("annotations/label_map.pbtxt")) or sorted(path.glob("annotations/*/label_map.pbtxt"))
  if not labels:
    raise AnnotationError(f"{path}: no annotations/label_map.pbtxt; expected a set in the layout of data/README.md")
  reader = "records" if (path / "records").is_dir() else "video"
  found = {}
  for label_map in labels:
    folder = label_map.parent.relative_to(path)
    division = folder.relative_to("annotations").as_posix()
    prefix = "" if division == "." else f"{division}/"
    for name, dataset in open_directory(path, annotation_dir=str(folder), reader=reader, clip=ClipSpec(1, 1)).items():
      found[prefix + name] = dataset
  if split is not None:
    if split not in found:
      raise AnnotationError(f"{path}: no split {split!r}; there are: {', '.join(found)}")
    return {split: found[split]}
  return found


def summarise(dataset: KeyframeDataset) -> dict[str, Any]:
  """Counts of one split.

  Returns:
    What JSON can hold: counts; for some quantities least, median, mean and most; ``seconds``, ``fps`` and ``sizes`` of
    the annotated videos; ``box_area``, the share of the frame; and for each class the number of boxes.
  """
  keyframes = dataset.keyframes
  boxes = np.concatenate([keyframe.boxes for keyframe in keyframes])
  labels = np.concatenate([keyframe.labels for keyframe in keyframes])
  counts = labels.sum(axis=0)
  videos = sorted({keyframe.video for keyframe in keyframes})
  facts = [_video_facts(dataset, video) for video in videos]
  seconds, fps, sizes = zip(*facts, strict=True)
  return {
    "videos": len(videos),
    "keyframes": len(keyframes),
    "keyframes_with_nobody": sum(not len(keyframe.boxes) for keyframe in keyframes),
    "boxes": len(boxes),
    "actions": int(counts.sum()),
    "boxes_per_keyframe": _spread([len(keyframe.boxes) for keyframe in keyframes]),
    "actions_per_box": _spread(labels.sum(axis=1)),
    "box_area": _spread(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)),
    "seconds": {**_spread(seconds), "sum": sum(seconds)},
    "fps": dict(collections.Counter(f"{value:.2f}" for value in fps).most_common()),
    "sizes": dict(collections.Counter(f"{width} x {height}" for height, width in sizes).most_common()),
    "classes": {name: int(counts[index - 1]) for index, name in dataset.label_map.items()},
  }


def _video_facts(dataset: KeyframeDataset, video: str) -> tuple[float, float, tuple[int, int]]:
  """Seconds, frames a second, and height and width."""
  frames: Any = dataset.frames
  if isinstance(frames, RecordFrames):
    return frames.facts(video)
  with VideoReader(video_files(frames.directory)[video]) as reader:
    height, width = reader.size
    return reader.duration or 0.0, reader.fps, (height, width)


def _spread(values: Any) -> dict[str, float]:
  values = np.asarray(values, np.float64)
  if not len(values):
    return {"min": 0.0, "median": 0.0, "mean": 0.0, "max": 0.0}
  return {
    "min": float(values.min()),
    "median": float(np.median(values)),
    "mean": float(values.mean()),
    "max": float(values.max()),
  }


def read_problems(path: Path) -> dict[str, str]:
  """What was repaired and left out when the set was made: kind to a summary."""
  try:
    found = json.loads((path / "problems.json").read_text(encoding="utf-8"))
    counted = {kind: f"{sum(places.values()):,} in {len(places)} places" for kind, places in found["counts"].items()}
    return {**counted, **{kind: "; ".join(reasons.values()) for kind, reasons in found["notes"].items()}}
  except FileNotFoundError:
    return {}
  except (ValueError, KeyError, TypeError, AttributeError):
    raise AnnotationError(f"{path / 'problems.json'}: damaged; make the set again") from None


def contact_sheet(sets: dict[str, KeyframeDataset], seed: int = 0) -> np.ndarray:
  """Random keyframes of all splits, with somebody in them where there are enough: ``[H, W, 3]`` uint8 RGB."""
  rng = np.random.default_rng(seed)
  choices = [(name, index) for name, dataset in sets.items() for index in range(len(dataset))]
  order = rng.permutation(len(choices))
  inhabited = [i for i in order if len(sets[choices[i][0]].keyframes[choices[i][1]].boxes)]
  chosen = (inhabited or list(order))[: _SHEET[0] * _SHEET[1]]
  pictures = [_picture(sets[choices[i][0]], choices[i][1], choices[i][0]) for i in chosen]
  return visualize.contact_sheet([pictures[i : i + _SHEET[1]] for i in range(0, len(pictures), _SHEET[1])])


def _picture(dataset: KeyframeDataset, index: int, split: str) -> np.ndarray:
  keyframe = dataset.keyframes[index]
  frame = dataset.frames.frames(keyframe.video, [keyframe.timestamp])[0]
  factor = _SHORT_SIDE[1] / min(frame.shape[:2])
  if factor < 1:
    frame = cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
  captions = [
    [dataset.label_map.get(int(k) + 1, f"class {k + 1}") for k in np.flatnonzero(labels)] for labels in keyframe.labels
  ]
  picture = visualize.draw_detections(visualize.upscale(frame, _SHORT_SIDE[0]), keyframe.boxes, captions)
  title = np.full((22, picture.shape[1], 3), 24, np.uint8)
  text = f"{split}: {keyframe.video}, {keyframe.timestamp:g} s"
  cv2.putText(title, text, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (236, 238, 242), 1, cv2.LINE_AA)
  return np.concatenate([title, picture])


def _print(summaries: dict[str, dict[str, Any]], problems: dict[str, str]) -> None:
  console = Console()
  table = Table("", *summaries, title="data set")
  for name in ("videos", "keyframes", "keyframes_with_nobody", "boxes", "actions"):
    table.add_row(name.replace("_", " "), *(f"{summary[name]:,}" for summary in summaries.values()))
  for name, digits in (("boxes_per_keyframe", 1), ("actions_per_box", 1), ("box_area", 4), ("seconds", 1)):
    cells = (
      "{min:.{d}f} to {max:.{d}f}, median {median:.{d}f}".format(**s[name], d=digits) for s in summaries.values()
    )
    table.add_row(name.replace("_", " "), *cells)
  for name in ("fps", "sizes"):
    cells = (", ".join(f"{value} ({count})" for value, count in s[name].items()) for s in summaries.values())
    table.add_row(name, *cells)
  console.print(table)
  table = Table("boxes of class", *summaries, title="classes")
  for name in next(iter(summaries.values()))["classes"]:
    table.add_row(name, *(f"{summary['classes'][name]:,}" for summary in summaries.values()))
  console.print(table)
  for kind, what in problems.items():
    console.print(f"{kind}: {what}", markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> None:
  """Command line."""
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.datasets.inspect", description="Shows what is in a data set (layout: data/README.md)."
  )
  parser.add_argument("path", type=Path, help="folder of the set")
  parser.add_argument("--split", help="only this one, such as train or split2/val")
  parser.add_argument("--sheet", type=Path, metavar="PNG", help="write random keyframes with boxes and labels here")
  parser.add_argument("--seed", type=int, default=0, help="of their choice; default 0")
  parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
  options = parser.parse_args(arguments)
  logging.basicConfig(format="%(levelname)s: %(message)s")
  try:
    sets = open_set(options.path, options.split)
    summaries = {name: summarise(dataset) for name, dataset in sets.items()}
    problems = read_problems(options.path)
    if options.sheet:
      sheet = contact_sheet(sets, options.seed)
      if not cv2.imwrite(str(options.sheet), sheet[..., ::-1]):
        raise VideoError(f"{options.sheet}: cannot be written; expected a name like sheet.png in a folder that exists")
  except (ValueError, OSError, cv2.error) as error:
    sys.exit(f"error: {' '.join(str(error).split())}")
  except KeyboardInterrupt:
    sys.exit(130)
  if options.json:
    print(json.dumps({"splits": summaries, "problems": problems}, indent=2))
  else:
    _print(summaries, problems)
    if options.sheet:
      print(options.sheet)


if __name__ == "__main__":
  main()
