"""Records of video frames: mp4 files become ArrayRecord files of one second each, and clips come back out of
them.

A record holds the frames of one second of one video as JPEGs with their presentation times, so that a clip
touches few records and nothing is stored twice. Annotations stay in a table beside them: new labels need no
new encoding.

  folder = build("data/mine", "data/mine/records", "train")
  frames = RecordFrames(folder).frames("some_video", [1.0, 1.2, 1.4])  # [3, H, W, 3] uint8
"""

import bisect
import collections
import functools
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from vad_jax import progress
from vad_jax.datasets.video import PathLike, VideoError, VideoReader, nearest, probe, video_files

logger = logging.getLogger(__name__)

# A long video is decoded in pieces of this many seconds, so that memory stays flat and all cores have work.
_PIECE_SECONDS = 30
_RECORDS_PER_FILE = 1000  # some hundred MB
_INDEX = "index.json"


def build(
  source_dir: PathLike,
  output_dir: PathLike,
  split: str,
  *,
  workers: int | None = None,
  short_side: int | None = None,
  quality: int = 95,
) -> Path:
  """Turns the videos of one split into records; does nothing where that has been done.

  Videos that cannot be read are logged, listed in ``problems.json`` beside the records and left out.

  Args:
    source_dir: holds ``videos/<split>/<video>.mp4`` (or another suffix of a video).
    output_dir: where records go; a folder below it appears when it is complete.
    split: name of the split.
    workers: threads that decode and encode; by default one for each core.
    short_side: shrink frames to this short side in pixels, where they are larger.
    quality: of the JPEGs, 1 to 100.

  Returns:
    The folder of the records, for `RecordFrames`.

  Raises:
    VideoError: there are no videos, or none of them can be read.
  """
  source = Path(source_dir) / "videos" / split
  folder = Path(output_dir) / split
  files = video_files(source) if source.is_dir() else {}
  sizes = {video: path.stat().st_size for video, path in files.items()}
  made_from = {"short_side": short_side, "quality": quality, "bytes": sizes}
  if (folder / _INDEX).is_file():
    if not files or json.loads((folder / _INDEX).read_text())["made_from"] == made_from:
      return folder
    logger.warning("%s: videos or settings have changed, building the records again", folder)
  if not files:
    raise VideoError(f"{source}: no videos here; expected <video>.mp4 files")
  partial = folder.with_name(f".{split}.{os.getpid()}.part")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    encode = functools.partial(_encode, short_side=short_side, quality=quality)
    seconds = _write(partial, split, files, encode, workers or os.cpu_count() or 1)
    index = {"split": split, "made_from": made_from, "seconds": seconds}
    (partial / _INDEX).write_text(json.dumps(index))
    if folder.exists():
      shutil.rmtree(folder)
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return folder


def _write(
  folder: Path, split: str, files: dict[str, Path], encode: Callable[..., Any], workers: int
) -> dict[str, list[int]]:
  """Writes records and the list of problems; returns the seconds of each video, as its records follow."""
  features = {
    "video": tfds.features.Text(),
    "second": np.int32,
    "times": tfds.features.Tensor(shape=(None,), dtype=np.float64),
    "frames": tfds.features.Sequence(tfds.features.Text()),
    "height": np.int32,
    "width": np.int32,
  }
  identity = tfds.core.DatasetIdentity("video_seconds", tfds.core.Version("1.0.0"), str(folder), __name__)
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features), disable_shuffling=True)
  # Not a GeneratorBasedBuilder: that would first collect all records in memory and temporary files.
  writer = tfds.core.SequentialWriter(info, _RECORDS_PER_FILE, file_format="array_record")
  writer.initialize_splits([split])
  seconds = collections.defaultdict(list)
  broken = collections.Counter()
  with ThreadPoolExecutor(workers) as pool:
    probes = dict(zip(files, pool.map(probe, files.values()), strict=True))
    unreadable = {video: str(error) for video, (_, error) in probes.items() if error}
    for error in unreadable.values():
      logger.warning("left out: %s", error)
    if len(unreadable) == len(files):
      raise VideoError(f"{next(iter(unreadable.values()))} (as all {len(files)} videos of the split {split!r})")
    pieces = [
      (video, files[video], *piece)
      for video, (duration, error) in probes.items()
      if not error
      for piece in _pieces(duration)
    ]
    with progress.bar(f"Encoding {split} records", len(pieces)) as advance:
      for video, records, lost in _ordered(pool, encode, pieces, workers + 2):
        writer.add_examples({split: records})
        seconds[video].extend(record["second"] for record in records)
        broken[video] += lost
        advance()
  writer.close_all()
  problems = {"unreadable": unreadable, "broken_frames": {video: n for video, n in broken.items() if n}}
  (folder / "problems.json").write_text(json.dumps(problems, indent=2))
  return seconds


def _encode(
  piece: tuple[str, Path, float, float], *, short_side: int | None, quality: int
) -> tuple[str, list[dict[str, Any]], int]:
  """The video, its records of one piece, and the number of frames that were broken in it."""
  video, path, start, stop = piece
  records: list[dict[str, Any]] = []
  with VideoReader(path, threads=1) as reader:
    height, width = reader.size
    scale = min(1.0, short_side / min(height, width)) if short_side else 1.0
    size = {"height": round(height * scale), "width": round(width * scale)}
    for time, frame in reader.read(start, stop):
      if scale < 1:
        frame = cv2.resize(frame, (size["width"], size["height"]), interpolation=cv2.INTER_AREA)
      jpeg = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
      if not records or records[-1]["second"] != int(time):
        records.append({"video": video, "second": int(time), "times": [], "frames": [], **size})
      records[-1]["times"].append(time)
      records[-1]["frames"].append(jpeg)
    return video, records, reader.broken


def _pieces(duration: float | None) -> list[tuple[float, float]]:
  starts = [float(start) for start in range(0, max(math.ceil(duration or 0), 1), _PIECE_SECONDS)]
  return list(zip(starts, [*starts[1:], math.inf], strict=True))  # the end, as files say, may be too early


def _ordered(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
  """Like ``pool.map``, but with no more than `ahead` results waiting in memory."""
  waiting: collections.deque[Future] = collections.deque()
  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) >= ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    for future in waiting:
      future.cancel()


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
    try:
      index = json.loads((self.directory / _INDEX).read_text())
    except FileNotFoundError:
      raise VideoError(f"{directory}: no records here; make them with vad_jax.datasets.records.build") from None
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

  def frames(self, video: str, times: Sequence[float] | np.ndarray) -> np.ndarray:
    """The frames nearest to the given times.

    Args:
      video: name of the video.
      times: ``[T]`` seconds, clamped to the video.

    Returns:
      ``[T, H, W, 3]`` uint8 RGB.

    Raises:
      VideoError: there is no such video, or a frame is damaged.
    """
    if video not in self._seconds:
      raise VideoError(f"{self.directory}: no records of a video {video!r}")
    records: dict[int, dict[str, Any]] = {}
    images: dict[tuple[int, int], np.ndarray] = {}
    picked = []
    for time in times:
      position, row = self._nearest(video, float(time), records)
      if (position, row) not in images:
        images[position, row] = self._decode(records[position], row)
      picked.append(images[position, row])
    return np.stack(picked)

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
    if self._source is None:
      builder: Any = tfds.builder_from_directory(self.directory)
      self._source = builder.as_data_source(split=self._split)
    return self._source[number]

  def _decode(self, record: dict[str, Any], row: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(record["frames"][row], np.uint8), cv2.IMREAD_COLOR)
    if image is None:
      name = f"{record['video'].decode()}, {record['times'][row]:.3f} s"
      raise VideoError(f"{self.directory}: the frame of {name} is damaged; delete the folder and build it again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
