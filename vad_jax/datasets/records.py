"""Records of video frames: videos become ArrayRecord files of one second each, and clips come back out of them.

A record holds the frames of one second of one video as JPEGs with their presentation times, so that a clip
touches few records and nothing is stored twice. Annotations stay in a table beside them: new labels need no
new encoding.

  folder = build("data/mine", "data/mine/records", "train")
  frames = RecordFrames(folder).frames("some_video", [1.0, 1.2, 1.4])  # [3, H, W, 3] uint8
"""

import bisect
import collections
import contextlib
import errno
import fcntl
import itertools
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from vad_jax import progress
from vad_jax.datasets.frame_folder import FrameFolder, baseline_size, decode, numbered_images
from vad_jax.datasets.video import PathLike, VideoError, VideoReader, nearest, video_files

logger = logging.getLogger(__name__)

# Files are what workers share out and what a restart keeps: enough of them for many cores, none above some hundred MB.
_FILES = 64
_SECONDS_PER_FILE = (30, 1000)  # at least, at most
_UNKNOWN_DURATION = 60.0  # guess for a video that does not say how long it is
_REBUILD = "delete the folder and build it again"
_INDEX = "index.json"
_PLAN = "plan.json"
_CONTENTS = ".contents.json"  # beside each file of records that is complete
# What makes OpenCV decode a part of a JPEG's size.
_REDUCED = {
  8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
  4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
  2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
}
_FEATURES = tfds.features.FeaturesDict(
  {
    "video": tfds.features.Text(),
    "second": np.int32,
    "times": tfds.features.Tensor(shape=(None,), dtype=np.float64),
    "frames": tfds.features.Sequence(tfds.features.Text()),
    "height": np.int32,
    "width": np.int32,
  }
)


class Source(NamedTuple):
  """Where the frames of a video come from.

  Attributes:
    path: a video file, or a folder of numbered images (see `frame_folder`).
    offset: what time, in seconds, annotations give its first frame.
    start: second of it from which on frames are taken, whole.
    stop: second of it up to which frames are taken, whole or infinite.
    fps: images a second of a folder.
    prefix: what stands before the number in the names of a folder's images.
  """

  path: Path
  offset: int = 0
  start: int = 0
  stop: float = math.inf
  fps: float = 0.0
  prefix: str = ""

  def open(self) -> VideoReader | FrameFolder:
    """Opens the video.

    Raises:
      VideoError: nothing of it can be read.
    """
    if self.fps:
      return FrameFolder(self.path, fps=self.fps, prefix=self.prefix)
    return VideoReader(self.path, threads=1)

  def fingerprint(self) -> list[Any]:
    """What changes when the video does: its bytes or the numbers of its images, and how it is read."""
    numbers = list(numbered_images(self.path, self.prefix)) if self.fps and self.path.is_dir() else []
    size = self.path.stat().st_size if self.path.is_file() else 0
    return [size, len(numbers), *numbers[:1], *numbers[-1:], self.offset, self.start, str(self.stop), self.fps]


class _Encoder(NamedTuple):
  """How frames become JPEGs: shrunk to this short side where it is given and they are larger, in this quality."""

  short_side: int | None
  quality: int

  def size(self, height: int, width: int) -> tuple[int, int]:
    """Height and width of the JPEGs of a video."""
    scale = min(1.0, self.short_side / min(height, width)) if self.short_side else 1.0
    return round(height * scale), round(width * scale)

  def jpeg(self, picture: np.ndarray | bytes, size: tuple[int, int]) -> bytes | None:
    """The JPEG of an RGB picture or of an image file; None where the file is damaged."""
    if isinstance(picture, bytes):
      if baseline_size(picture) == size:
        return picture
      image = decode(picture)
      if image is None:
        return None
    else:
      image = picture[..., ::-1]
    if image.shape[:2] != size:
      image = cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1].tobytes()


def build(
  source_dir: PathLike,
  output_dir: PathLike,
  split: str,
  *,
  workers: int | None = None,
  short_side: int | None = None,
  quality: int = 95,
) -> Path:
  """Turns the videos of one split of a set into records, as `build_from` does.

  Args:
    source_dir: holds ``videos/<split>/<video>.mp4`` (or another suffix of a video). Records that are there are taken
      as they are where it holds none.
    output_dir: see `build_from`, as are the others.
    split: name of the split.
    workers: threads.
    short_side: of the frames.
    quality: of the JPEGs.

  Raises:
    VideoError: there are no videos, or none of them can be read.
  """
  folder = Path(source_dir) / "videos" / split
  files = video_files(folder) if folder.is_dir() else {}
  if not files:
    if (Path(output_dir) / split / _INDEX).is_file():
      return Path(output_dir) / split
    raise VideoError(f"{folder}: no videos here; expected <video>.mp4 files")
  sources = {video: Source(path) for video, path in files.items()}
  return build_from(sources, output_dir, split, workers=workers, short_side=short_side, quality=quality)


def build_from(
  sources: Mapping[str, Source],
  output_dir: PathLike,
  split: str,
  *,
  workers: int | None = None,
  short_side: int | None = None,
  quality: int = 95,
) -> Path:
  """Turns videos into records; does nothing where that has been done, and goes on where it was stopped.

  Frames are encoded as JPEG; baseline JPEGs of a folder of images that keep their size are copied as they are. Videos
  that cannot be read are logged, listed in ``problems.json`` beside the records and left out, images that cannot be
  decoded are counted there.

  Args:
    sources: name of each video and where its frames are.
    output_dir: where records go; a folder below it appears when it is complete.
    split: name of that folder.
    workers: threads that decode and encode; by default one for each core.
    short_side: shrink frames to this short side in pixels, where they are larger.
    quality: of the JPEGs, 1 to 100.

  Returns:
    The folder of the records, for `RecordFrames`.

  Raises:
    VideoError: none of the videos can be read, or the disk is full.
  """
  folder, workers = Path(output_dir) / split, workers or os.cpu_count() or 1
  folder.parent.mkdir(parents=True, exist_ok=True)
  with ThreadPoolExecutor(workers) as pool:  # on some disks it takes a while to list millions of images
    fingerprints = dict(zip(sources, pool.map(Source.fingerprint, sources.values()), strict=True))
  made_from = {"short_side": short_side, "quality": quality, "sources": fingerprints}
  with _alone(folder.with_name(f".{split}.lock")):
    if (folder / _INDEX).is_file():
      if _read_index(folder)["made_from"] == made_from:
        return folder
      logger.warning("%s: videos or settings have changed, building the records again", folder)
    partial = folder.with_name(f".{split}.part")
    plan = _plan(partial, split, made_from, sources, workers)
    try:
      files = _write_files(partial, split, plan, sources, _Encoder(short_side, quality), workers)
      _finish(partial, split, plan, files)
    except (OSError, RuntimeError) as error:  # the writer's own errors are of the second kind
      if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        raise VideoError(f"{partial}: the disk is full; make room, and the same call goes on from here") from None
      raise
    if folder.exists():
      shutil.rmtree(folder)
    partial.rename(folder)
    for leftover in (*folder.glob(f"*{_CONTENTS}"), folder / _PLAN):  # what a restart would have needed
      leftover.unlink()
  return folder


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
  """Waits until no other process is inside; the system opens the lock however a process ends."""
  with open(lock, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logger.warning("%s: another process makes these records, waiting for it", lock.parent)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield
    lock.unlink(missing_ok=True)


def _plan(
  partial: Path, split: str, made_from: dict[str, Any], sources: Mapping[str, Source], workers: int
) -> dict[str, Any]:
  """What goes into which file; a plan for the same records that was left behind is kept with its files."""
  if (partial / _PLAN).is_file():
    plan = json.loads((partial / _PLAN).read_text())
    if plan["made_from"] == made_from:
      return plan
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  ends: dict[str, float] = {}
  unreadable: dict[str, str] = {}
  with ThreadPoolExecutor(workers) as pool, progress.bar(f"Checking {split} videos", len(sources)) as advance:
    for video, end in zip(sources, pool.map(_end, sources.values()), strict=True):
      if isinstance(end, VideoError):
        logger.warning("left out: %s", end)
        unreadable[video] = str(end)
      else:
        ends[video] = end
      advance()
  if not ends:
    first = next(iter(unreadable.values()), "there are none")
    raise VideoError(f"{first} (as all {len(sources)} videos of the split {split!r})")
  plan = {"made_from": made_from, "unreadable": unreadable, "files": _deal(ends, sources)}
  _write_json(partial / _PLAN, plan)
  return plan


def _end(source: Source) -> float | VideoError:
  """At which second a video ends, as far as it tells, or why it cannot be read."""
  try:
    with source.open() as reader:
      end = reader.duration or source.start + _UNKNOWN_DURATION
  except VideoError as error:
    return error
  if end <= source.start:
    return VideoError(f"{source.path}: ends after {end:.1f} s; needed from second {source.start} on")
  return min(end, source.stop)


def _deal(ends: dict[str, float], sources: Mapping[str, Source]) -> list[dict[str, Any]]:
  """Cuts videos into pieces (video, from second, to second) and deals them to files, in order."""
  total = sum(end - sources[video].start for video, end in ends.items())
  limit = int(min(max(total / _FILES, _SECONDS_PER_FILE[0]), _SECONDS_PER_FILE[1]))
  files: list[dict[str, Any]] = []
  for video, end in ends.items():
    starts = range(sources[video].start, math.ceil(end), limit)
    # The end, as videos tell it, may be too early.
    for start, stop in zip(starts, [*starts[1:], sources[video].stop], strict=True):
      seconds = math.ceil(min(stop, end) - start)
      if not files or files[-1]["seconds"] + seconds > limit:
        files.append({"seconds": 0, "pieces": []})
      files[-1]["pieces"].append((video, start, stop))
      files[-1]["seconds"] += seconds
  return files


def _write_files(
  partial: Path, split: str, plan: dict[str, Any], sources: Mapping[str, Source], encoder: _Encoder, workers: int
) -> list[dict[str, Any]]:
  """Writes the files that are not there yet; returns what each holds."""
  files, template = plan["files"], _template(partial, split)
  paths = [Path(template.sharded_filepath(shard_index=i, num_shards=len(files))) for i in range(len(files))]
  there = sum(file["seconds"] for file, path in zip(files, paths, strict=True) if _contents(path).is_file())
  total = sum(file["seconds"] for file in files)
  stopped, lock = threading.Event(), threading.Lock()
  with ThreadPoolExecutor(workers) as pool, progress.bar(f"Encoding {split} records", total, start=there) as advance:

    def count(seconds: int) -> None:
      if stopped.is_set():
        raise CancelledError
      if seconds:
        with lock:
          advance(seconds)

    futures = [
      pool.submit(_write_file, path, file, sources, encoder, count) for path, file in zip(paths, files, strict=True)
    ]
    try:
      for future in as_completed(futures):
        future.result()
    finally:
      stopped.set()
      pool.shutdown(cancel_futures=True)
  return [future.result() for future in futures]


def _write_file(
  path: Path, file: dict[str, Any], sources: Mapping[str, Source], encoder: _Encoder, count: Callable[[int], None]
) -> dict[str, Any]:
  """Writes one file of records, if it is not there; returns what it holds, which is kept beside it for a restart."""
  if _contents(path).is_file():
    return json.loads(_contents(path).read_text())
  seconds: dict[str, list[int]] = {}
  unreadable: dict[str, str] = {}
  broken: collections.Counter[str] = collections.Counter()
  length, num_bytes = 0, 0
  with contextlib.closing(ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")) as writer:
    for video, start, stop in file["pieces"]:
      try:
        for record in _records(video, sources[video], start, stop, encoder, broken):
          data = _FEATURES.serialize_example(record)
          writer.write(data)
          seconds.setdefault(video, []).append(record["second"])
          length, num_bytes = length + 1, num_bytes + len(data)
          count(int(length <= file["seconds"]))  # not more than was announced
      except VideoError as error:
        logger.warning("left out: %s", error)
        unreadable[video] = str(error)
  contents = {
    "length": length, "bytes": num_bytes, "seconds": seconds, "broken_frames": +broken, "unreadable": unreadable,
  }  # fmt: skip
  _write_json(_contents(path), contents)
  count(max(file["seconds"] - length, 0))
  return contents


def _records(
  video: str, source: Source, start: int, stop: float, encoder: _Encoder, broken: collections.Counter[str]
) -> Iterator[dict[str, Any]]:
  """The records of a piece of a video; counts frames that are damaged or missing."""
  record: dict[str, Any] | None = None
  with source.open() as reader:
    height, width = encoder.size(*reader.size)
    for time, picture in reader.read(start, stop):
      jpeg = encoder.jpeg(picture, (height, width))
      if jpeg is None:
        broken[video] += 1
        continue
      second = int(time) + source.offset
      if record is None or record["second"] != second:
        if record is not None:
          yield record
        record = {"video": video, "second": second, "times": [], "frames": [], "height": height, "width": width}
      record["times"].append(time + source.offset)
      record["frames"].append(jpeg)
    broken[video] += reader.broken
  if record is not None:
    yield record


def _finish(partial: Path, split: str, plan: dict[str, Any], files: list[dict[str, Any]]) -> None:
  """Writes what describes the records."""
  seconds: dict[str, list[int]] = collections.defaultdict(list)
  broken: collections.Counter[str] = collections.Counter()
  unreadable = dict(plan["unreadable"])
  for file in files:
    for video, found in file["seconds"].items():
      seconds[video].extend(found)
    broken.update(file["broken_frames"])
    unreadable.update(file["unreadable"])
  if not seconds:
    raise VideoError(f"{partial}: no frame of {len(plan['made_from']['sources'])} videos can be decoded")
  identity = tfds.core.DatasetIdentity("video_seconds", tfds.core.Version("1.0.0"), str(partial), __name__)
  info = tfds.core.DatasetInfo(builder=identity, features=_FEATURES, disable_shuffling=True)
  info.set_file_format("array_record")
  lengths, num_bytes = [file["length"] for file in files], sum(file["bytes"] for file in files)
  template = _template(partial, split)
  info.set_splits(
    tfds.core.SplitDict(
      [tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)]
    )
  )
  info.write_to_directory(partial)
  _write_json(partial / "problems.json", {"unreadable": unreadable, "broken_frames": broken})
  _write_json(partial / _INDEX, {"split": split, "made_from": plan["made_from"], "seconds": seconds})


def _template(folder: Path, split: str) -> tfds.core.ShardedFileTemplate:
  data_dir: Any = folder
  return tfds.core.ShardedFileTemplate(
    dataset_name="video_seconds", data_dir=data_dir, split=split, filetype_suffix="array_record"
  )


def _contents(path: Path) -> Path:
  return path.with_name(path.name + _CONTENTS)


def _write_json(path: Path, content: dict[str, Any]) -> None:
  """Writes a file that appears when it is complete."""
  part = path.with_name(f".{path.name}.part")
  part.write_text(json.dumps(content, indent=2 if path.name == "problems.json" else None))
  part.replace(path)


def _read_index(folder: Path) -> dict[str, Any]:
  try:
    index = json.loads((folder / _INDEX).read_text())
    return {key: index[key] for key in ("split", "made_from", "seconds")}
  except (ValueError, KeyError, TypeError):
    raise VideoError(f"{folder / _INDEX}: damaged; {_REBUILD}") from None


class RecordFrames:
  """Frames out of records that `build` made.

  Attributes:
    directory: the folder of the records.
  """

  def __init__(self, directory: PathLike):
    """Opens records; reads the index alone.

    Raises:
      VideoError: there are no complete records.
    """
    self.directory = Path(directory)
    if not (self.directory / _INDEX).is_file():
      raise VideoError(f"{directory}: no records here; make them with vad_jax.datasets.records.build")
    index = _read_index(self.directory)
    self._split: str = index["split"]
    self._seconds: dict[str, list[int]] = index["seconds"]
    starts = itertools.accumulate((len(seconds) for seconds in self._seconds.values()), initial=0)
    self._first = dict(zip(self._seconds, starts, strict=False))
    self._source: Any = None  # opened when first used, so that workers open their own

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_source": None}

  def covers(self, video: str, time: float) -> bool:
    """Whether there are frames of the second that a time falls in."""
    seconds = self._seconds.get(video, ())
    position = bisect.bisect_right(seconds, time)
    return position > 0 and time - seconds[position - 1] <= 1

  def frames(self, video: str, times: Sequence[float] | np.ndarray, short_side: float = math.inf) -> np.ndarray:
    """The frames nearest to the given times.

    Args:
      video: name of the video.
      times: ``[T]`` seconds, clamped to the video.
      short_side: pixels that suffice; larger frames may come in a half, quarter or eighth of their size, as long as
        these are left, which takes less time.

    Returns:
      ``[T, H, W, 3]`` uint8 RGB.

    Raises:
      VideoError: there is no such video, or a frame is damaged.
    """
    if video not in self._seconds:
      raise VideoError(f"{self.directory}: no records of a video {video!r}")
    records: dict[int, dict[str, Any]] = {}
    places = [self._nearest(video, float(time), records) for time in times]
    record = records[places[0][0]]
    size = record["height"], record["width"]
    reduction = next((factor for factor in _REDUCED if min(size) >= factor * short_side), 1)
    images = np.empty((len(places), *(math.ceil(side / reduction) for side in size), 3), np.uint8)
    first: dict[tuple[int, int], int] = {}  # where a frame stands already
    for index, (position, row) in enumerate(places):
      same = first.setdefault((position, row), index)
      if same < index:
        images[index] = images[same]
      elif not _decode_into(images[index], records[position]["frames"][row], reduction):
        time = records[position]["times"][row]
        raise VideoError(f"{self.directory}: the frame of {video}, {time:.3f} s is damaged; {_REBUILD}")
    return images

  def facts(self, video: str) -> tuple[float, float, tuple[int, int]]:
    """Seconds of a video, its frames a second halfway, and their height and width."""
    first, count = self._first[video], len(self._seconds[video])
    begin, middle, end = (self._read(first + position) for position in (0, count // 2, count - 1))
    times = middle["times"]
    fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 1.0
    return float(end["times"][-1] - begin["times"][0] + 1 / fps), float(fps), (int(end["height"]), int(end["width"]))

  def _nearest(self, video: str, time: float, records: dict[int, dict[str, Any]]) -> tuple[int, int]:
    """Which record of the video, and which frame in it; adds the records that it looked into."""
    seconds = self._seconds[video]

    def look(position: int) -> tuple[float, int, int]:
      if position not in records:
        records[position] = self._read(self._first[video] + position)
      frame_times = records[position]["times"]
      row = nearest(frame_times, time)
      return abs(frame_times[row] - time), position, row

    here = max(bisect.bisect_right(seconds, time) - 1, 0)
    best = look(here)
    if here > 0 and time - (seconds[here - 1] + 1) <= best[0]:
      best = min(best, look(here - 1))
    if here + 1 < len(seconds) and seconds[here + 1] - time < best[0]:
      best = min(best, look(here + 1))
    return best[1:]

  def _read(self, number: int) -> dict[str, Any]:
    try:
      if self._source is None:
        builder: Any = tfds.builder_from_directory(self.directory)
        self._source = builder.as_data_source(split=self._split)
      return self._source[number]
    except (RuntimeError, OSError, ValueError) as error:
      reason = str(error).partition("\n")[0]
      raise VideoError(f"{self.directory}: record {number} cannot be read ({reason}); {_REBUILD}") from None


def _decode_into(target: np.ndarray, jpeg: bytes, reduction: int) -> bool:
  """Decodes a JPEG in a part of its size; False where it is damaged or of another size."""
  flags = cv2.IMREAD_COLOR_RGB | _REDUCED.get(reduction, 0)
  image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), flags)
  if image is None or image.shape != target.shape:
    return False
  target[:] = image
  return True
