"""Finds the actions in a camera or a stream while it runs; what ``python -m vad_jax.predict --video 0`` does.

A thread reads the source as fast as it delivers, and keeps the newest seconds only. Whenever the model is free, it
takes the keyframe that is due, or the newest one where it is late. So a model that is too slow skips keyframes, and
frames are dropped instead of queued: memory and delay stay bounded, the delay by the half of a clip that comes after
its keyframe and about three times the time that the model takes. A model for tubes, which answers for every frame,
takes the next frames in a row, or the newest ones where it is more than a clip late: those between have no answer.
"""

import bisect
import collections
import contextlib
import json
import math
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import cv2
import numpy as np

from vad_jax.batch import Detections
from vad_jax.checkpoint import Loaded
from vad_jax.datasets.video import VideoError, VideoWriter, nearest
from vad_jax.detect import Clip, Detector
from vad_jax.person_boxes import PersonBoxes, Tracker
from vad_jax.predictions import KeyframeDetections, Selection, draw_between, keyframe_as_json

_SILENCE = 10.0  # seconds without data after which a stream is lost
_LATE = 0.5  # seconds; the most by which a keyframe may be behind the newest possible one
_LONGEST_JUMP = 60.0  # seconds; time stamps that jump further, or back, are those of a source that began anew
_KEPT = 3.0  # seconds of frames that are kept besides those of a clip
_MARGIN = 0.5  # seconds before they are forgotten, in which frames are drawn in any case
_SHORTEST_STRIDE = 1e-3
_FPS = 30.0  # nominal; each frame is written with its own time


def is_live(video: str) -> bool:
  """Whether this names a camera (a number) or a stream (a URL) and not a file."""
  return bool(re.fullmatch(r"\d+|(?!file:)[a-zA-Z][a-zA-Z0-9+.-]+://.*", video))


def shown_name(video: str) -> str:
  """Name of a live source without what is nobody's business: user, password and query."""
  if video.isdigit():
    return f"camera {video}"
  url = urllib.parse.urlsplit(video)
  return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


class _Frame(NamedTuple):
  """A frame of a live source: how many came before, its time, when it arrived (monotonic clock), and the picture."""

  number: int
  time: float
  arrived: float
  picture: Any  # [H, W, 3] RGB, or av.VideoFrame

  def rgb(self, size: tuple[int, int]) -> np.ndarray:
    if isinstance(self.picture, np.ndarray):
      return self.picture
    return self.picture.to_ndarray(format="rgb24", height=size[0], width=size[1])


class LiveSource:
  """Reads a camera or a stream in a thread; a context manager.

  Attributes:
    size: height and width of the first frame, which all get.
    count: frames that came until now.
    kept_seconds: how long a frame is kept.
    lost: why nothing comes any more, None after a regular end.
  """

  def __init__(self, video: str):
    """Waits for the first frame.

    Raises:
      VideoError: there is no such source, or it sends no video.
    """
    self._pictures = _camera(int(video)) if video.isdigit() else _stream(video)
    self._frames: collections.deque[_Frame] = collections.deque()
    self._changed = threading.Condition()
    self._origin, self._ended, self._closed = 0.0, False, False
    self.kept_seconds, self._kept_frames = 0.0, 1
    self.count, self.lost = 0, None
    first = next(self._pictures, None)
    if first is None:
      raise VideoError(f"{shown_name(video)}: no picture came")
    self._add(*first)
    self.size = first[1].shape[:2] if isinstance(first[1], np.ndarray) else (first[1].height, first[1].width)

  def start(self, seconds: float, frames: int) -> None:
    """Begins to read; keeps the newest frames, of so many seconds and so many at least."""
    self.kept_seconds, self._kept_frames = seconds, frames
    threading.Thread(target=self._read, daemon=True).start()

  def __enter__(self) -> "LiveSource":
    return self

  def __exit__(self, *exc_info) -> None:
    self._closed = True

  def after(self, moment: float) -> list[_Frame]:
    """The kept frames later than this, the newest one at the end."""
    with self._changed:
      return [frame for frame in self._frames if frame.time > moment]

  def rebase(self, moment: float) -> None:
    """Makes this time zero."""
    with self._changed:
      self._origin += moment
      self._frames = collections.deque(frame._replace(time=frame.time - moment) for frame in self._frames)

  def wait(self, count: int) -> bool:
    """Waits until more frames than this came, a tenth of a second at most; False where no more will come."""
    with self._changed:
      self._changed.wait_for(lambda: self.count > count or self._ended, timeout=0.1)
      return not self._ended or self.count > count

  def _read(self) -> None:
    try:
      for stamp, picture in self._pictures:
        self._add(stamp, picture)
        if self._closed:
          break
    except VideoError as error:
      self.lost = error
    finally:
      with self._changed:
        self._ended = True
        self._changed.notify_all()

  def _add(self, stamp: float | None, picture: Any) -> None:
    with self._changed:
      last = self._frames[-1].time if self._frames else -1 / _FPS
      moment = math.nan if stamp is None else stamp - self._origin
      if not last < moment < last + _LONGEST_JUMP:
        moment = last + 1 / _FPS
        self._origin = moment if stamp is None else stamp - moment
      self._frames.append(_Frame(self.count, moment, time.monotonic(), picture))
      while len(self._frames) > self._kept_frames and self._frames[0].time < moment - self.kept_seconds:
        self._frames.popleft()
      self.count += 1
      self._changed.notify_all()


def _camera(index: int) -> Iterator[tuple[float, np.ndarray]]:
  """Time and picture of what a camera shows.

  Raises:
    VideoError: there is no such camera, or it went away.
  """
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would tell about a missing camera, too
  capture = cv2.VideoCapture(index)
  try:
    if not capture.isOpened():
      raise VideoError(f"camera {index}: there is none, or another program uses it")
    while True:
      shown, picture = capture.read()
      if not shown:
        raise VideoError(f"camera {index}: gives no more pictures")
      yield time.monotonic(), picture[..., ::-1]
  finally:
    capture.release()


def _stream(url: str) -> Iterator[tuple[float | None, av.VideoFrame]]:
  """Time, where it is known, and picture of what comes from a URL; damaged packets are passed over.

  Raises:
    VideoError: nothing comes from there, or no more.
  """
  try:
    with av.open(url, options={"rtsp_transport": "tcp"}, timeout=_SILENCE, metadata_errors="replace") as container:
      if not container.streams.video:
        raise VideoError(f"{shown_name(url)}: holds no video stream")
      for packet in container.demux(video=0):
        try:
          for frame in packet.decode():
            yield frame.time, frame
        except av.error.InvalidDataError:
          continue
  except av.error.ExitError:
    raise VideoError(f"{shown_name(url)}: nothing came for {_SILENCE:g} seconds") from None
  except (av.error.FFmpegError, OSError) as error:
    raise VideoError(f"{shown_name(url)}: {error.strerror}") from None


class Answer(NamedTuple):
  """What was found in one clip.

  Attributes:
    keyframes: one, or of a model for tubes each frame of the clip. Time zero is the first one of all.
    delay: seconds since the (last) keyframe arrived.
  """

  keyframes: list[KeyframeDetections]
  delay: float


class LiveReport(NamedTuple):
  """What became of a live source.

  Attributes:
    seconds: how long it was watched.
    frames: how many came, also while the model was compiled.
    drawn: how many of them are in the annotated video.
    keyframes: how many were answered.
    skipped: keyframes (of a model for tubes: frames) between these that were not answered for want of time.
    delay: the longest time from the arrival of a keyframe to its answer, in seconds.
    json: an object for each keyframe, one a line, as in the JSON of a file.
    video: annotated video, or None.
    lost: why the source was lost, None where it ended or was left.
  """

  seconds: float
  frames: int
  drawn: int
  keyframes: int
  skipped: int
  delay: float
  json: Path
  video: Path | None
  lost: VideoError | None


def watch(
  loaded: Loaded,
  video: str,
  output_dir: str | Path,
  selection: Selection,
  *,
  people_from: Loaded | None = None,
  stride: float | None = 1.0,
  draw: bool = True,
  seconds: float = math.inf,
  stop: threading.Event | None = None,
  on_answer: Callable[[Answer], None] = lambda answer: None,
) -> LiveReport:
  """Finds the actions in a live source until it ends, and writes JSON lines and the annotated video as it goes.

  What is written can be used at any time. The names of the files are those of the source and the time of day.

  Args:
    loaded: the model.
    video: number of a camera, or a URL that FFmpeg can read.
    output_dir: where to write.
    selection: what is reported.
    people_from: finds the people, for a model that classifies given ones.
    stride: seconds between keyframes; None takes as many as the model manages. Models for tubes answer for every frame.
    draw: write the annotated video as well.
    seconds: how long to watch.
    stop: ends it, too.
    on_answer: called with what was found in each clip.

  Raises:
    ValueError: the model classifies given people and there are none, or the other way round.
    VideoError: the source sends no video, or the output cannot be written.
    OSError: the output directory cannot be written.
  """
  if getattr(loaded.model, "takes_proposals", False) != (people_from is not None):
    need = "finds people itself: leave --boxes out" if people_from else "needs a model that finds people, see --boxes"
    raise ValueError(f"{loaded.info['model']['name']} {need}")
  stem = f"{re.sub(r'[^a-zA-Z0-9]+', '_', shown_name(video)).strip('_')}_{time.strftime('%Y%m%d_%H%M%S')}"
  json_path, video_path = (Path(output_dir) / f"{stem}{ending}" for ending in ("_detections.jsonl", ".mp4"))
  json_path.parent.mkdir(parents=True, exist_ok=True)
  with LiveSource(video) as source, contextlib.ExitStack() as files:
    watcher = _Watcher(loaded, people_from, source, selection, stride)
    lines = files.enter_context(json_path.open("w", encoding="utf-8", buffering=1))
    recorder = _Recorder(source, video_path, files) if draw else None
    begun, keyframes, delay = time.monotonic(), 0, 0.0
    while time.monotonic() - begun < seconds and not (stop and stop.is_set()):
      count = source.count
      answer = watcher.answer()
      if answer:
        lines.writelines(json.dumps(keyframe_as_json(k), ensure_ascii=False) + "\n" for k in answer.keyframes)
        keyframes, delay = keyframes + len(answer.keyframes), max(delay, answer.delay)
        on_answer(answer)
      elif not source.wait(count):
        break
      if recorder:
        recorder.draw(answer.keyframes if answer else [])
    if recorder:
      recorder.draw([], finish=True)
    return LiveReport(
      *(time.monotonic() - begun, source.count, recorder.count if recorder else 0, keyframes, watcher.skipped, delay),
      *(json_path, video_path if recorder and recorder.count else None, source.lost),
    )


class _Watcher:
  """Takes the newest clip of a live source whenever it is asked.

  Attributes:
    skipped: see `LiveReport`.
  """

  def __init__(
    self, loaded: Loaded, people_from: Loaded | None, source: LiveSource, selection: Selection, stride: float | None
  ):
    """Lets the source begin, and compiles the model meanwhile."""
    self._source, self._selection, self._stride = source, selection, stride
    self._tracker, self._last, self._last_number, self.skipped = Tracker(), None, 0, 0
    self._detector, *self._finder = (
      Detector(model.model, model.info, source.size, batch_size=1, with_maps=False)
      for model in (loaded, people_from)
      if model is not None
    )
    if any(finder.tubes for finder in self._finder):
      raise ValueError("--boxes: a model for tubes cannot find the people of a live source; name one for keyframes")
    self._length = len(self._detector.offsets)
    offsets = np.concatenate([detector.offsets for detector in (self._detector, *self._finder)])
    self._ahead = float(offsets.max())
    source.start(_KEPT + float(np.ptp(offsets)), 3 * self._length if self._detector.tubes else 1)
    self._find(np.zeros(self._length if self._detector.tubes else 1), source.after(-math.inf)[:1])

  def answer(self) -> Answer | None:
    """What is found in the clip whose turn it is; None where it has not come yet."""
    frames = self._source.after(-math.inf)
    times = self._next_frames(frames) if self._detector.tubes else self._next_keyframe(frames[-1].time)
    if times is None:
      return None
    if self._last is None:
      self._source.rebase(times[0])
      frames, times = self._source.after(-math.inf), times - times[0]
    keyframes = [
      self._selection.keyframe(moment, found, self._selection.slots(found), self._tracker)
      for moment, found, _ in self._find(times, frames)
    ]
    answered = frames[nearest(np.array([frame.time for frame in frames]), times[-1])]
    self._last, self._last_number = float(times[-1]), answered.number
    return Answer(keyframes, time.monotonic() - answered.arrived)

  def _next_keyframe(self, newest: float) -> np.ndarray | None:
    """Time of the next keyframe ``[1]``."""
    possible = newest - self._ahead
    if self._last is None:
      return np.array([possible]) if possible >= 0 else None
    due = self._last + (self._stride or _SHORTEST_STRIDE)
    if possible < due:
      return None
    if self._stride is None:
      return np.array([possible])
    moment = due if possible - due <= min(self._stride, _LATE) else possible
    self.skipped += max(round((moment - self._last) / self._stride) - 1, 0)
    return np.array([moment])

  def _next_frames(self, frames: list[_Frame]) -> np.ndarray | None:
    """Times of the frames of the next clip ``[T]``."""
    new = [frame for frame in frames if self._last is None or frame.time > self._last]
    if len(new) < self._length:
      return None
    chosen = new[: self._length] if len(new) <= 2 * self._length else new[-self._length :]
    if self._last is not None:
      self.skipped += chosen[0].number - self._last_number - 1
    return np.array([frame.time for frame in chosen])

  def _find(self, times: np.ndarray, frames: list[_Frame]) -> list[tuple[float, Detections, Any]]:
    """Detections at these times, in clips of the frames nearest to what each model wants."""
    shown_at = np.array([frame.time for frame in frames])

    def clip(detector: Detector) -> Clip:
      wanted = times if detector.tubes else times[0] + detector.offsets
      pictures = [frames[nearest(shown_at, moment)].rgb(self._source.size) for moment in wanted]
      moments = [(float(moment), place) for place, moment in enumerate(times)]
      return moments, np.stack([detector.place(picture) for picture in pictures])

    people = None
    for finder in self._finder:
      ((_, found, _),) = finder.answer([clip(finder)], None)
      slots = self._selection.slots(found)
      people = PersonBoxes("", times, [found.boxes[slots]], [found.actor_score[slots]])
    return list(self._detector.answer([clip(self._detector)], people))


class _Recorder:
  """Writes the frames of a live source with what was found; evenly fewer of them where there is no time for all.

  Attributes:
    count: frames written.
  """

  def __init__(self, source: LiveSource, path: Path, files: contextlib.ExitStack):
    self._source, self._path, self._files = source, path, files
    self._writer: VideoWriter | None = None
    self._now: list[KeyframeDetections] = []  # the last keyframe, if there was one
    self._done, self._finished = -math.inf, time.monotonic()  # until where it is drawn, and since when
    self._cost = 0.0  # seconds for one frame
    self.count = 0

  def draw(self, keyframes: list[KeyframeDetections], *, finish: bool = False) -> None:
    """Draws up to the last of new keyframes; without any what can wait no longer, or all that is left."""
    shown = [*self._now, *keyframes]
    frames = self._source.after(self._done)
    if not shown or not frames:
      return
    old = frames[-1].time - self._source.kept_seconds + _MARGIN
    until = math.inf if finish else keyframes[-1].time if keyframes else old
    frames = [frame for frame in frames if shown[0].time <= frame.time < until]
    # Half of the time goes to the model and to reading.
    begun = time.monotonic()
    step = 1 if finish else max(math.ceil(len(frames) * self._cost / max((begun - self._finished) / 2, 1e-3)), 1)
    times = [keyframe.time for keyframe in shown]
    for frame in frames[::step]:
      index = bisect.bisect_right(times, frame.time) - 1
      drawn = draw_between(frame.time, frame.rgb(self._source.size), *shown[index : index + 2])
      if self._writer is None:
        self._writer = self._files.enter_context(
          VideoWriter(self._path, size=drawn.shape[:2], fps=_FPS, fragmented=True)
        )
      self._writer.write(drawn, frame.time)
      self.count += 1
    self._now = shown[-1:]
    if frames:
      self._done, self._finished = frames[-1].time, time.monotonic()
      self._cost = (self._finished - begun) / len(frames[::step])
