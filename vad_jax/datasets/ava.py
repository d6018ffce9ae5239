"""AVA as it lies on disks: movies, 15-minute cuts, or the extracted frames of other tools; annotations of version 2.1
or 2.2.

Timestamps of AVA are seconds from the start of a movie, and only its second 900 to 1801 is annotated. A cut holds just
these seconds. So do extracted frames: 30 a second, number 1 at 900 s. The keyframe of second ``s`` is the image number
``(s - 900) * 30 + 1``, and a clip of ``T`` frames with stride ``d`` at 30 frames a second is every ``d``-th one from
``T // 2 * d`` before it on, clamped to the images that there are.
"""

import collections
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vad_jax import annotations, progress
from vad_jax.annotations import AnnotationError, Rows
from vad_jax.datasets import SPLITS, proposals, source_set
from vad_jax.datasets.frame_folder import IMAGE_NUMBER
from vad_jax.datasets.records import Source
from vad_jax.datasets.source_set import Problems, SourceSet
from vad_jax.datasets.video import SUFFIXES, VideoError, probe

NUM_CLASSES = 80
# What stands before the number in the name of an extracted frame.
FRAME_PREFIXES = {"pyslowfast": "{video}_", "mmaction2": "img_", "acar": "image_"}
LAYOUTS = (*FRAME_PREFIXES, "cuts", "movies")

_FIRST_SECOND, _END_SECOND = 900, 1801
_FRAMES_FPS = 30.0
_LONGEST_CUT = 960.0  # seconds; a movie is longer, or it would hold next to nothing of what is annotated
_ODD_LENGTH = "videos of another length than the rest, left out"
_DEPTH = 3  # folders below the source that are searched
_ANNOTATION = re.compile(r"ava_(train|val)(_excluded_timestamps)?_v(2\.\d)\.csv")


def read(
  source: Path,
  problems: Problems,
  *,
  annotation_dir: Path | None = None,
  version: str | None = None,
  layout: str | None = None,
  proposal_files: Sequence[Path] = (),
) -> SourceSet:
  """Finds annotations and videos; decides, where it is not told, what the layout is.

  Args:
    source: folder of AVA.
    problems: gets what is repaired and left out.
    annotation_dir: folder of the official CSVs; by default searched for in the source and in its ``annotations/``.
    version: "2.1" or "2.2"; needed where both are there.
    layout: one of `LAYOUTS`; by default the one that most videos are in, frames before videos.
    proposal_files: predicted person boxes, see `proposals.read_published`; a video's name tells the split.

  Raises:
    AnnotationError: annotations are missing, malformed or of several versions.
    VideoError: no video that the annotations name is there.
  """
  version, files = _annotation_files(annotation_dir or source, version)
  rows = {
    split: source_set.clean(
      annotations.read_ava_csv(files[split]), files[split], problems, num_classes=NUM_CLASSES, lines=True
    )
    for split in SPLITS
    if split in files
  }
  ids = {split: dict.fromkeys(table.video.tolist()) for split, table in rows.items()}
  videos, layouts = _find_videos(source, set().union(*ids.values()), layout, problems)
  sources = {split: {video: videos[video] for video in ids[split] if video in videos} for split in ids}
  absent = {
    split: f"{split}: none of its videos is here" if split in files else f"{split}: no ava_{split}_v{version}.csv"
    for split in SPLITS
    if not sources.get(split)
  }
  problems.explain("splits left out", absent)
  tables = {split: rows[split] for split in SPLITS if split not in absent}
  for split in list(tables):
    if path := files.get(f"{split}_excluded"):
      annotations.read_excluded(path)  # complains where it is none
      tables[f"{split}_excluded"] = annotations.read_ava_csv(path)
  for path in proposal_files:
    _add_proposals(path, ids, tables, problems)
  made_from = {
    "annotations": version,
    "layout": ", ".join(layouts),
    "sha256": {path.name: source_set.fingerprint(path) for path in (*files.values(), *proposal_files)},
  }
  here = {split: found for split, found in sources.items() if found}
  return SourceSet("ava", made_from, annotations.read_label_map("ava_60"), tables, here)


def _annotation_files(folder: Path, version: str | None) -> tuple[str, dict[str, Path]]:
  """Version, and the official CSVs of it: ``train``, ``val``, ``train_excluded`` and ``val_excluded``."""
  found: dict[str, dict[str, list[Path]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for pattern in ("ava_*.csv", "annotations/ava_*.csv", "annotations/*/ava_*.csv", "ava*/ava_*.csv"):
    for path in sorted(folder.glob(pattern)):
      if match := _ANNOTATION.fullmatch(path.name):
        found[match[3]][match[1] + ("_excluded" if match[2] else "")].append(path)
  with_boxes = sorted(number for number, files in found.items() if set(SPLITS) & set(files))
  if version is None:
    if len(with_boxes) > 1:
      raise AnnotationError(f"{folder}: annotations of versions {' and '.join(with_boxes)}; choose one with --version")
    version = with_boxes[0] if with_boxes else "2.2"
  if version not in with_boxes:
    raise AnnotationError(f"{folder}: no ava_train_v{version}.csv or ava_val_v{version}.csv, here or in annotations/")
  for split in SPLITS:
    name = f"{split}_excluded"
    other = [paths[name][0] for number, paths in found.items() if number != version and name in paths]
    if other and split in found[version] and name not in found[version]:
      raise AnnotationError(f"{other[0]}: is of another version than {found[version][split][0]}; versions do not mix")
  for paths in found[version].values():
    if len({source_set.fingerprint(path) for path in paths}) > 1:
      raise AnnotationError(f"{paths[0]} and {paths[1]} differ; delete one, or name a folder with --annotations")
  return version, {name: paths[0] for name, paths in found[version].items()}


def _find_videos(
  source: Path, ids: set[str], layout: str | None, problems: Problems
) -> tuple[dict[str, Source], list[str]]:
  """Where the frames of each video are, and the layouts that they are in."""
  folders, files = _scan(source, ids)
  frames = {} if layout in ("cuts", "movies") else _frame_folders(folders, layout)
  if layout in FRAME_PREFIXES or (layout is None and frames and len(frames) >= len(files)):
    found = {video: at for video, (_, at) in frames.items()}
    layouts = sorted({name for name, _ in frames.values()})
  else:
    found, kind = _video_files(files, layout, problems)
    layouts = [kind]
  if not found:
    wanted = f" in the layout {layout}" if layout else ""
    raise VideoError(
      f"{source}: none of the {len(ids)} annotated videos is here{wanted}; expected <video>.mkv, .mp4 or .webm, or "
      "<video>/ with images, up to three folders below"
    )
  told = problems.notes.get(_ODD_LENGTH, {}).keys()
  missing = {video: f"{video}: no frames" for video in sorted(ids - found.keys() - told)}
  problems.explain("annotated videos that are not here, left out", missing)
  return found, layouts


def _scan(folder: Path, ids: set[str], depth: int = _DEPTH) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
  """Folders and video files that are named like a video, at most `depth` folders down."""
  folders, files = collections.defaultdict(list), collections.defaultdict(list)
  others = []
  for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
    path = Path(entry.path)
    if entry.is_dir():
      (folders[entry.name] if entry.name in ids else others).append(path)
    elif path.suffix.lower() in SUFFIXES and path.stem in ids:
      files[path.stem].append(path)
  if depth and not folders:  # where videos have folders, the other folders are videos without annotations
    for other in others:
      for all_found, more in zip((folders, files), _scan(other, ids, depth - 1), strict=True):
        for video, paths in more.items():
          all_found[video] += paths
  return folders, files


def _frame_folders(folders: dict[str, list[Path]], layout: str | None) -> dict[str, tuple[str, Source]]:
  """Layout and source of each video that has a folder of images."""
  found = {}
  for video, paths in folders.items():
    for name, pattern in FRAME_PREFIXES.items():
      prefix = pattern.format(video=video)
      path = next((path for path in paths if _holds(path, prefix)), None)
      if path and layout in (None, name) and video not in found:
        found[video] = name, Source(path, _FIRST_SECOND, fps=_FRAMES_FPS, prefix=prefix)
  return found


def _holds(folder: Path, prefix: str) -> bool:
  """Whether a folder holds an image with this prefix; does not list tens of thousands of them."""
  pattern = re.compile(re.escape(prefix) + IMAGE_NUMBER, re.IGNORECASE)
  with os.scandir(folder) as entries:
    return any(pattern.fullmatch(entry.name) for entry in entries)


def _video_files(files: dict[str, list[Path]], layout: str | None, problems: Problems) -> tuple[dict[str, Source], str]:
  """The video files of a layout, by default the one of most of them: a movie is longer than a cut."""
  paths = [path for candidates in files.values() for path in candidates]
  with ThreadPoolExecutor() as pool, progress.bar("Measuring videos", len(paths)) as advance:
    lengths = {}
    for path, (length, _) in zip(paths, pool.map(probe, paths), strict=True):
      lengths[path] = length
      advance()
  kinds = {path: "cuts" if length <= _LONGEST_CUT else "movies" for path, length in lengths.items() if length}
  most = collections.Counter(kinds.values()).most_common(1)
  kind = layout or (most[0][0] if most else "movies")
  found, odd = {}, {}
  for video, candidates in files.items():
    fitting = [path for path in candidates if kinds.get(path, kind) == kind]
    if not fitting and layout is None:
      odd[video] = f"{candidates[0]}: {lengths[candidates[0]]:.0f} s, but most files are {kind}; --layout forces it"
      continue
    path = (fitting or candidates)[0]
    found[video] = Source(path, _FIRST_SECOND) if kind == "cuts" else Source(path, 0, _FIRST_SECOND, _END_SECOND)
  problems.explain(_ODD_LENGTH, odd)
  return found, kind


def _add_proposals(path: Path, ids: dict[str, dict[str, None]], tables: dict[str, Rows], problems: Problems) -> None:
  """Adds boxes to the tables of the splits that their videos belong to."""
  rows = source_set.clean(proposals.read_published(path), path, problems)
  known = np.zeros(len(rows.video), bool)
  for split in SPLITS:
    mine = np.array([video in ids.get(split, ()) for video in rows.video], bool)
    known |= mine
    if mine.any() and split in tables:
      name = f"{split}_proposals"
      parts = [tables[name]] if name in tables else []
      tables[name] = Rows(*(np.concatenate(column) for column in zip(*parts, rows.select(mine), strict=True)))
  problems.add("proposals of unknown videos, left out", path, int((~known).sum()))
