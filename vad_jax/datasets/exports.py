"""Annotations of one's own videos, from whatever tool: finds the files, recognises the format, numbers the classes.

What somebody does comes from the label of a box, or from its attributes: those named like "action", "activity" or
"behaviour" by their value, and checkboxes by their name.
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vad_jax.annotations import AnnotationError
from vad_jax.datasets import cvat, export_formats
from vad_jax.datasets.export_formats import PARSING_ERRORS, AnnotatedVideo, Classes, Document, Parsed
from vad_jax.datasets.source_set import Problems

FORMATS = {
  "cvat": cvat.parse,
  "coco": export_formats.parse_coco,
  "via": export_formats.parse_via,
  "datumaro": export_formats.parse_csv,
  "csv": export_formats.parse_csv,
}
_SUFFIXES = (".csv", ".json", ".xml", ".zip")
_PLACES = ("*", "*/*", "*/*/*")  # of a folder that are searched


class Export(NamedTuple):
  """What files of one format hold.

  Attributes:
    format: one of `FORMATS`.
    files: the files.
    label_map: class id, from 1 up, to name.
    videos: annotations by video; several may be of the same one.
    notes: how the files were understood.
  """

  format: str
  files: list[Path]
  label_map: dict[int, str]
  videos: list[AnnotatedVideo]
  notes: list[str]


def read(
  path: Path,
  problems: Problems,
  *,
  kind: str | None = None,
  action_attributes: Sequence[str] = (),
  keep_idle: bool = False,
) -> Export:
  """Reads a file, an archive, or all that look like annotations in a folder.

  Args:
    path: the file or folder.
    problems: gets what is repaired and left out.
    kind: one of `FORMATS`; by default the content tells.
    action_attributes: the attributes that name actions; by default guessed, see above.
    keep_idle: see `parse`; nobody at all may do something then.

  Raises:
    AnnotationError: a file is malformed, no file is of a known format, or they are of several.
    OSError: a file cannot be read.
  """
  found: dict[str, list[Document]] = {}
  files = []
  for file in _files(path):
    for document in _documents(file):
      recognised = recognise(document)
      if recognised and (kind or recognised) in (recognised, "csv" if recognised == "datumaro" else ""):
        found.setdefault(kind or recognised, []).append(document)
        files.append(file)
  if not found:
    raise AnnotationError(f"{path}: no annotations here of {kind or ', '.join(FORMATS)}")
  if len(found) > 1:
    names = "; ".join(f"{name}: {documents[0].path}" for name, documents in found.items())
    raise AnnotationError(f"annotations of several formats ({names}); choose with --annotations or --format")
  [(name, documents)] = found.items()
  classes = Classes(action_attributes)
  parsed, excluded = [], set()
  for document in documents:
    ids, videos = parse(name, document, classes, problems, keep_idle=keep_idle)
    if name in ("csv", "datumaro") and "excluded" in document.path.stem:
      excluded |= {(video.names[0], moment) for video in videos for moment in video.moments}
    else:
      parsed.append((ids, videos))
  if missing := set(action_attributes) - classes.known:
    known = ", ".join(sorted(classes.known)) or "none at all"
    raise AnnotationError(f"{path}: no attribute {', '.join(sorted(missing))}; there are: {known}")
  if not classes.names and not keep_idle:
    raise AnnotationError(f"{path}: no box with an action")
  chosen = ", ".join(sorted(classes.chosen))
  notes = [f"actions are the values of {chosen}" if chosen else "actions are the labels of the boxes"]
  label_map = _label_map([ids for ids, _ in parsed], list(classes.names), notes)
  videos = [
    video._replace(moments=[moment for moment in video.moments if (video.names[0], moment) not in excluded])
    for _, found in parsed
    for video in found
  ]
  if excluded:
    notes.append(f"{len(excluded)} keyframes are excluded by a file, and left out")
  return Export(name, list(dict.fromkeys(files)), label_map, videos, notes)


def parse(kind: str, document: Document, classes: Classes, problems: Problems, *, keep_idle: bool = False) -> Parsed:
  """Reads one file of a known format.

  Args:
    kind: one of `FORMATS`.
    document: the file.
    classes: gets the classes.
    problems: gets what is repaired and left out.
    keep_idle: keep boxes without an action, where the format has them.

  Returns:
    Ids of the classes, where the file gives them, and annotations by video.

  Raises:
    AnnotationError: it is malformed; says where.
  """
  try:
    ids, videos = FORMATS[kind](document, classes, problems)
    return ids, videos if keep_idle else [_without_idle(video) for video in videos]
  except AnnotationError:
    raise
  except PARSING_ERRORS as error:
    what = f"{error} is missing" if isinstance(error, KeyError) else f"unexpected content ({error})"
    raise AnnotationError(f"{document.path}: {what}; expected an export of {kind}") from None


def _without_idle(video: AnnotatedVideo) -> AnnotatedVideo:
  return video._replace(boxes_at=lambda moment: [box for box in video.boxes_at(moment) if box.actions])


def recognise(document: Document) -> str | None:
  """Format of a file; None where it is of none that is known."""
  text = document.content[:4096].decode("utf-8-sig", "replace").lstrip()
  if text.startswith("<"):
    return "cvat" if "<annotations" in text else None
  if text.startswith("{"):
    try:
      keys = json.loads(document.content).keys()
    except (ValueError, RecursionError):
      return "coco"  # whose parser tells what is wrong
    if {"metadata", "file", "view"} <= keys:
      return "via"
    return "coco" if "images" in keys and "annotations" in keys else None
  if (
    document.path.suffix.lower() == ".csv" and export_formats.csv_header(next(iter(text.splitlines()), "")) is not None
  ):
    labels = export_formats.label_file(document.path)
    return "datumaro" if labels and labels.name == export_formats.DATUMARO_LABELS else "csv"
  return None


def _files(path: Path) -> list[Path]:
  if not path.is_dir():
    return [path]
  found = (file for place in _PLACES for file in path.glob(place) if file.suffix.lower() in _SUFFIXES)
  return sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def _documents(path: Path) -> Iterator[Document]:
  content = path.read_bytes()
  if not content.startswith(b"PK\x03\x04"):
    yield Document(path, content)
    return
  try:
    with zipfile.ZipFile(path) as archive:
      for name in sorted(archive.namelist()):
        if name.lower().endswith(_SUFFIXES[:-1]):
          yield Document(path / name, archive.read(name))
  except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
    raise AnnotationError(f"{path}: a damaged or locked archive ({error}); unpack it") from None


def _label_map(given: list[dict[int, str] | None], names: list[str], notes: list[str]) -> dict[int, str]:
  """Ids of the classes: those of the files, or in order of appearance where they give none or disagree."""
  pairs = {(index, name) for ids in given for index, name in (ids or {}).items()}
  label_map = dict(sorted(pairs))
  if None in given or len(pairs) != len(names) or len(label_map) != len(names):
    if pairs:
      notes.append("the files number classes differently: they are numbered in order of appearance")
    return dict(enumerate(names, 1))
  if 0 in label_map:
    notes.append("class ids count from 0: each is one higher here")
    return {index + 1: name for index, name in label_map.items()}
  return label_map
