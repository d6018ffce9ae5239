"""Video files in and out, by presentation time: PyAV decoding and encoding.

Time zero is the presentation time of a stream's first frame. Frames are found by their time stamps, never by
counting, so variable frame rate, B-frames and streams that start late need no care from the caller. Pictures are
turned as the file asks for, and have the pixels that are stored, also where these are not square: boxes are relative to
the frame, and extracted frames of published sets are like that, too.

  with VideoReader("movie.mp4") as reader:
    for seconds, frame in reader:  # [H, W, 3] uint8 RGB
      ...
    clip = reader.frames_at([1.0, 1.2, 1.4])  # [3, H, W, 3]
"""

import contextlib
import itertools
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from vad_jax import progress
from vad_jax.datasets.sound import SoundCopy

PathLike = str | os.PathLike[str]

logger = logging.getLogger(__name__)

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
# Wanted frames further apart than this are worth a seek; closer ones are reached sooner by decoding on.
_SEEK_AHEAD = 10.0
# Frames within this many frames of a wanted time are decoded in any case.
_NEAR_FRAMES = 0.75
# So many frames at equal distances make a regular video, in which a wider gap is of missing frames.
_REGULAR = 8
# Most failures in a row to read from a damaged file before the rest of it is given up.
_MAX_READ_ERRORS = 8
_BT709 = 1  # the same number for matrix, primaries and transfer function
_LIMITED_RANGE = 1


class VideoError(ValueError):
  """A video that cannot be read or written; the message names the file and what to do."""


def nearest(frame_times: np.ndarray, time: float) -> int:
  """Index of the frame nearest to a time; the earlier one of two that are equally near.

  Args:
    frame_times: ``[F]`` ascending, at least one.
    time: seconds.
  """
  after = int(np.searchsorted(frame_times, time))
  if after == 0:
    return 0
  if after == len(frame_times):
    return after - 1
  return after if frame_times[after] - time < time - frame_times[after - 1] else after - 1


def video_files(folder: PathLike) -> dict[str, Path]:
  """The videos in a folder, sorted: name without suffix to file.

  Raises:
    VideoError: two files would be the same video.
  """
  files: dict[str, Path] = {}
  for path in sorted(Path(folder).iterdir()):
    if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
      if path.stem in files:
        raise VideoError(f"{path}: the video {path.stem!r} is also there as {files[path.stem].name}; delete one")
      files[path.stem] = path
  return files


class VideoReader:
  """Decodes one video file; a context manager, used by one thread at a time.

  Iterating, or `read`, streams frames with flat memory; `frames_at` fetches single ones by seeking. What a
  damaged file still holds is delivered; frames that it lost are counted in `broken` and logged once a file.

  Attributes:
    path: the file.
    size: height and width of the delivered frames in pixels, after the rotation that the file asks for.
    fps: average frames a second, as the file says.
    duration: seconds as the file says, None where it does not.
    num_frames: number of frames as the file says, or an estimate, or None.
    broken: frames that were found damaged or missing until now.
  """

  def __init__(self, path: PathLike, *, threads: int = 0):
    """Opens the file and decodes its first frame.

    Args:
      path: any file that FFmpeg can open.
      threads: decoding threads; 0 chooses by the number of cores. Use 1 where many readers work side by side.

    Raises:
      VideoError: there is no such file, or nothing in it can be decoded.
    """
    self.path = Path(path)
    self.broken = 0
    self._threads = threads
    self._origin = 0
    self._skipped: set[float] = set()  # times of frames that were not decoded
    self._open()
    # Either may be the resolution of the time stamps instead.
    self.fps = float(min(filter(None, (self._stream.average_rate, self._stream.guessed_rate)), default=30))
    try:
      frame = next((frame for _, frame in self._decode()), None)
      if frame is None:
        raise VideoError(f"{path}: no frame can be decoded; the file is damaged, replace it")
      # Where the very first frames are lost, the stream's own start keeps the labels in place.
      start = self._stream.start_time
      self._origin = start if self.broken and start is not None else frame.pts or 0
      self._stored_size = frame.height, frame.width
      self._quarter_turns = round(frame.rotation / 90) % 4
      self.size = (frame.width, frame.height) if self._quarter_turns % 2 else self._stored_size
      self.broken = 0  # they are met again when the frames are read
      stream, container = self._stream, self._container
      self.duration = container.duration / av.time_base if container.duration else None
      self._stream_duration = self._duration_of_stream()
      self.duration = self._stream_duration or self.duration
      self.num_frames = stream.frames or (round(self.duration * self.fps) if self.duration else None)
    except BaseException:
      self._container.close()
      raise

  def __enter__(self) -> "VideoReader":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
    return self.read()

  def close(self) -> None:
    """Closes the file and logs what was found broken."""
    self._container.close()
    if self.broken and self.path not in _reported:
      _reported.add(self.path)
      logger.warning("%s: %d damaged or missing frames; their neighbours stand in", self.path, self.broken)

  def read(self, start: float = 0.0, stop: float = math.inf) -> Iterator[tuple[float, np.ndarray]]:
    """Streams the frames with ``start <= time < stop`` in presentation order.

    Yields:
      Time in seconds and the frame, ``[H, W, 3]`` uint8 RGB.
    """
    end = max(start, 0.0)  # of the last frame before the file ended
    gaps = _Gaps()
    told = self.broken
    for time, frame in self._decode_from(start):
      if time >= stop:
        return
      end = max(end, time + 1 / self.fps)
      if time >= start:
        # Packets that could not be decoded are among those that are missing.
        self.broken += max(gaps.missing(time) - (self.broken - told), 0)
        told = self.broken
        yield time, self._to_rgb(frame)
    if self._stream_duration is not None:
      missing = round((min(stop, self._stream_duration) - end) * self.fps)
      self.broken += max(missing, 0)

  def frames_at(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
    """The frames nearest to the given times.

    Args:
      times: ``[T]`` seconds, in any order, repeated or not; clamped to the video.

    Returns:
      ``[T, H, W, 3]`` uint8 RGB, equal to what a decode of the whole file gives.
    """
    wanted, positions = np.unique(np.asarray(times, np.float64), return_inverse=True)
    broken = self.broken
    # Of the decoders, H.264's passes over exactly the frames that no other one needs.
    shown = self._nearest_frames(wanted, skip=self._stream.codec_context.name == "h264")
    distance = np.abs(wanted - [time for time, _ in shown])
    skipped = np.array([*self._skipped, math.inf])
    # Rare: the rate varies, the clip ends with the video, or frames did not come out in order.
    if self.broken > broken or (np.abs(skipped - wanted[:, None]).min(axis=1) <= distance).any():
      self.broken = broken
      shown = self._nearest_frames(wanted, skip=False)
    images = np.empty((len(positions), *self.size, 3), np.uint8)
    for image, position in zip(images, positions, strict=True):
      image[:] = self._to_rgb(shown[position][1])
    return images

  def _nearest_frames(self, wanted: np.ndarray, *, skip: bool) -> list[tuple[float, av.VideoFrame]]:
    """The frames nearest to ascending times, and when they are shown; `skip` those that are far from all of these."""
    frames: Iterator[tuple[float, av.VideoFrame]] = iter(())
    window: list[tuple[float, av.VideoFrame]] = []  # the last frames decoded, at most two
    shown = []
    self._skipped.clear()
    for time in wanted:
      if not window or time - window[-1][0] > _SEEK_AHEAD:
        frames = self._decode_from(time, wanted if skip else None)
        window = list(itertools.islice(frames, 1))
        if not window:
          raise VideoError(f"{self.path}: no frame can be decoded; the file is damaged, replace it")
      while window[-1][0] < time and (following := next(frames, None)):
        window = [window[-1], following]
      shown.append(window[nearest(np.array([at for at, _ in window]), time)])
    return shown

  def frame_times(self) -> np.ndarray:
    """Presentation times of all frames in seconds, ``[F]`` ascending; decodes the whole file."""
    return np.array([time for time, _ in self._decode_from(0)])

  def last_time(self) -> float:
    """Seconds from the first frame to the last one, by the stamps of packets, whatever the header says."""
    self._container.seek(0)
    return max((self._seconds(packet.pts) for packet in self._packets() if packet.pts is not None), default=0.0)

  def _duration_of_stream(self) -> float | None:
    """Seconds of the video stream, where the file tells; sound may be longer."""
    if self._stream.duration:
      return float(self._stream.duration * self._time_base)
    if "matroska" not in self._container.format.name:
      return None
    # What Matroska calls durations are the times of ends.
    start = float(self._origin * self._time_base)
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", self._stream.metadata.get("DURATION", "")):
      return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) - start
    return self.duration - start if self.duration and len(self._container.streams) == 1 else None

  def _open(self) -> None:
    try:
      self._container = av.open(os.fspath(self.path), metadata_errors="replace")
    except FileNotFoundError:
      raise VideoError(f"{self.path}: no such file") from None
    except (av.error.FFmpegError, OSError) as error:
      reason = "the file is empty" if self.path.is_file() and not self.path.stat().st_size else error.strerror
      raise VideoError(f"{self.path}: not a readable video ({reason}); replace or re-encode it") from None
    streams = [s for s in self._container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
      self._container.close()
      raise VideoError(f"{self.path}: holds no video stream")
    self._stream = streams[0]
    if self._stream.codec_context is None:
      self._container.close()
      raise VideoError(f"{self.path}: FFmpeg has no decoder for its video; re-encode it as H.264")
    self._time_base = self._stream.time_base or Fraction(1, av.time_base)
    self._stream.thread_type = "AUTO"
    self._stream.codec_context.thread_count = self._threads

  def _decode_from(self, start: float, wanted: np.ndarray | None = None) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decodes from a keyframe on; the first frame is not later than `start`, if the file has such a frame.

    Args:
      start: seconds.
      wanted: ascending times; frames far from all of them that no other frame needs are skipped.
    """
    # MPEG program streams stamp only some frames, so that times after a seek are guesses.
    margin = math.inf if self._container.format.name == "mpeg" else 0.0
    while start - margin > 0:
      # Containers index by decoding time and hold damaged or missing keyframes: look, and go further back if
      # need be.
      try:
        self._container.seek(self._origin + int((start - margin) / self._time_base), stream=self._stream)
      except av.error.FFmpegError:
        break
      frames = self._decode(wanted, after_seek=True)
      first = next(frames, None)
      if first is not None and first[0] <= start:
        return itertools.chain([first], frames)
      margin = max(1.0, 4 * margin)
    self._container.close()
    self._open()
    return self._decode(wanted)

  def _decode(
    self, wanted: np.ndarray | None = None, after_seek: bool = False
  ) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decodes on from where the container stands, to the end."""
    last_time = -math.inf
    for packet in self._packets():
      if after_seek and (not packet.is_keyframe or packet.pts is None):
        continue  # without the keyframe before it, or a time to start from, it is of no use
      after_seek = False
      self._skip_if_far(packet, wanted)
      try:
        frames = packet.decode()
      except av.error.FFmpegError:
        self.broken += 1
        continue
      for frame in frames:
        if frame.pts is None:
          time = max(last_time, -1 / self.fps) + 1 / self.fps
        else:
          time = self._seconds(frame.pts)
          self._skipped.discard(time)
        if frame.is_corrupt or time <= last_time:
          self.broken += 1
        if time > last_time:
          last_time = time
          yield time, frame

  def _skip_if_far(self, packet: av.Packet, wanted: np.ndarray | None) -> None:
    """Lets the decoder pass over a frame that no other one needs, where it is far from all times that are wanted."""
    self._stream.codec_context.skip_frame = "DEFAULT"
    if wanted is None or packet.pts is None:
      return
    time = self._seconds(packet.pts)
    if abs(wanted[nearest(wanted, time)] - time) > _NEAR_FRAMES / self.fps:
      self._stream.codec_context.skip_frame = "NONREF"
      self._skipped.add(time)

  def _seconds(self, pts: int) -> float:
    return float((pts - self._origin) * self._time_base)

  def _packets(self) -> Iterator[av.Packet]:
    """Packets of the video stream; a damaged place is skipped where the container can."""
    errors = 0
    while errors < _MAX_READ_ERRORS:
      try:
        for packet in self._container.demux(self._stream):
          errors = 0
          yield packet
        return
      except IndexError:
        pass  # a packet of a stream that was not there at the start of the file, which PyAV does not expect
      except av.error.FFmpegError:
        errors += 1
        self.broken += 1

  def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
    height, width = self._stored_size  # a stream may change its size on the way
    try:
      image = frame.to_ndarray(format="rgb24", width=width, height=height)
    except (av.error.FFmpegError, OSError) as error:
      raise VideoError(f"{self.path}: a frame cannot be turned into RGB ({error.strerror}); re-encode it") from None
    return np.ascontiguousarray(np.rot90(image, self._quarter_turns)) if self._quarter_turns else image


class _Gaps:
  """Counts frames that are missing between others, as far as a video is regular."""

  def __init__(self) -> None:
    self._start = self._last = -math.inf  # of a run of frames at equal distances
    self._count = 0  # distances in it

  def missing(self, time: float) -> int:
    """Takes the time of the next frame; returns how many are missing before it."""
    gap, length = time - self._last, self._last - self._start
    self._last = time
    steps = round(gap * self._count / length) if self._count >= _REGULAR else 1
    if self._count and abs(gap * self._count - steps * length) <= 0.1 * length:
      self._count += steps
      return steps - 1
    self._start, self._count = (time - gap, 1) if math.isfinite(gap) else (time, 0)
    return 0


_reported: set[Path] = set()


class VideoFrames:
  """Frames straight out of a folder of videos, without preparation.

  Attributes:
    directory: the folder.
  """

  def __init__(self, directory: PathLike):
    """Looks into every file; those that cannot be read are logged and left out.

    Raises:
      VideoError: there is no such folder, or no video in it can be read.
    """
    self.directory = Path(directory)
    if not self.directory.is_dir():
      raise VideoError(f"{directory}: no such folder of videos")
    files = video_files(directory)
    self._videos: dict[str, tuple[Path, float | None]] = {}
    with ThreadPoolExecutor() as pool, progress.bar("Checking videos", len(files)) as advance:
      for (video, path), (duration, error) in zip(files.items(), pool.map(probe, files.values()), strict=True):
        if error:
          logger.warning("left out: %s", error)
        else:
          self._videos[video] = path, duration
        advance()
    if not self._videos:
      raise VideoError(f"{directory}: none of {len(files)} video files can be read; expected <video>.mp4 files")

  def covers(self, video: str, time: float) -> bool:
    """Whether a time lies in a video, as far as the file says how long it is."""
    if video not in self._videos:
      return False
    duration = self._videos[video][1]
    return time >= 0 and (duration is None or time <= duration)

  def frames(self, video: str, times: Sequence[float] | np.ndarray, short_side: float = math.inf) -> np.ndarray:
    """The frames nearest to the given times, see `VideoReader.frames_at`; always as large as they are.

    Raises:
      VideoError: there is no such video, or it cannot be read any more.
    """
    if video not in self._videos:
      raise VideoError(f"{self.directory}: no video {video!r}")
    with VideoReader(self._videos[video][0], threads=1) as reader:
      return reader.frames_at(times)


def probe(path: PathLike) -> tuple[float | None, VideoError | None]:
  """Seconds of a video, None where the file does not say; and the error where it cannot be read."""
  try:
    with VideoReader(path, threads=1) as reader:
      return reader.duration, None
  except VideoError as error:
    return None, error


class VideoWriter:
  """Writes an H.264 mp4 that plays everywhere (yuv420p, BT.709, index in front); a context manager.

  The file appears under its name when it is complete; after an error nothing is left. H.264 needs even sizes,
  so an odd one grows by a repeated row or column. The same frames give the same file on any number of cores.
  """

  def __init__(
    self,
    path: PathLike,
    *,
    size: tuple[int, int],
    fps: float,
    audio_from: PathLike | None = None,
    fragmented: bool = False,
  ):
    """Starts a file.

    Args:
      path: ends in ``.mp4``; its folder is made.
      size: height and width of the frames.
      fps: frames a second.
      audio_from: a video whose sound is taken over, where it has any; time zero is its first frame, the end
        ours.
      fragmented: the file is under its name from the start, stays there after an error, and can be played at any time
        up to the last second or so.

    Raises:
      VideoError: the folder cannot be written.
    """
    self.path = Path(path)
    self.size = tuple(size)
    self._fragmented = fragmented
    self._partial = self.path if fragmented else self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
    flags = "+frag_keyframe+empty_moov+default_base_moof" if fragmented else "+faststart"
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      options = {"movflags": flags, "flush_packets": "1"}
      self._container = av.open(os.fspath(self._partial), "w", format="mp4", options=options)
    except OSError as error:
      raise VideoError(f"{path}: cannot be written ({error.strerror})") from None
    self._pts = -1
    self._audio = None
    self._reformatter = VideoReformatter()
    try:
      self._start(Fraction(fps).limit_denominator(1001))
      if audio_from is not None:
        self._audio = _sound(audio_from, self._container)
    except BaseException:
      self._finish(keep=False)
      raise

  def __enter__(self) -> "VideoWriter":
    return self

  def __exit__(self, exc_type, exc, traceback) -> None:
    self._finish(keep=self._fragmented or exc_type is None)

  def write(self, frame: np.ndarray, time: float | None = None) -> None:
    """Adds a frame.

    Args:
      frame: ``[H, W, 3]`` uint8 RGB.
      time: seconds at which it is shown, for a variable frame rate; by default one frame after the last.

    Raises:
      ValueError: shape or type differ from what was announced, or the time does not grow.
    """
    if frame.shape != (*self.size, 3) or frame.dtype != np.uint8:
      expected = (*self.size, 3)
      raise ValueError(f"{self.path}: a frame is {frame.dtype} {frame.shape}; expected uint8 {expected}")
    following = self._pts + self._ticks if self._pts >= 0 else 0
    pts = following if time is None else round(time / self._time_base)
    if pts <= self._pts:
      raise ValueError(f"{self.path}: frame times must grow; got {time} s")
    self._pts = pts
    if self.size[0] % 2 or self.size[1] % 2:
      frame = np.pad(frame, [(0, self.size[0] % 2), (0, self.size[1] % 2), (0, 0)], mode="edge")
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    picture = self._reformatter.reformat(
      picture, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    picture.pts, picture.time_base, picture.duration = pts, self._time_base, self._ticks
    self._container.mux(self._stream.encode(picture))
    if self._audio:
      self._audio.copy_until(float(pts * self._time_base))

  def _start(self, rate: Fraction) -> None:
    self._ticks = math.ceil(90_000 / rate.numerator) * rate.denominator  # in one frame
    self._time_base = 1 / (rate * self._ticks)
    # x264's macroblock tree makes the same frames give different files now and then.
    options = {"crf": "20", "preset": "veryfast", "mbtree": "0"}
    if self._fragmented:
      options["g"] = str(math.ceil(rate))  # a fragment begins with each keyframe
    stream = self._container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = (side + side % 2 for side in self.size)
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = self._time_base
    context.thread_count = 4  # x264's output depends on it
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    self._stream = stream

  def _finish(self, keep: bool) -> None:
    try:
      if keep:
        if self._pts < 0:
          raise VideoError(f"{self.path}: no frame was written")
        self._container.mux(self._stream.encode(None))
        if self._audio:
          self._audio.copy_until(float((self._pts + self._ticks) * self._time_base))
          self._audio.finish()
        self._container.close()
        os.replace(self._partial, self.path)  # which is nothing to do for fragments
    finally:
      if self._audio:
        self._audio.close()
      with contextlib.suppress(av.error.FFmpegError, OSError, ValueError):
        self._container.close()
      if not (keep and self._fragmented):
        self._partial.unlink(missing_ok=True)


def _sound(path: PathLike, target: av.container.OutputContainer) -> SoundCopy:
  try:
    return SoundCopy(path, target)
  except (av.error.FFmpegError, OSError) as error:
    raise VideoError(f"{path}: its sound cannot be read ({error.strerror})") from None
