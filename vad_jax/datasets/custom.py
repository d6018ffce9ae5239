"""Videos of one's own: a folder of them, and boxes from an annotation tool, become a training set.

What the tool says in frames and pixels is brought to seconds and shares of the picture by looking at the video itself:
frame 100 is the hundred-and-first that a player shows, whatever the frame rate does on the way.
"""

import argparse
import collections
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vad_jax import progress
from vad_jax.annotations import AnnotationError, Rows
from vad_jax.datasets import exports, source_set
from vad_jax.datasets.export_formats import AnnotatedVideo, Box
from vad_jax.datasets.records import Source
from vad_jax.datasets.source_set import Problems, SourceSet
from vad_jax.datasets.video import SUFFIXES, VideoError, VideoReader

_PLACES = ("*", "*/*", "*/*/*")  # of the source that are searched for videos
_TOOL_ROUNDING = 0.002  # seconds; players' times in files are rounded
_AFTER_END = 1.0  # seconds; a player's time may run on with the sound
_OUTSIDE = "annotated moments outside the video, left out"
_ASPECT_TOLERANCE = 0.02

Frames = dict[float, list[Box]]  # by time in seconds; corners in [0, 1]


class _Picture(NamedTuple):
  """What a video says of itself: height and width, seconds, and the times of all its frames where they are needed."""

  size: tuple[int, int]
  end: float
  times: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the command line beside those that all sets share."""
  parser.add_argument("--annotations", type=Path, metavar="PATH", help="file or folder; by default the source")
  parser.add_argument("--format", choices=exports.FORMATS, help="by default, what the content looks like")
  parser.add_argument(
    "--action-attributes", nargs="+", default=(), metavar="NAME",
    help="attributes of boxes that name actions; by default those called like it, and checkboxes",
  )  # fmt: skip
  parser.add_argument(
    "--stride", type=float, default=1.0, metavar="SECONDS", help="between keyframes; default 1, 0: all"
  )
  parser.add_argument("--val-share", type=float, default=0.2, metavar="SHARE", help="of the videos; default 0.2")
  parser.add_argument("--seed", type=int, default=0, help="of the choice of videos for val; default 0")


def prepare(options: argparse.Namespace) -> None:
  """Makes the set that the command line asks for, and says what it found.

  Raises:
    ValueError: options, annotations or videos are wrong; says which and where.
    OSError: a file cannot be read or written.
  """
  begun = time.monotonic()
  if not 0 <= options.val_share < 1 or not options.stride >= 0:
    raise ValueError("--val-share has to be in [0, 1), --stride 0 or more")
  source_set.check_output(options.output, options.source, "custom")
  problems = Problems()
  found, notes = read(
    options.source,
    problems,
    annotations=options.annotations,
    kind=options.format,
    action_attributes=options.action_attributes,
    stride=options.stride,
    val_share=options.val_share,
    seed=options.seed,
  )
  for note in notes:
    print(f"  {note}", flush=True)
  source_set.write(
    found, options.output, problems, workers=options.workers, short_side=options.short_side, quality=options.quality
  )
  for split, rows in found.tables.items():
    keyframes = len(set(zip(rows.video.tolist(), rows.timestamp.tolist(), strict=True)))
    print(f"  {split}: {len(found.videos[split])} videos, {keyframes:,} keyframes, {(rows.action > 0).sum():,} actions")
  for line in problems.summary():
    print(f"  {line}")
  print(f"{options.output}: complete after {time.monotonic() - begun:.0f} s; all problems are in problems.json")
  print(f"next: python -m vad_jax.datasets.inspect {options.output} --sheet sheet.png")


def read(
  source: Path,
  problems: Problems,
  *,
  annotations: Path | None = None,
  kind: str | None = None,
  action_attributes: Sequence[str] = (),
  stride: float = 1.0,
  val_share: float = 0.2,
  seed: int = 0,
) -> tuple[SourceSet, list[str]]:
  """Finds annotations and videos and brings them together.

  Args:
    source: folder with the videos.
    problems: gets what is repaired and left out.
    annotations: see `exports.read`, as are `kind` and `action_attributes`; by default the source.
    stride: seconds between keyframes; of the annotated frames, the nearest to each multiple of it is one. 0 takes all.
    val_share: share of the videos that goes to val, where the annotations do not tell.
    seed: of that choice.

  Returns:
    The set, and how it was understood.

  Raises:
    AnnotationError: annotations are missing, malformed or do not fit their video.
    VideoError: no annotated video is there.
  """
  export = exports.read(annotations or source, problems, kind=kind, action_attributes=action_attributes)
  files = _video_files(source)
  entries = match(export.videos, files, source, problems)
  frames: dict[str, Frames] = {}
  with progress.bar("Looking at videos", len(entries)) as advance:
    for video, annotated in entries.items():
      try:
        frames[video] = boxes_by_time(files[video], annotated, stride, problems)
      except VideoError as error:
        problems.explain("videos that cannot be read, left out", {video: str(error)})
      advance()
  moments = sum(len(entry.moments) for annotated in entries.values() for entry in annotated)
  outside = problems.counts.get(_OUTSIDE, collections.Counter()).total()
  if outside > moments / 2:
    raise AnnotationError(
      f"{export.files[0]}: {outside} of {moments} annotated moments lie outside their videos; are these frame numbers "
      "instead of seconds from a video's start, or annotations of other cuts?"
    )
  frames = {video: found for video, found in frames.items() if found}
  if not frames:
    raise VideoError(f"{source}: none of {len(entries)} annotated videos can be used; {'; '.join(problems.summary())}")
  given = {video: {annotated.split for annotated in entries[video]} for video in frames}
  splits, split_notes = _split(frames, given, val_share, seed)
  ids = {name: index for index, name in export.label_map.items()}
  tables = {
    split: source_set.clean(_rows(frames, videos, ids, with_empty=split == "val"), export.files[0], problems)
    for split, videos in splits.items()
  }
  if not (tables["train"].action > 0).any():
    raise AnnotationError(f"{export.files[0]}: no box in any of the videos of train: {', '.join(splits['train'][:3])}")
  made_from = {
    "layout": export.format,
    "sha256": {path.name: source_set.fingerprint(path) for path in export.files},
    "stride": stride,
  }
  videos = {split: {video: Source(files[video]) for video in names} for split, names in splits.items()}
  classes = ", ".join(f"{index} {name}" for index, name in export.label_map.items())
  head = f"{source}: {len(frames)} videos with annotations of {export.format} ({len(export.files)} files)"
  notes = [head, *export.notes, f"{len(ids)} classes: {classes}", *split_notes]
  return SourceSet("custom", made_from, export.label_map, tables, videos), notes


def _video_files(source: Path) -> dict[str, Path]:
  """The videos by name, in the source and two folders below."""
  files: dict[str, Path] = {}
  for path in sorted(path for place in _PLACES for path in source.glob(place)):
    if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
      name = path.stem.replace(",", "_")
      if name in files:
        raise VideoError(f"{path}: the video {name!r} is also there as {files[name]}; rename or delete one")
      files[name] = path
  if not files:
    raise VideoError(f"{source}: no videos here or two folders below; expected {', '.join(SUFFIXES)}")
  return files


def match(
  annotated: Iterable[AnnotatedVideo], files: dict[str, Path], source: Path, problems: Problems
) -> dict[str, list[AnnotatedVideo]]:
  """Which annotations belong to which video; what has no counterpart is noted.

  Args:
    annotated: of any videos.
    files: the videos by name.
    source: where they are, for messages.
    problems: gets what has no counterpart.

  Raises:
    VideoError: no annotations belong to any of the videos.
  """
  entries: dict[str, list[AnnotatedVideo]] = collections.defaultdict(list)
  missing = {}
  for one in annotated:
    video = next((name for called in one.names for name in _possible_names(called) if name in files), None)
    if video:
      entries[video].append(one)
    else:
      missing[one.names[0]] = f"{one.place}: no video {one.names[0]!r}"
  if not entries:
    called = ", ".join(sorted(missing)[:3])
    here = ", ".join(sorted(files)[:3])
    raise VideoError(
      f"{source}: none of the annotated videos ({called}) is here, but {here}; where annotations name no video, "
      "call their file or folder like it"
    )
  problems.explain("annotated videos that are not here, left out", missing)
  unused = {name: name for name in files if name not in entries}
  problems.explain("videos without annotations, left out", unused)
  return dict(sorted(entries.items()))


def _possible_names(called: str) -> list[str]:
  """Names of a video that a path in annotations may mean, the last part first."""
  parts = [part for part in called.replace("\\", "/").split("/") if part][::-1]
  names = [part[: part.rindex(".")] if part.lower().endswith(SUFFIXES) else part for part in parts]
  return [name.replace(",", "_") for name in names]


def boxes_by_time(path: Path, entries: list[AnnotatedVideo], stride: float, problems: Problems) -> Frames:
  """Boxes at keyframes, by time.

  Args:
    path: the video.
    entries: its annotations.
    stride: see `read`.
    problems: gets what is repaired and left out.

  Raises:
    AnnotationError: the annotations do not fit the video.
    VideoError: it cannot be read.
  """
  picture = _look(path, need_times=any(entry.clock != "seconds" for entry in entries))
  moments: dict[float, list[tuple[AnnotatedVideo, float]]] = collections.defaultdict(list)
  for entry in entries:
    for moment, at in _times(entry, picture, problems):
      moments[at].append((entry, moment))
  chosen = _thin(sorted(moments), stride)
  problems.add("annotated frames between keyframes, not used (--stride)", path.name, len(moments) - len(chosen))
  result: Frames = {}
  for at in chosen:
    boxes = result.setdefault(at, [])
    for entry, moment in moments[at]:
      height, width = _annotated_size(entry, picture.size, path, problems)
      for box in entry.boxes_at(moment):
        x1, y1, x2, y2 = box.corners
        boxes.append(box._replace(corners=(x1 / width, y1 / height, x2 / width, y2 / height)))
  return result


def _look(path: Path, *, need_times: bool) -> _Picture:
  with VideoReader(path) as reader:
    height, width = reader.size
    if not need_times:
      return _Picture((height, width), reader.duration or math.inf, np.empty(0))
    times = reader.frame_times()
  if not len(times):
    raise VideoError(f"{path}: no frame can be decoded")
  return _Picture((height, width), float(times[-1]), times)


def _times(entry: AnnotatedVideo, picture: _Picture, problems: Problems) -> list[tuple[float, float]]:
  """Pairs of an annotated moment and its time in seconds; those outside the video are counted."""
  last = len(picture.times) - 1 if entry.clock == "frames" else picture.end + _AFTER_END
  moments = [moment for moment in entry.moments if 0 <= moment <= last]
  problems.add(_OUTSIDE, entry.place, len(entry.moments) - len(moments))
  if entry.clock == "seconds":
    return [(moment, float(moment)) for moment in moments]
  frames = np.array(moments, int)
  if entry.clock == "shown":
    frames = np.searchsorted(picture.times, np.array(moments) + _TOOL_ROUNDING, side="right") - 1
  return list(zip(moments, picture.times[frames.clip(0)].tolist(), strict=True))


def _thin(times: list[float], stride: float) -> list[float]:
  """Of ascending times the one nearest to each multiple of the stride, where it is nearer to it than to others."""
  if not stride:
    return times
  nearest: dict[int, float] = {}
  for at in times:
    cell = round(at / stride)
    if cell not in nearest or abs(at - cell * stride) < abs(nearest[cell] - cell * stride):
      nearest[cell] = at
  return list(nearest.values())


def _annotated_size(
  entry: AnnotatedVideo, size: tuple[int, int], path: Path, problems: Problems
) -> tuple[float, float]:
  """Height and width that boxes are divided by.

  Raises:
    AnnotationError: the picture that was annotated has another shape than that of the video.
  """
  if entry.size is None or entry.size == (1, 1) or entry.size == size:
    return entry.size or size
  annotated = f"{entry.place}: annotated at {entry.size[1]:g} x {entry.size[0]:g}"
  if entry.size == size[::-1]:
    raise AnnotationError(
      f"{annotated}, but {path} plays as {size[1]} x {size[0]}: a rotated video. Re-encode it upright, annotate that"
    )
  stretch = (entry.size[1] / entry.size[0]) / (size[1] / size[0])
  if abs(stretch - 1) > _ASPECT_TOLERANCE:
    raise AnnotationError(f"{annotated}, but {path} is {size[1]} x {size[0]}: these are not the same pictures")
  problems.explain("videos annotated at another size, boxes scaled", {path.stem: annotated})
  return entry.size


def _split(
  frames: dict[str, Frames], given: dict[str, set[str]], val_share: float, seed: int
) -> tuple[dict[str, list[str]], list[str]]:
  """Divides videos into train and val: as the files do, or else so that each class is in both if possible."""
  notes = []
  if all(len(splits) == 1 and "" not in splits for splits in given.values()):
    kinds = {video: next(iter(splits)) for video, splits in given.items()}
    held_out = "val" if "val" in kinds.values() else "test"
    train, val = ([video for video in frames if kinds[video] == kind] for kind in ("train", held_out))
    if train and val:
      if left := len(frames) - len(train) - len(val):
        notes.append(f"{left} videos of test are left out")
      return {"train": train, "val": val}, [*notes, f"split as in the files: {len(train)} train, {len(val)} val"]
  classes = {video: {action for boxes in found.values() for box in boxes for action in box.actions}
             for video, found in frames.items()}  # fmt: skip
  val = _choose_val(classes, val_share, seed)
  train = [video for video in frames if video not in val]
  if not val:
    notes.append("no val: it takes two videos and a --val-share" if val_share else "no val, as asked for")
    return {"train": train}, notes
  for split, names in (("train", train), ("val", val)):
    if lacking := sorted(set().union(*classes.values()) - set().union(*(classes[video] for video in names))):
      notes.append(f"nobody in {split} does this, too few videos show it: {', '.join(lacking)}")
  return {"train": train, "val": sorted(val)}, [*notes, f"split by video: {len(train)} train, {len(val)} val"]


def _choose_val(classes: dict[str, set[str]], share: float, seed: int) -> list[str]:
  """Videos for val: those that show rare classes first, never the last ones of a class; then any."""
  order = sorted(classes)
  np.random.default_rng(seed).shuffle(order)
  if not share or len(order) < 2:
    return []
  wanted = max(1, round(share * len(order)))
  left = collections.Counter(name for names in classes.values() for name in names)  # videos of train with a class
  val: list[str] = []
  missing = {name for name, count in left.items() if count > 1}

  def take(videos: list[str]) -> bool:
    allowed = [video for video in videos if video not in val and all(left[name] > 1 for name in classes[video])]
    if not allowed or len(val) + 1 == len(order):
      return False
    best = max(allowed, key=lambda video: len(classes[video] & missing))
    val.append(best)
    missing.difference_update(classes[best])
    left.subtract(classes[best])
    return True

  for name in sorted(missing, key=lambda name: (left[name], name)):
    if name in missing and len(val) < max(wanted, len(order) // 2):
      take([video for video in order if name in classes[video]])
  while len(val) < wanted and take(order):
    pass
  if not val:  # every video shows something that no other one does
    val.append(min(order, key=lambda video: sum(left[name] == 1 for name in classes[video])))
  return val


def _rows(frames: dict[str, Frames], videos: list[str], ids: dict[str, int], *, with_empty: bool) -> Rows:
  """Keyframes of some videos; those without people only where asked for."""
  rows = []
  for video in videos:
    for at, boxes in frames[video].items():
      if not boxes and with_empty:
        rows.append((video, at, [np.nan] * 4, 0, 1.0))
      rows += [(video, at, box.corners, ids[name], float(box.person)) for box in boxes for name in box.actions]
  video, at, corners, action, person = zip(*rows, strict=True) if rows else ((),) * 5
  return Rows(
    np.array(video, object),
    np.array(at, np.float64).round(6),
    np.array(corners, np.float64).reshape(-1, 4),
    np.array(action, np.int32),
    np.array(person, np.float64),
  )
