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
import collections
import contextlib
import functools
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import cv2
import jax
import numpy as np
from flax import nnx

import vad_jax
from vad_jax import annotations, checkpoint, person_boxes, progress, visualize
from vad_jax.batch import Batch, Detections
from vad_jax.datasets.augment import place_on_canvas
from vad_jax.datasets.loader import ClipSpec
from vad_jax.datasets.video import VideoReader, VideoWriter, nearest
from vad_jax.ops.nms import nms as suppress
from vad_jax.person_boxes import PersonBoxes

_CANVAS_MULTIPLE = 32
_TIME_EPSILON = 1e-3  # seconds; time stamps of frames are rounded


class Action(NamedTuple):
  """One action of one person: id of the label map, its name, score in [0, 1]."""

  id: int
  name: str
  score: float


class KeyframeDetections(NamedTuple):
  """The ``n`` people found at one keyframe, best actor score first.

  Attributes:
    time: seconds from the video's first frame.
    boxes: ``[n, 4]`` float32 xyxy in [0, 1].
    actor_score: ``[n]`` float32.
    action_score: ``[n, K]`` float32, all classes.
    actions: for each person the actions that passed the threshold, best first.
  """

  time: float
  boxes: np.ndarray
  actor_score: np.ndarray
  action_score: np.ndarray
  actions: list[list[Action]]


class Prediction(NamedTuple):
  """What was found in one video and where it was written.

  Attributes:
    source: the video.
    size: its height and width in pixels.
    fps: its average frame rate.
    broken: damaged or missing frames; their neighbours stood in.
    keyframes: detections in order of time.
    csv: AVA result CSV, or None where nothing was written.
    json: readable file of the same, or None.
    video: annotated mp4, or None.
    maps: folder of pictures, one a keyframe, of what the model sees where; or None.
  """

  source: Path
  size: tuple[int, int]
  fps: float
  broken: int
  keyframes: list[KeyframeDetections]
  csv: Path | None = None
  json: Path | None = None
  video: Path | None = None
  maps: Path | None = None


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
) -> Prediction:
  """Detects the actions in one video.

  Args:
    model: what `load` takes or returned.
    video: any file that FFmpeg can decode.
    output_dir: where to write CSV, JSON and annotated video; None writes nothing.
    boxes: the people, for a model that classifies given ones: a model that finds people, as `load` takes or returned
      it; a file, see `person_boxes.read`; or what is known already.
    stride: seconds between keyframes; None makes every frame one.
    actor_threshold: lowest actor score of a person that is reported.
    action_threshold: lowest score of an action that is reported.
    top_k: most actions reported for one person.
    nms: drops people whose box overlaps a better one by more than this IoU, or is empty; None keeps all.
    batch_size: clips run through the model at once.
    draw: write the annotated video as well.
    save_maps: write a picture of each keyframe: the model's maps over the frame, all boxes, and those that are kept.

  Raises:
    ValueError: the model has no maps; or it needs boxes and there are none, or the other way round.
    VideoError: the video is missing or cannot be decoded.
    OSError: the output directory cannot be written.
  """
  loaded = load(model) if isinstance(model, str | Path) else model
  source = Path(video)
  if save_maps and not hasattr(loaded.model, "maps"):
    raise ValueError(f"{loaded.info['model']['name']} has no maps to save")
  thresholds = {
    "actor_threshold": actor_threshold,
    "action_threshold": action_threshold,
    "top_k": top_k,
    "nms": nms,
  }
  finding: dict[str, Any] = {"stride": stride, "actor_threshold": actor_threshold, "nms": nms, "batch_size": batch_size}
  people = _people(loaded, boxes, source, finding)
  with VideoReader(source) as reader:
    height, width = reader.size
    outputs = _prepare_outputs(source, output_dir) if output_dir is not None else {}
    with progress.bar(f"{source.name}: detect", reader.num_frames) as advance:
      frames = _counted(reader, advance)
      keyframes = []
      for time, found, seen in _detect(loaded, people, frames, (height, width), stride, batch_size, save_maps):
        keyframes.append(_select(time, found, loaded.info["label_map"], **thresholds))
        if seen and outputs:
          outputs["maps"].mkdir(exist_ok=True)
          kept = keyframes[-1]
          sheet = visualize.map_sheet(*seen, found, kept.boxes, kept.actor_score, size=(height, width))
          cv2.imwrite(str(outputs["maps"] / f"{time:08.3f}.png"), sheet[..., ::-1])
    result = Prediction(source, (height, width), reader.fps, reader.broken, keyframes)
  if people and all(people.index(keyframe.time) is None for keyframe in keyframes):
    times = ", ".join(f"{time:g}" for time in people.times[:3])
    raise ValueError(f"{people.source}: boxes of {source} are at {times}, ... seconds and at no keyframe; see --stride")
  if outputs:
    _write_csv(result, outputs["csv"])
    _write_json(
      result, outputs["json"], loaded.info, {"stride": stride, "boxes": people and people.source, **thresholds}
    )
    if draw:
      annotate(result, outputs["video"])
    result = result._replace(csv=outputs["csv"], json=outputs["json"])
    result = result._replace(video=outputs["video"] if draw else None, maps=outputs["maps"] if save_maps else None)
  return result


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
  if isinstance(boxes, checkpoint.Loaded) or checkpoint.is_checkpoint(boxes):
    found = predict_video(boxes, video, **finding).keyframes
    other = boxes.info["model"]["name"] if isinstance(boxes, checkpoint.Loaded) else str(boxes)
    return PersonBoxes(
      other, np.array([k.time for k in found]), [k.boxes for k in found], [k.actor_score for k in found]
    )
  return person_boxes.read(boxes, video.stem.replace(",", "_"), threshold=finding["actor_threshold"])


# --- detection ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run_model(graphdef: Any, state: Any, inputs: dict[str, np.ndarray], with_maps: bool) -> tuple[Detections, Any]:
  batch = cast(Batch, inputs)  # without annotations, which only a loss reads
  model = nnx.merge(graphdef, state)
  out = model(batch)
  return model.detections(out, batch), model.maps(out, batch) if with_maps else {}


def _detect(
  loaded: checkpoint.Loaded,
  people: PersonBoxes | None,
  frames: Iterable[tuple[float, np.ndarray]],
  size: tuple[int, int],
  stride: float | None,
  batch_size: int,
  with_maps: bool,
) -> Iterator[tuple[float, Detections, tuple[np.ndarray, dict[str, np.ndarray]] | None]]:
  """Runs the model over a stream of frames.

  Yields:
    time and detections (no batch axis) of each keyframe; if asked for, its padded frame and the model's maps of it.
  """
  graphdef, state = nnx.split(loaded.model)
  offsets = ClipSpec(**loaded.info["clip"]).times(0.0)
  canvas = video_canvas(size, loaded.info["short_side"], loaded.info["canvas"])
  place = functools.partial(place_on_canvas, canvas=canvas, short_side=loaded.info["short_side"])
  _, placed_size = place(np.zeros((1, *size, 3), np.uint8))
  video_size = np.tile(np.array(placed_size, np.int32), (batch_size, 1))

  def runs() -> Iterator[tuple[list[float], np.ndarray, Any]]:
    placed = ((time, place(frame[None])[0][0]) for time, frame in frames)
    for batch in _batched(clips(placed, offsets, stride), batch_size):
      video = np.zeros((batch_size, len(offsets), *canvas, 3), np.uint8)
      video[: len(batch)] = [clip for _, clip in batch]
      key = np.where(np.arange(batch_size) < len(batch), 0, -1).astype(np.int32)
      inputs = {"video": video, "video_size": video_size, "key": key}
      if people:
        inputs |= people.batch([time for time, _ in batch], batch_size)
      shown = video[:, nearest(offsets, 0.0)].copy() if with_maps else video[:, :0]
      yield [time for time, _ in batch], shown, _run_model(graphdef, state, inputs, with_maps)

  # One batch behind: the device works on a batch while the next one is being decoded.
  height, width = placed_size
  for (times, shown, run), _ in itertools.pairwise(itertools.chain(runs(), [([], np.empty(0), None)])):
    found, maps = jax.device_get(run)
    for row, time in enumerate(times):
      real = {}
      for name, values in maps.items():  # without the padding
        rows, columns = (
          round(n * side / padded) for n, side, padded in zip(values.shape[1:3], placed_size, canvas, strict=True)
        )
        real[name] = values[row, :rows, :columns]
      seen = (shown[row, :height, :width], real) if with_maps else None
      yield time, Detections(*(column[row] for column in found)), seen


def video_canvas(size: tuple[int, int], short_side: int | None, training_canvas: tuple[int, int]) -> tuple[int, int]:
  """Height and width of the padded frames for a video of any shape: the smallest multiples of 32 that do.

  The short side becomes ``short_side``, unless the long side would then be longer than in training; a
  portrait video is treated like a landscape one.

  Args:
    size: height and width of the video.
    short_side: of the frames in training; None where they were stretched to the canvas, as this video is then.
    training_canvas: height and width that the training frames were padded to.
  """
  if short_side is None:
    return training_canvas
  scale = min(short_side / min(size), max(training_canvas) / max(size))
  height, width = (math.ceil(round(side * scale) / _CANVAS_MULTIPLE) * _CANVAS_MULTIPLE for side in size)
  return max(height, _CANVAS_MULTIPLE), max(width, _CANVAS_MULTIPLE)


def clips(
  frames: Iterable[tuple[float, np.ndarray]], offsets: np.ndarray, stride: float | None
) -> Iterator[tuple[float, np.ndarray]]:
  """Cuts the clips of all keyframes out of a stream and forgets frames that no coming clip needs.

  Args:
    frames: times (rising) and frames.
    offsets: ``[T]`` rising times of a clip's frames from its keyframe, in seconds.
    stride: seconds between keyframes, the first at 0; None makes every frame one.

  Yields:
    time of the keyframe and ``[T, ...]`` the frames nearest to its times, clamped to the stream's ends.
  """
  window: collections.deque[tuple[float, np.ndarray]] = collections.deque()
  waiting: collections.deque[float] = collections.deque()  # keyframes whose last frames have not come yet
  count = 0

  def cut(keyframe: float) -> tuple[float, np.ndarray]:
    times = np.array([time for time, _ in window])
    return keyframe, np.stack([window[nearest(times, keyframe + offset)][1] for offset in offsets])

  for time, frame in frames:
    window.append((time, frame))
    if stride is None:
      waiting.append(time)
    while stride is not None and count * stride <= time + _TIME_EPSILON:
      waiting.append(count * stride)
      count += 1
    while waiting and waiting[0] + offsets[-1] <= time:
      yield cut(waiting.popleft())
    coming = waiting[0] if waiting else time if stride is None else count * stride
    while len(window) > 1 and window[1][0] <= coming + offsets[0]:
      window.popleft()
  for keyframe in waiting:
    yield cut(keyframe)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  iterator = iter(items)
  while batch := list(itertools.islice(iterator, size)):
    yield batch


def _counted(
  frames: Iterable[tuple[float, np.ndarray]], advance: Callable[[], None]
) -> Iterator[tuple[float, np.ndarray]]:
  for item in frames:
    yield item
    advance()


def _select(
  time: float,
  found: Detections,
  label_map: dict[int, str],
  *,
  actor_threshold: float,
  action_threshold: float,
  top_k: int,
  nms: float | None,
) -> KeyframeDetections:
  """Applies the thresholds to the detections of one keyframe."""
  order = np.argsort(-found.actor_score, kind="stable")
  order = order[(found.valid & (found.actor_score >= actor_threshold))[order]]
  if nms is not None:
    order = order[suppress(found.boxes[order], found.actor_score[order], nms)]
  actions = []
  for scores in found.action_score[order]:
    best = [index for index in np.argsort(-scores, kind="stable") if index + 1 in label_map][:top_k]
    actions.append(
      [Action(int(k) + 1, label_map[int(k) + 1], float(scores[k])) for k in best if scores[k] >= action_threshold]
    )
  return KeyframeDetections(time, found.boxes[order], found.actor_score[order], found.action_score[order], actions)


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


def _write_csv(result: Prediction, path: Path) -> None:
  name = result.source.stem.replace(",", "_")  # a comma would end the column
  rows = [
    (name, keyframe.time, box, action.id, action.score)
    for keyframe in result.keyframes
    for box, actions in zip(keyframe.boxes, keyframe.actions, strict=True)
    for action in actions
  ]
  video, time, boxes, action, score = zip(*rows, strict=True) if rows else ((),) * 5
  annotations.write_ava_csv(
    path,
    annotations.Rows(
      np.array(video, object),
      np.array(time, np.float64),
      np.array(boxes, np.float64).reshape(-1, 4),
      np.array(action, np.int32),
      np.array(score, np.float64),
    ),
  )


def _write_json(result: Prediction, path: Path, info: dict[str, Any], settings: dict[str, Any]) -> None:
  height, width = result.size
  content = {
    "video": str(result.source),
    "width": width,
    "height": height,
    "fps": round(result.fps, 3),
    "broken_frames": result.broken,
    "model": {"name": info["model"]["name"], "step": info["step"], "clip": info["clip"]},
    "settings": settings,
    "made_with": {
      "vad_jax": vad_jax.__version__,
      "jax": jax.__version__,
      "av": av.__version__,
      "ffmpeg": av.ffmpeg_version_info,
    },
    "boxes": "x1, y1, x2, y2 in [0, 1] of the frame",
    "keyframes": [
      {
        "time": round(keyframe.time, 4),
        "actors": [
          {
            "box": [round(float(value), 4) for value in box],
            "score": round(float(score), 4),
            "actions": [{"id": a.id, "name": a.name, "score": round(a.score, 4)} for a in actions],
          }
          for box, score, actions in zip(keyframe.boxes, keyframe.actor_score, keyframe.actions, strict=True)
        ],
      }
      for keyframe in result.keyframes
    ],
  }
  path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- drawing ------------------------------------------------------------------------------------------------


def annotate(result: Prediction, path: Path) -> None:
  """Decodes the video again and writes it with the detections drawn.

  Args:
    result: what was found in it.
    path: the mp4 to write.
  """
  keyframes = result.keyframes
  links = [person_boxes.link(now.boxes, then.boxes) for now, then in itertools.pairwise(keyframes)]
  people = person_boxes.number_people([len(keyframe.boxes) for keyframe in keyframes], links)
  current = 0
  with contextlib.ExitStack() as stack:
    reader = stack.enter_context(VideoReader(result.source))
    advance = stack.enter_context(progress.bar(f"{result.source.name}: draw", reader.num_frames))
    writer = None
    for time, frame in _counted(reader, advance):
      while current < len(links) and keyframes[current + 1].time <= time:
        current += 1
      boxes = keyframes[current].boxes
      if current < len(links):
        begin, end = (keyframe.time for keyframe in keyframes[current : current + 2])
        share = (time - begin) / (end - begin)
        boxes = person_boxes.boxes_between(boxes, keyframes[current + 1].boxes, links[current], share)
      captions = [[f"{action.name} {action.score:.2f}" for action in a] for a in keyframes[current].actions]
      colors = [visualize.color_of(number) for number in people[current]]
      drawn = visualize.draw_detections(visualize.upscale(frame), boxes, captions, colors)
      if writer is None:
        writer = stack.enter_context(VideoWriter(path, size=drawn.shape[:2], fps=result.fps, audio_from=result.source))
      writer.write(drawn, time)


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


def _report(result: Prediction) -> None:
  people = sum(len(keyframe.boxes) for keyframe in result.keyframes)
  print(f"{result.source}: {people} people in {len(result.keyframes)} keyframes")
  if not people:
    print("  nothing passed the thresholds; try a lower --actor-threshold")
  elif not any(actions for keyframe in result.keyframes for actions in keyframe.actions):
    print("  no action passed the thresholds; try a lower --action-threshold")
  for path in (result.csv, result.json, result.video, result.maps):
    if path:
      print(f"  {path}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.predict", description="Finds the actions in videos and draws them."
  )
  parser.add_argument("--checkpoint", required=True, help="run directory, checkpoint, or `quickstart`")
  parser.add_argument("--video", required=True, nargs="+", type=Path, help="any file that FFmpeg can decode")
  parser.add_argument(
    "--boxes",
    help="people, for a system that classifies given ones: another system's run or checkpoint, or `quickstart`, which "
    "finds them; or a file: JSON of predict, AVA CSV, pickle of mmaction2. Other detectors are not called from here; "
    "any can write such a CSV: video,seconds,x1,y1,x2,y2,1,score with boxes in [0, 1]",
  )
  parser.add_argument("--output-dir", default="predictions", type=Path, help="default: %(default)s")
  keyframes = parser.add_mutually_exclusive_group()
  keyframes.add_argument(
    "--stride", default=1.0, type=_positive, help="seconds between keyframes; default: %(default)s"
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
  parser.add_argument("--no-video", action="store_true", help="write no annotated video")
  parser.add_argument(
    "--save-maps",
    action="store_true",
    help="write pictures of what the model sees where, for models that have such maps",
  )
  options = parser.parse_args(arguments)
  stems = [video.stem for video in options.video]
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
