"""JHMDB51-21 and UCF101-24 as they lie on disks: folders of frames or the original videos, and the published pickle.

Frame ``k`` of the pickles, from 1 up, is shown at ``(k - 1) / fps`` seconds. Every annotated frame becomes a keyframe,
with its boxes divided by the size that the pickle tells; in ``val`` so do the frames without any box, because what is
detected there is wrong. ``annotations/tubes.json`` keeps the tubes exactly, for video-mAP.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vad_jax import progress, tubes
from vad_jax.annotations import AnnotationError, Rows
from vad_jax.datasets import SPLITS, TRAINVAL, source_set
from vad_jax.datasets.frame_folder import numbered_images
from vad_jax.datasets.records import Source
from vad_jax.datasets.source_set import Problems, SourceSet
from vad_jax.datasets.video import SUFFIXES, VideoError, VideoReader
from vad_jax.tubes import TubeGroundTruth, Video

# Names that the pickles are published under.
ANNOTATIONS = {"jhmdb": "JHMDB-GT.pkl", "ucf101_24": "UCF101v2-GT.pkl"}
_FRAMES_FPS = 25.0
_FLOW = ("brox", "flow")  # in the names of folders of optical flow, which are laid out as those of frames


class _Found(NamedTuple):
  """Frames of one video: where they are, how many a second, and how many there are where that is known."""

  source: Source
  fps: float
  num_frames: int | None


def read(
  kind: str, source: Path, problems: Problems, *, annotation_file: Path | None = None, fps: float | None = None
) -> SourceSet:
  """Finds annotations and frames.

  Args:
    kind: "jhmdb" or "ucf101_24".
    source: folder of the set.
    problems: gets what is repaired and left out.
    annotation_file: the pickle; by default searched for in the source and one folder below.
    fps: frames a second; by default 25 for folders of frames, and what a video file says.

  Raises:
    AnnotationError: the pickle is missing or malformed.
    VideoError: no video that it names is there.
  """
  path = annotation_file or _find_annotations(source, ANNOTATIONS[kind])
  truth = tubes.read_ground_truth(path)
  found, layout = _find_videos(source, list(truth.videos), fps, problems)
  for video, frames in found.items():
    expected = truth.videos[video].num_frames
    if frames.num_frames and frames.num_frames != expected:
      reason = f"{video}: {frames.num_frames} frames, annotated are {expected}"
      problems.explain("videos of another length than annotated, kept", {video: reason})
  # UCF101-24 is used with its first split only; several splits share the frames.
  splits = truth.splits if kind == "jhmdb" else truth.splits[:1]
  tables: dict[str, Rows] = {}
  videos: dict[str, dict[str, Source]] = {}
  for number, names in enumerate(splits, 1):
    for split, mine in zip(SPLITS, names, strict=True):
      key = f"split{number}/{split}" if kind == "jhmdb" else split
      counted = problems if number == 1 else Problems()  # boxes of other splits are the same ones
      tables[key] = source_set.clean(_rows(path, truth, mine, found, with_empty=split == "val"), path, counted)
      here = {video: found[video].source for video in mine if video in found}
      videos.setdefault(TRAINVAL if kind == "jhmdb" else split, {}).update(here)
  made_from = {"layout": layout, "sha256": {path.name: source_set.fingerprint(path)}}
  label_map = dict(enumerate(truth.labels, 1))
  return SourceSet(kind, made_from, label_map, tables, videos, _tubes_json(truth, found))


def _find_annotations(source: Path, name: str) -> Path:
  paths = [*source.glob(name), *source.glob(f"*/{name}")]
  if not paths:
    raise AnnotationError(f"{source}: no {name} here or one folder below; name it with --annotations")
  return paths[0]


def _find_videos(
  source: Path, names: list[str], fps: float | None, problems: Problems
) -> tuple[dict[str, _Found], str]:
  """Frames of each video, and the folder below the source that holds most of them."""
  best: dict[str, _Found] = {}
  layout = ""
  bases = _bases(source, {Path(name).parent for name in names})
  # Folders of extracted frames are looked at before video files, which win only where they are more.
  for look in (_frame_folders, _video_files):
    for base in bases:
      found = look(base, names, fps or _FRAMES_FPS)
      if len(found) > len(best):
        best, layout = found, base.relative_to(source).as_posix()
  if not best:
    raise VideoError(
      f"{source}: none of the {len(names)} annotated videos is here, like {next(iter(names), '?')}; expected "
      "<class>/<clip>/00001.jpg (or .png), or <class>/<clip>.avi, at most two folders below"
    )
  missing = {name: f"{name}: no frames" for name in names if name not in best}
  problems.explain("annotated videos that are not here, left out", missing)
  return best, layout


def _bases(source: Path, classes: set[Path]) -> list[Path]:
  """The source and the folders at most two below it, as far as they have folders of classes; not those of flow."""
  folders = [source, *sorted(source.glob("*")), *sorted(source.glob("*/*"))]
  return [
    folder
    for folder in folders
    if not any(word in folder.relative_to(source).as_posix().lower() for word in _FLOW)
    and any((folder / name).is_dir() for name in classes)
  ]


def _frame_folders(base: Path, names: list[str], fps: float) -> dict[str, _Found]:
  found = {}
  for name in names:
    if (base / name).is_dir() and (numbers := list(numbered_images(base / name))):
      found[name] = _Found(Source(base / name, fps=fps), fps, numbers[-1] + 1 - min(numbers[0], 1))
  return found


def _video_files(base: Path, names: list[str], _: float) -> dict[str, _Found]:
  paths = {}
  for name in names:
    path = next((path for suffix in SUFFIXES if (path := base / f"{name}{suffix}").is_file()), None)
    if path:
      paths[name] = path
  if not paths:
    return {}
  with ThreadPoolExecutor() as pool, progress.bar("Measuring videos", len(paths)) as advance:
    found = {}
    for name, measured in zip(paths, pool.map(_measure, paths.values()), strict=True):
      found[name] = measured
      advance()
  return found


def _measure(path: Path) -> _Found:
  try:
    with VideoReader(path, threads=1) as reader:
      return _Found(Source(path), reader.fps, reader.num_frames)
  except VideoError:
    return _Found(Source(path), _FRAMES_FPS, None)  # reported when records are made


def _rows(path: Path, truth: TubeGroundTruth, names: list[str], found: dict[str, _Found], *, with_empty: bool) -> Rows:
  """The keyframes of some videos, video by video in order of time."""
  parts = [_video_rows(path, name, truth.videos[name], found[name].fps, with_empty) for name in names if name in found]
  nothing = Rows(np.empty(0, object), np.empty(0), np.empty((0, 4)), np.empty(0, np.int32), np.empty(0))
  return Rows(*(np.concatenate(column) for column in zip(nothing, *parts, strict=True)))


def _video_rows(path: Path, name: str, video: Video, fps: float, with_empty: bool) -> Rows:
  if video.size is None:
    raise AnnotationError(f"{path}: {name}: its resolution is missing")
  height, width = video.size
  boxes = np.concatenate([np.empty((0, 5)), *(tube.boxes for tube in video.tubes)])
  lengths = [len(tube.boxes) for tube in video.tubes]
  action = np.repeat([tube.label + 1 for tube in video.tubes], lengths).astype(np.int32)
  person = np.repeat(np.arange(len(lengths), dtype=np.float64), lengths)
  if with_empty:
    nobody = np.setdiff1d(np.arange(1.0, video.num_frames + 1), boxes[:, 0])
    boxes = np.concatenate([boxes, np.pad(nobody[:, None], [(0, 0), (0, 4)], constant_values=np.nan)])
    action, person = np.pad(action, (0, len(nobody))), np.pad(person, (0, len(nobody)), constant_values=1)
  order = np.argsort(boxes[:, 0], kind="stable")
  frame, corners = boxes[order, 0], boxes[order, 1:] / (width, height, width, height)
  return Rows(np.full(len(order), name, object), (frame - 1) / fps, corners, action[order], person[order])


def _tubes_json(truth: TubeGroundTruth, found: dict[str, _Found]) -> dict[str, Any]:
  """The form of `tubes.read_ground_truth` that is text."""
  videos = {
    name: video._replace(fps=found[name].fps if name in found else None) for name, video in truth.videos.items()
  }
  return tubes.ground_truth_json(truth._replace(videos=videos))
