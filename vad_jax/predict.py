"""Finds the actions in any video and draws them on it.

    python -m vad_jax.predict --checkpoint runs/quickstart --video holiday.mp4 --output-dir out

writes ``out/holiday_detections.csv`` (AVA result format), ``out/holiday_detections.json`` (the same to read)
and ``out/holiday.mp4`` (boxes, action names and scores drawn; original frame rate and sound). In a notebook:

    from vad_jax import predict
    result = predict.predict_video("quickstart", "holiday.mp4", "out")
    result.keyframes[3].boxes, result.keyframes[3].actions, result.video

A video is decoded twice, once to detect and once to draw, and both times frame by frame: memory does not grow
with its length. Keyframes are at 0, 1, 2, ... seconds by default. The box of a person found in two keyframes
running moves smoothly between them; actions hold until the next keyframe.
"""

import argparse
import contextlib
import math
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vad_jax import checkpoint, live, person_boxes, visualize
from vad_jax.batch import Detections
from vad_jax.datasets.video import VideoReader
from vad_jax.detect import ATTENTION, Detector, Seen
from vad_jax.metrics.linking import Candidates, link_greedily
from vad_jax.person_boxes import PersonBoxes, Tracker
from vad_jax.predictions import (
  Action,
  ActionTube,
  KeyframeDetections,
  Prediction,
  Selection,
  annotate,
  watched,
  write_csv,
  write_json,
)


def load(name: str | Path) -> checkpoint.Loaded:
  """Loads a model once, to use it for several videos.

  Args:
    name: a run's work directory, one checkpoint, or ``"quickstart"`` for the weights in the package.
  """
  return checkpoint.load_model(name)


def predict_video(
  model: str | Path | checkpoint.Loaded,
  video: str | Path,
  output_dir: str | Path | None = None,
  *,
  boxes: str | Path | checkpoint.Loaded | PersonBoxes | None = None,
  stride: float | None = 1.0,
  actor_threshold: float = 0.5,
  action_threshold: float = 0.3,
  top_k: int = 3,
  nms: float | None = 0.7,
  batch_size: int = 4,
  draw: bool = True,
  save_maps: bool = False,
  on_progress: Callable[[float], None] | None = None,
) -> Prediction:
  """Detects the actions in one video.

  Args:
    model: what `load` takes or returned.
    video: any file that FFmpeg can decode.
    output_dir: where to write CSV, JSON and annotated video; None writes nothing.
    boxes: the people, for a model that classifies given ones: a model that finds people, as `load` takes or returned
      it; a file, see `person_boxes.read`; or what is known already.
    stride: seconds between keyframes; None makes every frame one, which it always is to a model for tubes.
    actor_threshold: lowest actor score of a person that is reported.
    action_threshold: lowest score of an action that is reported.
    top_k: most actions reported for one person.
    nms: drops people whose box overlaps a better one by more than this IoU, or is empty; None keeps all.
    batch_size: clips run through the model at once.
    draw: write the annotated video as well.
    save_maps: write for each keyframe (of tubes for the middle frame of each clip), named by its time, a picture of the
      model's maps over the frame, all boxes, and those that are kept. Of a model that says where it looked for each
      person, or person and class, also a folder with a picture of each kept one, and a ``.npz`` with the arrays.
    on_progress: called with the share of the whole work that is done, in [0, 1]. What it raises stops the work; files
      that are not complete then are removed.

  Raises:
    ValueError: the model has no maps; or it needs boxes and there are none, or the other way round.
    VideoError: the video is missing or cannot be decoded.
    OSError: the output directory cannot be written.
  """
  loaded = load(model) if isinstance(model, str | Path) else model
  source, begun = Path(video), time.monotonic()
  selection = Selection(loaded.info["label_map"], actor_threshold, action_threshold, top_k, nms)
  if save_maps and not hasattr(loaded.model, "maps"):
    raise ValueError(f"{loaded.info['model']['name']} has no maps to save")
  first = int(_finds_people(boxes))
  parts = first + 1 + (draw and output_dir is not None)
  finding: dict[str, Any] = {"stride": stride, "actor_threshold": actor_threshold, "nms": nms, "batch_size": batch_size}
  people = _people(loaded, boxes, source, finding | {"on_progress": _part(on_progress, 0, parts)})
  with contextlib.ExitStack() as stack:
    reader = stack.enter_context(VideoReader(source))
    outputs = _prepare_outputs(source, output_dir) if output_dir is not None else {}
    detector = Detector(loaded.model, loaded.info, reader.size, batch_size=batch_size, with_maps=save_maps)
    stride = None if detector.tubes else stride
    maps = stack.enter_context(_complete(outputs["maps"])) if save_maps and outputs else None
    frames = stack.enter_context(contextlib.closing(watched(reader, "detect", _part(on_progress, first, parts))))
    keyframes, tracker = [], Tracker()
    for moment, found, seen in detector.run(frames, reader.num_frames, stride, people):
      slots = selection.slots(found)
      keyframes.append(selection.keyframe(moment, found, slots, tracker))
      if seen and maps:
        _write_maps(maps, seen, found, slots, keyframes[-1], selection.label_map, reader.size)
    result = Prediction(source, reader.size, reader.fps, reader.broken, keyframes, num_frames=reader.num_frames)
  if detector.tubes:
    result = result._replace(tubes=link_tubes(result))
  if people and all(people.index(keyframe.time) is None for keyframe in keyframes):
    times = ", ".join(f"{time:g}" for time in people.times[:3])
    raise ValueError(f"{people.source}: boxes of {source} are at {times}, ... seconds and at no keyframe; see --stride")
  if outputs:
    write_csv(result, outputs["csv"])
    settings = {"stride": stride, "boxes": people and people.source, "actor_threshold": actor_threshold}
    settings |= {"action_threshold": action_threshold, "top_k": top_k, "nms": nms}
    write_json(result, outputs["json"], loaded.info, settings)
    result = result._replace(csv=outputs["csv"], json=outputs["json"], maps=maps)
    if draw:
      annotate(result, outputs["video"], _part(on_progress, parts - 1, parts))
      result = result._replace(video=outputs["video"])
  if on_progress:
    on_progress(1.0)
  return result._replace(seconds=time.monotonic() - begun)


def _part(on_progress: Callable[[float], None] | None, part: int, parts: int) -> Callable[[float], None]:
  """Tells how far the whole is, given how far one of its equal parts is."""
  return lambda share: on_progress((part + share) / parts) if on_progress else None


def _finds_people(boxes: Any) -> bool:
  """Whether what was given as the people is a model that finds them."""
  return isinstance(boxes, checkpoint.Loaded) or (isinstance(boxes, str | Path) and checkpoint.is_checkpoint(boxes))


def _people(loaded: checkpoint.Loaded, boxes: Any, video: Path, finding: dict[str, Any]) -> PersonBoxes | None:
  """The people that a model is to classify, found by another one or read; None for a model that finds them itself.

  Raises:
    ValueError: the model needs boxes and there are none, or the other way round.
    OSError: there is no such file.
  """
  name = loaded.info["model"]["name"]
  if not getattr(loaded.model, "takes_proposals", False):
    if boxes is not None:
      raise ValueError(f"{name} finds people itself: leave --boxes out")
    return None
  if boxes is None:
    raise ValueError(f"{name} classifies given people: name a model that finds them, or a file of boxes, with --boxes")
  if isinstance(boxes, PersonBoxes):
    return boxes
  if _finds_people(boxes):
    found = predict_video(boxes, video, **finding).keyframes
    other = boxes.info["model"]["name"] if isinstance(boxes, checkpoint.Loaded) else str(boxes)
    return PersonBoxes(
      other, np.array([k.time for k in found]), [k.boxes for k in found], [k.actor_score for k in found]
    )
  return person_boxes.read(boxes, video.stem.replace(",", "_"), threshold=finding["actor_threshold"])


def link_tubes(result: Prediction) -> list[ActionTube]:
  """Links the reported actions of all frames as `link_greedily` does, which wants 15 frames at least."""
  height, width = result.size
  size = np.array([width, height, width, height], np.float64)
  times = np.array([keyframe.time for keyframe in result.keyframes])
  classes: dict[tuple[int, str], int] = {}
  rows = [
    (classes.setdefault((action.id, action.name), len(classes)), frame, box * size, action.score)
    for frame, keyframe in enumerate(result.keyframes, 1)
    for box, actions in zip(keyframe.boxes, keyframe.actions, strict=True)
    for action in actions
  ]
  if not rows:
    return []
  of_class, frame, boxes, score = (np.array(column) for column in zip(*rows, strict=True))
  # Classes are linked side by side, like videos: one pass through the frames is much faster than one for each class.
  linked = link_greedily(Candidates(of_class, frame, boxes[:, None], score), np.full(len(classes), len(times)))
  names, tubes = list(classes), []
  for tube in linked:
    index = tube.boxes[:, 0].astype(np.int64) - 1
    action = Action(*names[tube.video], tube.score)
    tubes.append(ActionTube(action, times[index], (tube.boxes[:, 1:] / size).astype(np.float32)))
  return sorted(tubes, key=lambda tube: (tube.times[0], tube.action.id))


# --- files --------------------------------------------------------------------------------------------------


def _prepare_outputs(source: Path, output_dir: str | Path) -> dict[str, Path]:
  """Names of the files to write, in a directory that is known to be writable before the work begins."""
  directory = Path(output_dir)
  outputs = {
    "csv": directory / f"{source.stem}_detections.csv",
    "json": directory / f"{source.stem}_detections.json",
    "video": directory / f"{source.stem}.mp4",
    "maps": directory / f"{source.stem}_maps",
  }
  try:
    directory.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()
  except OSError as error:
    raise OSError(f"{directory}: cannot write there ({error.strerror}); choose another --output-dir") from None
  if outputs["video"].exists() and outputs["video"].samefile(source):
    raise OSError(f"{source}: the annotated video would replace it; choose another --output-dir")
  return outputs


@contextlib.contextmanager
def _complete(folder: Path) -> Iterator[Path]:
  """Makes a folder, and takes it away again where what fills it does not come to its end."""
  existed = folder.exists()
  folder.mkdir(exist_ok=True)
  try:
    yield folder
  except BaseException:
    if not existed:
      shutil.rmtree(folder)
    raise


def _write_maps(
  folder: Path,
  seen: Seen,
  found: Detections,
  slots: np.ndarray,
  kept: KeyframeDetections,
  label_map: dict[int, str],
  size: tuple[int, int],
) -> None:
  """Writes what the model saw in a frame: pictures, and where it looked as arrays."""
  path = folder / f"{kept.time:08.3f}.png"
  maps = dict(seen.maps)
  attention = maps.pop(ATTENTION, None)
  rows = []
  if attention is not None:
    attention = attention[slots]
    of_classes = attention.shape[1] > 1
    for row, (person, box, actions) in enumerate(zip(kept.person, kept.boxes, kept.actions, strict=True)):
      rows.append([])
      for action in actions if of_classes else actions[:1]:
        picture = visualize.attention_picture(
          *(seen.frame, attention[row, action.id - 1 if of_classes else 0], box),
          *(f"{action.name} {action.score:.2f}", visualize.color_of(int(person) - 1)),
          size=size,
        )
        rows[-1].append(picture)
        name = re.sub(r"\W+", "_", f"_class{action.id}_{action.name}").rstrip("_") if of_classes else ""
        path.with_suffix("").mkdir(exist_ok=True)
        _write_picture(path.with_suffix("") / f"person{person}{name}.png", picture)
    classes = np.arange(1, kept.action_score.shape[1] + 1)
    np.savez_compressed(
      path.with_suffix(".npz"),
      time=kept.time,
      boxes=kept.boxes,
      actor_score=kept.actor_score,
      action_score=kept.action_score,
      person=kept.person,
      attention=attention,
      class_id=classes,
      class_name=np.array([label_map.get(int(index), "") for index in classes], str),
    )
  sheet = visualize.map_sheet(seen.frame, maps, found, kept.boxes, kept.actor_score, size=size, more=rows)
  _write_picture(path, sheet)


def _write_picture(path: Path, picture: np.ndarray) -> None:
  if not cv2.imwrite(str(path), picture[..., ::-1]):
    raise OSError(f"{path}: cannot be written")


# --- command line -------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  options = _parse(arguments)
  try:
    loaded, boxes = load(options.checkpoint), options.boxes
    if boxes is not None and checkpoint.is_checkpoint(boxes):
      boxes = load(boxes)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  if live.is_live(options.video[0]):
    return _watch(loaded, boxes, options)
  failed = 0
  for video in options.video:
    try:
      result = predict_video(
        loaded,
        video,
        options.output_dir,
        boxes=boxes,
        stride=options.stride,
        actor_threshold=options.actor_threshold,
        action_threshold=options.action_threshold,
        top_k=options.top_k,
        nms=options.nms,
        batch_size=options.batch_size,
        draw=not options.no_video,
        save_maps=options.save_maps,
      )
    except (OSError, ValueError) as error:
      print(f"error: {error}", file=sys.stderr)
      failed += 1
      continue
    _report(result)
  if failed and len(options.video) > 1:
    print(f"error: {failed} of {len(options.video)} videos failed, see above", file=sys.stderr)
  return 1 if failed else 0


def _watch(loaded: checkpoint.Loaded, boxes: Any, options: argparse.Namespace) -> int:
  """Runs on a live source; returns the exit code."""
  if isinstance(boxes, str):
    print(f"error: {boxes}: not a checkpoint; the people of a live source are found by a model", file=sys.stderr)
    return 1
  stop = threading.Event()
  before = signal.signal(signal.SIGINT, lambda *_: stop.set())
  label_map = loaded.info["label_map"]
  name = live.shown_name(options.video[0])
  try:
    report = live.watch(
      *(loaded, options.video[0], options.output_dir),
      Selection(label_map, options.actor_threshold, options.action_threshold, options.top_k, options.nms),
      people_from=boxes,
      stride=options.stride,
      draw=not options.no_video,
      seconds=options.seconds or math.inf,
      stop=stop,
      on_answer=_print_answer,
    )
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  finally:
    signal.signal(signal.SIGINT, before)
  print(f"{name}: {report.keyframes} keyframes in {report.seconds:.1f} s, {report.skipped} skipped for want of time")
  print(f"  {report.frames} frames came, {report.drawn} are drawn; delay at most {report.delay:.2f} s")
  for path in (report.json, report.video):
    if path:
      print(f"  {path}")
  if report.lost:
    print(f"error: lost after {report.seconds:.1f} s: {report.lost}; what was written is complete", file=sys.stderr)
  return 1 if report.lost else 0


def _print_answer(answer: live.Answer) -> None:
  keyframe = answer.keyframes[-1]
  people = [
    f"person {person}: {', '.join(f'{action.name} {action.score:.2f}' for action in actions) or '-'}"
    for person, actions in zip(keyframe.person, keyframe.actions, strict=True)
  ]
  print(f"{keyframe.time:8.2f} s, delay {answer.delay:.2f} s  {'; '.join(people) or 'nobody'}", flush=True)


def _report(result: Prediction) -> None:
  people = sum(len(keyframe.boxes) for keyframe in result.keyframes)
  print(f"{result.source}: {people} people in {len(result.keyframes)} keyframes", end="")
  print("" if result.tubes is None else f", {len(result.tubes)} tubes")
  if not people:
    print("  nothing passed the thresholds; try a lower --actor-threshold")
  elif not any(actions for keyframe in result.keyframes for actions in keyframe.actions):
    print("  no action passed the thresholds; try a lower --action-threshold")
  if result.num_frames and result.seconds:
    rate = result.num_frames / result.seconds
    steps = "decoding, model, drawing" if result.video else "decoding, model"
    print(f"  {result.num_frames} frames in {result.seconds:.1f} s: {rate:.1f} a second, ", end="")
    print(f"{rate / result.fps:.2f} times as fast as they are shown ({steps})")
  for path in (result.csv, result.json, result.video, result.maps):
    if path:
      print(f"  {path}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.predict", description="Finds the actions in videos and draws them."
  )
  parser.add_argument("--checkpoint", required=True, help="run directory, checkpoint, or `quickstart`")
  parser.add_argument(
    "--video",
    required=True,
    nargs="+",
    help="files, of any kind that FFmpeg can decode; or one live source: the number of a camera, or a URL (rtsp, http, "
    "tcp, udp, ...). Live, a line is printed for each keyframe; Ctrl-C ends it",
  )
  parser.add_argument(
    "--boxes",
    help="people, for a system that classifies given ones: another system's run or checkpoint, or `quickstart`, which "
    "finds them; or a file: JSON of predict, AVA CSV, pickle of mmaction2. Other detectors are not called from here; "
    "any can write such a CSV: video,seconds,x1,y1,x2,y2,1,score with boxes in [0, 1]",
  )
  parser.add_argument("--output-dir", default="predictions", type=Path, help="default: %(default)s")
  keyframes = parser.add_mutually_exclusive_group()
  keyframes.add_argument(
    "--stride",
    default=1.0,
    type=_positive,
    help="seconds between keyframes; default: %(default)s. Systems for tubes answer for every frame in any case",
  )
  keyframes.add_argument(
    "--every-frame", dest="stride", action="store_const", const=None, help="every frame is a keyframe (slow)"
  )
  parser.add_argument(
    "--actor-threshold", default=0.5, type=_share, help="lowest score of a person; default: %(default)s"
  )
  parser.add_argument(
    "--action-threshold", default=0.3, type=_share, help="lowest score of an action; default: %(default)s"
  )
  parser.add_argument("--top-k", default=3, type=_count, help="most actions for one person; default: %(default)s")
  parser.add_argument(
    "--nms",
    default=0.7,
    type=_share,
    help="drop boxes that overlap a better one by more than this IoU, 1 keeps all; default: %(default)s",
  )
  parser.add_argument("--batch-size", default=4, type=_count, help="clips at once; default: %(default)s")
  parser.add_argument("--seconds", type=_positive, help="how long to watch a live source; default: until it ends")
  parser.add_argument("--no-video", action="store_true", help="write no annotated video")
  parser.add_argument(
    "--save-maps",
    action="store_true",
    help="write pictures (and arrays) of what the model sees where, for models that have such maps",
  )
  options = parser.parse_args(arguments)
  is_live = [live.is_live(video) for video in options.video]
  if any(is_live) and len(is_live) > 1:
    parser.error("a live source is watched alone; run the others apart")
  if any(is_live) and options.save_maps:
    parser.error("--save-maps is for files; record the live source first")
  if options.seconds and not any(is_live):
    parser.error("--seconds is for live sources: cameras and URLs")
  stems = [Path(video).stem for video in options.video]
  if twice := {stem for stem in stems if stems.count(stem) > 1}:
    parser.error(f"several videos are named {sorted(twice)[0]}: their results would replace each other; run them apart")
  return options


def _number(kind: Callable[[str], float], low: float, high: float, wanted: str) -> Callable[[str], float]:
  def convert(text: str) -> float:
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not low <= value <= high:
      raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value

  return convert


_share = _number(float, 0, 1, "a number from 0 to 1")
_count = _number(int, 1, math.inf, "a whole number from 1 up")
_positive = _number(float, 1e-3, math.inf, "a number of seconds above 0")


if __name__ == "__main__":
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit("stopped; files that were reported are complete")
