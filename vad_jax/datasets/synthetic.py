"""A synthetic action detection set: articulated people who do what AVA's classes say, as real H.264 videos.

`make` renders it, and `python -m vad_jax.datasets.synthetic --help` does from a shell. Layout of the result::

  videos/{train,val}/<video_id>.mp4
  annotations/{train,val}.csv           AVA CSV with person ids, at every whole second but the first and last
  annotations/{train,val}_tubes.json    boxes at every frame, see `make`
  annotations/label_map.pbtxt           the classes of the set, by AVA's ids and names
  dataset.json                          what it was made with; written last

Motion, not the single frame, tells many classes apart: people stand as if caught in a stride, or hold an arm
up as if to wave; at level "full" they also hold a hand at the ear without a telephone, and putting down is
picking up run backward.
"""

import argparse
import concurrent.futures.process
import itertools
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from vad_jax import annotations, progress
from vad_jax.datasets import figures, scenes
from vad_jax.datasets.video import VideoReader, VideoWriter

LABEL_MAP = Path(__file__).parent / "labels" / "ava_v2.2.pbtxt"
SPLITS = ("train", "val")
_REVISION = 1  # counts up with any change of what `make` writes, so that older sets are not taken for it


class _Settings(NamedTuple):
  """Everything that a set's bytes follow from, but for the number of videos."""

  level: str
  size: tuple[int, int]  # width, height
  seconds: int
  fps: float
  seed: int


class _Made(NamedTuple):
  """What one video's annotation files say."""

  video: str
  rows: list[tuple[int, np.ndarray, int, int]]  # timestamp, box, class id, person id
  tubes: dict[str, Any]


def make(
  directory: annotations.PathLike,
  *,
  level: str = "easy",
  num_train: int = 600,
  num_val: int = 120,
  size: tuple[int, int] = (160, 120),
  seconds: int = 6,
  fps: float = 25,
  seed: int = 0,
  workers: int | None = None,
) -> None:
  """Renders a set, or what is missing of it; returns at once where it is complete.

  A video follows from the settings, its split and its index alone, on any number of workers.

  The tubes file holds ``{video: {"fps": f, "num_frames": n, "size": [height, width], "tubes": [tube, ...]}}``
  with a tube ``{"person_id": p, "boxes": [[frame, x1, y1, x2, y2], ...], "labels": [label, ...]}`` and a
  label ``{"id": k, "start_frame": a, "end_frame": b}`` that holds for frames a to b - 1. Boxes are
  normalised and surround the whole body, as far as it is inside the picture; what others hide of it counts.

  Args:
    directory: of the set; made where there is none.
    level: "easy" (one or two large people, one act each) or "full" (one to four, who change what they do).
    num_train: number of training videos.
    num_val: number of held-out videos.
    size: width and height of the videos in pixels.
    seconds: length of each video.
    fps: frames a second.
    seed: another one gives another set.
    workers: processes; as many as there are cores where None.

  Raises:
    ValueError: an argument is out of its range, or the directory holds another set.
    RuntimeError: a worker process was killed.
  """
  _check(level, num_train, num_val, size, seconds, fps, seed, workers)
  settings = _Settings(level, (int(size[0]), int(size[1])), int(seconds), float(fps), int(seed))
  directory = Path(directory)
  done, plan = directory / "dataset.json", directory / ".dataset.json.part"
  wanted = {
    "kind": "synthetic",
    "revision": _REVISION,
    **settings._asdict(),
    "num_train": num_train,
    "num_val": num_val,
  }
  wanted = json.loads(json.dumps(wanted))
  for manifest in (done, plan):
    _same_set(manifest, wanted)
  if done.exists():
    return
  if not plan.exists() and (directory / "videos").exists():
    raise ValueError(f"{directory}: holds videos of something else; give an empty or new directory")
  for split in SPLITS:
    (directory / "videos" / split).mkdir(parents=True, exist_ok=True)
    for leftover in (directory / "videos" / split).glob(".*.part"):
      leftover.unlink()
  (directory / "annotations").mkdir(exist_ok=True)
  plan.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
  tasks = [
    (settings, directory, split, i) for split, n in zip(SPLITS, (num_train, num_val), strict=True) for i in range(n)
  ]
  made = _make_all(tasks, min(workers or _num_cores(), len(tasks)))
  for split, videos in zip(SPLITS, (made[:num_train], made[num_train:]), strict=True):
    _write_annotations(directory / "annotations", split, videos)
  names = annotations.read_label_map(LABEL_MAP)
  label_map = {class_id: names[class_id] for class_id in scenes.classes(level)}
  annotations.write_label_map(directory / "annotations" / "label_map.pbtxt", label_map)
  os.replace(plan, done)


def _check(level, num_train, num_val, size, seconds, fps, seed, workers) -> None:
  if level not in scenes.LEVELS:
    raise ValueError(f"level {level!r} is none of {', '.join(scenes.LEVELS)}")
  if min(num_train, num_val) < 0 or num_train + num_val == 0:
    raise ValueError(f"num_train={num_train}, num_val={num_val}: give at least one video, and no negative number")
  if min(size) < 48:
    raise ValueError(f"size {size[0]}x{size[1]}: width and height are at least 48 pixels")
  if seconds != int(seconds) or seconds < 2:
    raise ValueError(f"seconds={seconds}: a whole number from 2 up, or there is no keyframe")
  if not 5 <= fps <= 120:
    raise ValueError(f"fps={fps}: from 5 to 120")
  if seed < 0:
    raise ValueError(f"seed={seed}: not negative")
  if workers is not None and workers < 1:
    raise ValueError(f"workers={workers}: at least 1")


def _same_set(manifest: Path, wanted: dict[str, Any]) -> None:
  if not manifest.exists():
    return
  try:
    found = json.loads(manifest.read_text(encoding="utf-8"))
  except ValueError:
    raise ValueError(f"{manifest}: is damaged; delete the directory to make the set again") from None
  for key, value in wanted.items():
    if found.get(key) != value:
      raise ValueError(
        f"{manifest.parent}: holds a set with {key}={found.get(key)!r}, not {value!r}; "
        "delete it or give another directory"
      )


def _num_cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_all(tasks: list, workers: int) -> list[_Made]:
  """Makes all videos, in processes of their own where there is more than one worker."""
  settings, directory = tasks[0][:2]
  existing = sum(_video_path(directory, settings, split, index).exists() for _, _, split, index in tasks)
  made = []
  with progress.bar(f"Making {settings.level} synthetic videos", len(tasks), start=existing) as advance:

    def collect(results) -> None:
      for video, is_new in results:
        made.append(video)
        advance(int(is_new))

    if workers == 1:
      collect(map(_make_video, tasks))
      return made
    # Spawned, as JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as executor:
      try:
        collect(executor.map(_make_video, tasks, chunksize=4))
      except concurrent.futures.process.BrokenProcessPool:
        raise RuntimeError(
          f"{directory}: a worker process was killed, by lack of memory perhaps; "
          "the same call goes on where it stopped, try fewer workers"
        ) from None
      except BaseException:
        executor.shutdown(cancel_futures=True)
        raise
  return made


def _start_worker() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to an interruption
  cv2.setNumThreads(1)


def _video_path(directory: Path, settings: _Settings, split: str, index: int) -> Path:
  return directory / "videos" / split / f"{settings.level}_{split}_{index:05d}.mp4"


def _make_video(task: tuple[_Settings, Path, str, int]) -> tuple[_Made, bool]:
  """Annotates one video, and renders it unless it exists; also whether it is new."""
  settings, directory, split, index = task
  width, height = settings.size
  level = scenes.LEVELS[settings.level]
  stream = (settings.seed, SPLITS.index(split))
  num_acts = max(1, settings.seconds // 3) if level.changes else 1
  times = np.arange(round(settings.seconds * settings.fps)) / settings.fps
  groups = scenes.script(level, stream, index, num_acts)
  scene = scenes.stage(level, groups, times, (height, width), np.random.default_rng([*stream, 1, index]))
  path = _video_path(directory, settings, split, index)
  is_new = not path.exists()
  if is_new:
    _render(path, scene, times, settings)
  return _annotate(path.stem, scene, settings, len(times)), is_new


def _render(path: Path, scene: scenes.Scene, times: np.ndarray, settings: _Settings) -> None:
  width, height = settings.size
  middle = np.array([scene.backdrop.shape[1] - 1, scene.backdrop.shape[0] - 1]) / 2
  centers = (middle - scene.camera).tolist()
  layers: list[tuple[float, Any]] = [(order, thing.paint) for order, thing in scene.things]
  for actor in scene.actors:
    layers += [(actor.order, seat.paint) for seat in actor.seats]
    talking = np.zeros(len(times), bool)
    for begin, end, act in _segments(actor, scene, settings.fps, len(times)):
      if act.gesture == "talk":
        talking[begin:end] = np.sin(2 * np.pi * 2.3 * times[begin:end]) > 0
    painter = figures.PersonPainter(actor.look, actor.view, talking)
    layers.append((actor.order, lambda frame, i, painter=painter, actor=actor: painter.paint(frame, i, actor.things)))
  layers.sort(key=lambda layer: layer[0])
  with VideoWriter(path, size=(height, width), fps=settings.fps) as writer:
    for i in range(len(times)):
      frame = cv2.getRectSubPix(scene.backdrop, (width, height), centers[i])
      for _, paint in layers:
        paint(frame, i)
      writer.write(frame)


def _segments(
  actor: scenes.Actor, scene: scenes.Scene, fps: float, num_frames: int
) -> list[tuple[int, int, scenes.Act]]:
  """First frame, end frame and act of each part of a script."""
  bounds = [0, *(round(change * fps) for change in scene.changes), num_frames]
  return [(*span, act) for span, act in zip(itertools.pairwise(bounds), actor.acts, strict=True)]


def _annotate(video: str, scene: scenes.Scene, settings: _Settings, num_frames: int) -> _Made:
  width, height = settings.size
  rows, tubes = [], []
  keyframes = {round(second * settings.fps): second for second in range(1, settings.seconds)}
  for person, actor in enumerate(scene.actors):
    boxes = np.clip(actor.boxes / [width, height, width, height], 0, 1).round(4)
    seen = np.all(boxes[:, 2:] - boxes[:, :2] > 0.01, axis=1)
    segments = _segments(actor, scene, settings.fps, num_frames)
    labels = [
      {"id": class_id, "start_frame": begin, "end_frame": end}
      for begin, end, act in segments
      for class_id in act.classes
    ]
    shown = [[i, *box] for i, box in enumerate(boxes.tolist()) if seen[i]]
    tubes.append({"person_id": person, "boxes": shown, "labels": labels})
    rows += [
      (second, boxes[i], label["id"], person)
      for i, second in keyframes.items()
      for label in labels
      if seen[i] and label["start_frame"] <= i < label["end_frame"]
    ]
  rows.sort(key=lambda row: (row[0], row[3], row[2]))
  return _Made(video, rows, {"fps": settings.fps, "num_frames": num_frames, "size": [height, width], "tubes": tubes})


def _write_annotations(directory: Path, split: str, videos: list[_Made]) -> None:
  rows = [(made.video, *row) for made in videos for row in made.rows]
  columns = list(zip(*rows, strict=True)) if rows else [()] * 5
  table = annotations.Rows(
    video=np.array(columns[0], object),
    timestamp=np.array(columns[1], np.float64),
    boxes=np.array(columns[2], np.float64).reshape(-1, 4),
    action=np.array(columns[3], np.int32),
    extra=np.array(columns[4], np.float64),
  )
  annotations.write_ava_csv(directory / f"{split}.csv", table, extra_format="%d")
  tubes = json.dumps({made.video: made.tubes for made in videos}, separators=(",", ":"))
  (directory / f"{split}_tubes.json").write_text(tubes, encoding="utf-8")


def contact_sheet(directory: annotations.PathLike, path: annotations.PathLike, *, split: str, rows: int = 12) -> None:
  """Paints keyframes of a set with their boxes and class names, to look at.

  Args:
    directory: of a set.
    path: of the picture, ``.png``.
    split: "train" or "val".
    rows: number of videos, one a row; the columns are the frames of one second around a keyframe.
  """
  directory = Path(directory)
  table = json.loads((directory / "annotations" / f"{split}_tubes.json").read_text(encoding="utf-8"))
  names = annotations.read_label_map(directory / "annotations" / "label_map.pbtxt")
  strips = []
  for number, (video, entry) in enumerate(itertools.islice(table.items(), rows)):
    second = 1 + number % max(1, int(entry["num_frames"] / entry["fps"]) - 1)
    times = second + np.linspace(-0.5, 0.5, 8)
    with VideoReader(directory / "videos" / split / f"{video}.mp4") as reader:
      frames = reader.frames_at(times)
    indices = np.clip(np.rint(times * entry["fps"]).astype(int), 0, entry["num_frames"] - 1).tolist()
    cells = [_cell(frame, index, entry, names) for frame, index in zip(frames, indices, strict=True)]
    strips.append(np.concatenate(cells, 1))
  if not strips:
    raise ValueError(f"{directory}: no {split} video to show")
  if not cv2.imwrite(os.fspath(path), np.concatenate(strips)[..., ::-1]):
    raise ValueError(f"{path}: cannot be written")


def _cell(frame: np.ndarray, index: int, entry: dict[str, Any], names: dict[int, str]) -> np.ndarray:
  """One frame of a contact sheet with boxes, and the class names below it in the colours of the boxes."""
  scale = max(1, round(240 / frame.shape[1]))
  cell = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
  height, width = cell.shape[:2]
  cell = np.pad(cell, [(0, 12 * 4 + 4), (0, 2), (0, 0)])
  colors = [(255, 225, 0), (0, 230, 255), (255, 120, 255), (120, 255, 120)]
  for number, (tube, color) in enumerate(zip(entry["tubes"], colors, strict=False)):
    labels = [names[label["id"]] for label in tube["labels"] if label["start_frame"] <= index < label["end_frame"]]
    caption = ", ".join(name.split(" (")[0] for name in labels)
    at = (2, height + 11 + 12 * number)
    cv2.putText(cell, caption, at, cv2.FONT_HERSHEY_SIMPLEX, 0.38, color, 1, cv2.LINE_AA)
    for box in (box for shown, *box in tube["boxes"] if shown == index):
      x1, y1, x2, y2 = (round(value * side) for value, side in zip(box, (width, height) * 2, strict=True))
      cv2.rectangle(cell, (x1, y1), (x2, y2), color, 1)
  return cell


def _size(text: str) -> tuple[int, int]:
  width, cross, height = text.partition("x")
  if not (cross and width.isdigit() and height.isdigit()):
    raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 320x240")
  return int(width), int(height)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the settings of `make`."""
  parser.add_argument("--level", choices=list(scenes.LEVELS), default="easy", help="how hard it is")
  parser.add_argument("--num-train", type=int, default=600, metavar="N", help="training videos")
  parser.add_argument("--num-val", type=int, default=120, metavar="N", help="held-out videos")
  parser.add_argument("--size", type=_size, default="160x120", metavar="WxH", help="pixels")
  parser.add_argument("--seconds", type=int, default=6, metavar="N", help="length of a video")
  parser.add_argument("--fps", type=float, default=25, help="frames a second")
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one gives another set")


def main() -> None:
  """Command line of `make`."""
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.datasets.synthetic",
    description="Renders a synthetic action detection set: mp4 videos, AVA CSV and tubes.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--output", required=True, metavar="DIR", default=argparse.SUPPRESS, help="directory of the set")
  add_arguments(parser)
  parser.add_argument("--workers", type=int, metavar="N", help="processes; one a core where not given")
  parser.add_argument("--contact-sheet", metavar="PNG", help="also paint frames with boxes and class names, to look at")
  args = vars(parser.parse_args())
  directory, sheet = args.pop("output"), args.pop("contact_sheet")
  try:
    make(directory, **args)
    if sheet:
      contact_sheet(directory, sheet, split="val" if args["num_val"] else "train")
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit("\ninterrupted; the same command goes on where it stopped")


if __name__ == "__main__":
  main()
