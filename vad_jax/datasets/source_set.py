"""A published set as it was found on somebody's disk, on its way into the layout of data/README.md.

`ava` and `jhmdb_ucf` read what people have into a `SourceSet`; `write` makes a set out of it. What had to be repaired
or left out on the way is counted in `Problems`.
"""

import collections
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import vad_jax
from vad_jax import annotations
from vad_jax.annotations import AnnotationError, PathLike, Rows
from vad_jax.datasets import SPLITS, TRAINVAL, records

# Boxes reach over the edge of the frame by rounding or by an annotator's hand; beyond this they mean something else.
_FURTHEST_OUTSIDE = 0.5
_UNFINISHED = ".dataset.json.part"


class Problems:
  """What was repaired or left out, and how often.

  Attributes:
    counts: for each kind of problem, where it was met (a file or a video) and how many times.
    notes: for each kind, a reason in words by file or video.
  """

  def __init__(self) -> None:
    self.counts: dict[str, collections.Counter[str]] = {}
    self.notes: dict[str, dict[str, str]] = {}

  def add(self, kind: str, where: PathLike, count: int) -> None:
    """Counts a problem; nothing where the count is zero."""
    if count:
      self.counts.setdefault(kind, collections.Counter())[str(where)] += count

  def explain(self, kind: str, reasons: dict[str, str]) -> None:
    """Notes what happened to some files or videos, in words; nothing where there are none."""
    if reasons:
      self.notes.setdefault(kind, {}).update(reasons)

  def summary(self) -> list[str]:
    """A line for each kind."""
    lines = []
    for kind, places in self.counts.items():
      lines.append(f"{kind}: {places.total():,} ({_some(f'{place}: {n:,}' for place, n in places.items())})")
    for kind, reasons in self.notes.items():
      lines.append(f"{kind}: {len(reasons):,} ({_some(reasons.values(), '; ')})")
    return lines


class SourceSet(NamedTuple):
  """What `write` needs.

  Attributes:
    kind: name of the set.
    made_from: what else ``dataset.json`` says of its origin.
    label_map: class id to name.
    tables: what to write below ``annotations/``: path without suffix to rows, ``{"train": rows, ...}``.
    videos: what to make records of: ``"train"``, ``"val"`` or `TRAINVAL` to the videos.
    tubes: content of ``annotations/tubes.json`` (see `vad_jax.tubes.read_ground_truth`), or None.
  """

  kind: str
  made_from: dict[str, Any]
  label_map: dict[int, str]
  tables: dict[str, Rows]
  videos: dict[str, dict[str, records.Source]]
  tubes: dict[str, Any] | None = None


def check_output(output: Path, source: Path, kind: str) -> None:
  """Refuses, before anything is read, what would destroy a folder or mix two sets.

  Raises:
    ValueError: says which.
    FileNotFoundError: there is no source.
  """
  if not source.is_dir():
    raise FileNotFoundError(f"{source}: no such folder")
  if output.resolve() == source.resolve():
    raise ValueError(f"{output}: is the source as well; give another --output")
  try:
    found = json.loads((output / "dataset.json").read_text(encoding="utf-8"))["kind"]
  except FileNotFoundError:
    if (output / "annotations").exists() and not (output / _UNFINISHED).exists():
      raise ValueError(f"{output}: has annotations/ of something else in it; give another --output") from None
    return
  except (ValueError, KeyError, TypeError):
    found = "damaged"
  if found != kind:
    raise ValueError(f"{output}: holds another set ({found}); give another --output")


def write(
  source: SourceSet,
  output: Path,
  problems: Problems,
  *,
  workers: int | None = None,
  short_side: int | None = None,
  quality: int = 95,
) -> None:
  """Makes a set: records, annotations, and at the very end ``dataset.json``; goes on where it was stopped.

  Args:
    source: what it is made of.
    output: folder of the set.
    problems: those met until now; joined by those of the records, and written to ``problems.json``.
    workers: see `records.build_from`, as are the others.
    short_side: of the frames.
    quality: of the JPEGs.
  """
  options = {"workers": workers, "short_side": short_side, "quality": quality}
  frames = {}
  for split, videos in source.videos.items():
    folder = records.build_from(videos, output / "records", split, **options)
    frames[split] = records.RecordFrames(folder)
    found = json.loads((folder / "problems.json").read_text())
    problems.explain("videos that cannot be read, left out", found["unreadable"])
    for video, count in found["broken_frames"].items():
      problems.add("frames damaged or missing, the nearest stand in", video, count)
  for name, rows in source.tables.items():
    split = name.split("/")[-1]
    if split in SPLITS:
      _count_frameless(rows, frames[split if split in frames else TRAINVAL], problems)
  settings = {"short_side": short_side, "quality": quality, "vad_jax": vad_jax.__version__}
  _write_json(output / _UNFINISHED, {"kind": source.kind, **source.made_from, **settings})
  (output / "dataset.json").unlink(missing_ok=True)
  # Swapped as a whole, so that nothing of other annotations stays behind.
  _write_annotations(source, output / ".annotations.part")
  shutil.rmtree(output / "annotations", ignore_errors=True)
  (output / ".annotations.part").rename(output / "annotations")
  _write_json(output / "problems.json", {"counts": problems.counts, "notes": problems.notes})
  (output / _UNFINISHED).rename(output / "dataset.json")


def _write_annotations(source: SourceSet, folder: Path) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  for name, rows in source.tables.items():
    path = folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_ava_csv(path, rows)
    annotations.write_label_map(path.with_name("label_map.pbtxt"), source.label_map)
  if source.tubes:
    (folder / "tubes.json").write_text(json.dumps(source.tubes), encoding="utf-8")


def clean(
  rows: Rows, path: PathLike, problems: Problems, *, num_classes: int | None = None, lines: bool = False
) -> Rows:
  """Clips boxes to the frame and drops empty and inverted ones; both are counted.

  Args:
    rows: as they were read.
    path: file that they come from.
    problems: gets the counts.
    num_classes: highest action id.
    lines: whether the rows are the lines of the file, so that an error can name one.

  Raises:
    AnnotationError: an action id is too large, or a box lies so far outside that it cannot be normalised; names the
      line, or video and time.
  """

  def place(row: int) -> str:
    return _line(path, row) if lines else f"{path}: {rows.video[row]}, {rows.timestamp[row]:g} s"

  boxed = rows.action > 0
  if num_classes and (rows.action > num_classes).any():
    row = int(rows.action.argmax())
    raise AnnotationError(f"{place(row)}: action id {rows.action[row]}; known are 1 to {num_classes}")
  outside = np.where(boxed, np.maximum(-rows.boxes, rows.boxes - 1).max(axis=1), 0)
  if len(outside) and outside.max() > _FURTHEST_OUTSIDE:
    row = int(outside.argmax())
    box = ", ".join(f"{value:g}" for value in rows.boxes[row])
    raise AnnotationError(f"{place(row)}: the box {box} lies outside the frame; expected x1, y1, x2, y2 in [0, 1]")
  clipped = rows._replace(boxes=rows.boxes.clip(0, 1))
  empty = boxed & ~(clipped.boxes[:, :2] < clipped.boxes[:, 2:]).all(axis=1)
  problems.add("boxes empty or inverted, left out", path, int(empty.sum()))
  problems.add("boxes over the edge of the frame, clipped", path, int(((outside > 0) & ~empty).sum()))
  return clipped.select(~empty)


def fingerprint(path: Path) -> str:
  """SHA-256 of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _count_frameless(rows: Rows, frames: records.RecordFrames, problems: Problems) -> None:
  keyframes = set(zip(rows.video.tolist(), rows.timestamp.tolist(), strict=True))
  lost = collections.Counter(video for video, time in keyframes if not frames.covers(video, time))
  for video, count in sorted(lost.items()):
    problems.add("keyframes without frames, left out", video, count)


def _line(path: PathLike, row: int) -> str:
  """File and line of a row; empty lines are no rows."""
  with open(path, encoding="utf-8-sig") as file:
    numbers = [number for number, line in enumerate(file, 1) if not line.isspace()]
  return f"{path}:{numbers[row]}"


def _some(words: Iterable[str], separator: str = ", ") -> str:
  words = list(words)
  return separator.join(words[:3]) + (f"{separator}..." if len(words) > 3 else "")


def _write_json(path: Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
