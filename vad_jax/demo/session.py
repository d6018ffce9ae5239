"""What the page keeps for a visitor: the video, what was found in it, and the files to look at and to download."""

import contextlib
import shutil
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from vad_jax import predict, visualize
from vad_jax.batch import Detections
from vad_jax.checkpoint import Loaded
from vad_jax.datasets.video import VideoError, VideoReader
from vad_jax.person_boxes import Tracker
from vad_jax.predictions import KeyframeDetections, Prediction, Selection, annotate, write_csv, write_json

LEAST_SCORE = 0.1  # of people and actions that can be chosen without running the model again
_NMS = 0.7
_TOP_K = 3
_DETECTING = 0.8  # share of the work; the rest is drawing


class DemoError(ValueError):
  """What the visitor is told."""


class StoppedError(Exception):
  """The visitor cancelled the work or left."""


class Limits(NamedTuple):
  """Of a video: length in seconds, size of the file in megabytes (of 2^20 bytes)."""

  seconds: float
  megabytes: float

  @property
  def size(self) -> int:
    """Of the file in bytes."""
    return int(self.megabytes * 2**20)


class Video(NamedTuple):
  """A video that can be worked on: the file, length in seconds, height and width, frames a second."""

  path: Path
  seconds: float
  size: tuple[int, int]
  fps: float


def check(path: Path, limits: Limits) -> Video:
  """Looks at a video before any work is done.

  Raises:
    DemoError: it is empty, too large, too long or cannot be decoded.
  """
  size = path.stat().st_size if path.is_file() else 0
  if not size:
    raise DemoError(f"{path.name} is empty. Choose another file.")
  if size > limits.size:
    raise DemoError(f"{path.name} has {size / 2**20:.1f} MB; at most {limits.megabytes:g} MB are taken.")
  with _named_for_visitors(path), VideoReader(path) as reader:
    duration = max(reader.duration or 0.0, reader.last_time())  # what a browser recorded does not say it, others lie
    if duration > limits.seconds:
      raise DemoError(f"{path.name} is {duration:.0f} s long; at most {limits.seconds:g} s are taken. Cut it.")
    return Video(path, duration, reader.size, reader.fps)


class Session:
  """One visitor's folder and what was found last. Its methods may be called by several threads."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._working = threading.Lock()
    self._stop = threading.Event()
    self._closed = False
    self._model: Loaded | None = None
    self._video: Video | None = None
    self._found: Prediction | None = None  # all from the least score up
    self._shown: Prediction | None = None

  def find(
    self,
    model: Loaded,
    finder: Loaded | None,
    video: Video,
    thresholds: tuple[float, float],
    on_progress: Callable[[float], None],
  ) -> Prediction:
    """Runs a model on a video and writes what is above the thresholds.

    Args:
      model: what to run.
      finder: what finds the people, for a model that classifies given ones.
      video: see `check`.
      thresholds: lowest score of a person, and of an action.
      on_progress: see `predict.predict_video`.

    Raises:
      DemoError: it did not work.
      StoppedError: `stop` was called.
    """
    with self._at_work():
      self._found = self._shown = None
      folder = self._fresh_folder("found")
      with _named_for_visitors(video.path):
        # Without actions no pictures of them are written: these are made when they are looked at.
        self._found = predict.predict_video(
          *(model, video.path, folder),
          boxes=finder if getattr(model.model, "takes_proposals", False) else None,
          actor_threshold=LEAST_SCORE,
          action_threshold=1.0,
          nms=_NMS,
          draw=False,
          save_maps=hasattr(model.model, "maps"),
          on_progress=self._watched(lambda share: on_progress(_DETECTING * share)),
        )
      self._model, self._video = model, video
      return self._choose(thresholds, lambda share: on_progress(_DETECTING + (1 - _DETECTING) * share))

  def choose(
    self, thresholds: tuple[float, float], on_progress: Callable[[float], None]
  ) -> tuple[Prediction, float] | None:
    """Writes what is above other thresholds, without running the model.

    Returns:
      The same as `find` and the seconds of the video, or None where nothing was found before.

    Raises:
      StoppedError: `stop` was called.
    """
    with self._at_work():
      if not self._found or not self._video:
        return None
      return self._choose(thresholds, on_progress), self._video.seconds

  def _choose(self, thresholds: tuple[float, float], on_progress: Callable[[float], None]) -> Prediction:
    model, found, video = self._model, self._found, self._video
    assert model and found and video
    selection = Selection(model.info["label_map"], *thresholds, top_k=_TOP_K, nms=_NMS)
    tracker = Tracker()
    result = found._replace(keyframes=[_select(keyframe, selection, tracker) for keyframe in found.keyframes])
    if found.tubes is not None:
      result = result._replace(tubes=predict.link_tubes(result))
    folder, stem = self._fresh_folder("shown"), video.path.stem
    result = result._replace(
      csv=folder / f"{stem}_detections.csv", json=folder / f"{stem}_detections.json", video=folder / f"{stem}.mp4"
    )
    assert result.csv and result.json and result.video
    write_csv(result, result.csv)
    settings = dict(zip(("actor_threshold", "action_threshold"), thresholds, strict=True))
    # The folders of the server are nobody's business.
    write_json(
      result._replace(source=Path(video.path.name)), result.json, model.info, {**settings, "top_k": _TOP_K, "nms": _NMS}
    )
    annotate(result, result.video, self._watched(on_progress))
    self._shown = result
    return result

  def look(self, person: int, action: int | None, time: float) -> tuple[Path, str]:
    """Draws where the model looked.

    Args:
      person: number of a person.
      action: id of an action; None takes the best one of the person.
      time: seconds; the last keyframe until then counts.

    Returns:
      The picture, and what it shows.

    Raises:
      DemoError: there is no such picture.
    """
    model, shown = self._model, self._shown
    if not model or not shown:
      raise DemoError("Find the actions of a video first.")
    name = model.info["model"]["name"]
    if not shown.maps:
      raise DemoError(f"{name} has no attention maps to show.")
    times = sorted(float(path.stem) for path in shown.maps.glob("*.png"))
    time = times[max(bisect_right(times, time + 1e-3) - 1, 0)]
    sheet = shown.maps / f"{time:08.3f}.png"
    if not sheet.with_suffix(".npz").exists():
      return (
        sheet,
        f"What {name} saw at {time:.1f} s: its maps of the whole frame, all boxes, and those that were kept.",
      )
    keyframe = min(shown.keyframes, key=lambda keyframe: abs(keyframe.time - time))
    index = np.flatnonzero(keyframe.person == person)
    if not len(index):
      raise DemoError(f"Person {person} was not found at {time:.1f} s.")
    box, scores = keyframe.boxes[index[0]], keyframe.action_score[index[0]]
    labels = model.info["label_map"]
    action = action or max(labels, key=lambda label: scores[label - 1])
    arrays = np.load(sheet.with_suffix(".npz"))
    row = int((arrays["boxes"] == box).all(1).argmax())
    with VideoReader(shown.source) as reader:
      frame = reader.frames_at([time])[0]
    caption = f"{labels[action]} {scores[action - 1]:.2f}"
    attention = arrays["attention"][row]  # of each class, or one for all
    of_classes = len(attention) > 1
    picture = visualize.attention_picture(
      *(frame, attention[action - 1 if of_classes else 0], box, caption, visualize.color_of(person - 1)),
      size=shown.size,
    )
    assert shown.video
    path = shown.video.with_name(f"person{person}_class{action}_{time:08.3f}.png")
    cv2.imwrite(str(path), picture[..., ::-1])
    judged = f"judge “{labels[action]}” of" if of_classes else "classify"
    return path, f"Where {name} looked to {judged} person {person} at {time:.1f} s: bright is most."

  def stop(self) -> None:
    """Stops the work soon."""
    self._stop.set()

  def close(self) -> None:
    """Stops the work, waits for that, and removes the folder."""
    self._closed = True
    self._stop.set()
    with self._working:
      shutil.rmtree(self._folder, ignore_errors=True)

  @contextlib.contextmanager
  def _at_work(self) -> Iterator[None]:
    with self._working:
      if self._closed:
        raise StoppedError
      self._stop.clear()
      yield

  def _watched(self, on_progress: Callable[[float], None]) -> Callable[[float], None]:
    def watch(share: float) -> None:
      if self._stop.is_set():
        raise StoppedError
      on_progress(share)

    return watch

  def _fresh_folder(self, kind: str) -> Path:
    """A folder with a new name, so that no browser shows an old file; what was there of this kind is removed."""
    self._folder.mkdir(exist_ok=True)
    for old in self._folder.glob(f"{kind}_*"):
      shutil.rmtree(old)
    return Path(tempfile.mkdtemp(prefix=f"{kind}_", dir=self._folder))


class Sessions:
  """The visitors that are there, by the key that each browser tab has.

  Args:
    root: folder of everything, also of uploads; nothing outside is ever removed.
  """

  def __init__(self, root: Path):
    self._root = root.resolve()
    self._open: dict[str, Session] = {}
    self._uploads: dict[str, set[Path]] = {}
    self._lock = threading.Lock()

  def of(self, key: str) -> Session:
    """The session of a visitor, a new one at first."""
    with self._lock:
      if key not in self._open:
        self._open[key] = Session(Path(tempfile.mkdtemp(prefix="visitor_", dir=self._root)))
      return self._open[key]

  def keep(self, key: str, video: Path) -> None:
    """Remembers a visitor's upload, to remove it in the end; samples lie outside of the root and are not uploads."""
    video = video.resolve()
    if video.is_relative_to(self._root):
      with self._lock:
        self._uploads.setdefault(key, set()).add(video)

  def close(self, key: str) -> None:
    """Removes all that is left of a visitor; equal uploads of others are one file, which stays."""
    with self._lock:
      session = self._open.pop(key, None)
      uploads = self._uploads.pop(key, set()).difference(*self._uploads.values())
    if session:
      session.close()
    for upload in uploads:
      upload.unlink(missing_ok=True)

  def close_all(self) -> None:
    """Stops all work."""
    for key in list(self._open):
      self.close(key)


def _select(keyframe: KeyframeDetections, selection: Selection, tracker: Tracker) -> KeyframeDetections:
  valid = np.ones(len(keyframe.boxes), bool)
  found = Detections(keyframe.boxes, keyframe.actor_score, keyframe.action_score, valid)
  return selection.keyframe(keyframe.time, found, selection.slots(found), tracker)


@contextlib.contextmanager
def _named_for_visitors(path: Path) -> Iterator[None]:
  """Turns what is wrong with a video into a message without folders of the server."""
  try:
    yield
  except VideoError as error:
    raise DemoError(str(error).replace(str(path), path.name)) from None
