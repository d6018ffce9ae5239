"""Files of tube data sets (JHMDB51-21, UCF101-24, MultiSports): ground truth and detections, read and written here.

A tube is one person doing one action: a box in each of its frames. Everywhere in this module frames count from 1,
labels from 0, and boxes are float64 xyxy in pixels of the video.
"""

import json
import logging
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vad_jax import safe_pickle
from vad_jax.annotations import AnnotationError, PathLike

_CHUNK = 1 << 22  # characters of a text file that are parsed at once, so that memory stays near the size of the result
_LINE = re.compile(r"(.+)_(\d+) \[(.*)\]$")  # of the class-query code: key and numbers

logger = logging.getLogger(__name__)


class Tube(NamedTuple):
  """One annotated action of one person.

  Attributes:
    label: index of the class.
    boxes: ``[n, 5]`` float64 frame, x1, y1, x2, y2; frames ascend and may have gaps.
  """

  label: int
  boxes: np.ndarray


class Video(NamedTuple):
  """One annotated video.

  Attributes:
    num_frames: its length.
    size: height and width in pixels, or None where the file does not tell.
    tubes: what happens in it.
    fps: frames a second, or None where the file does not tell.
  """

  num_frames: int
  size: tuple[int, int] | None
  tubes: list[Tube]
  fps: float | None = None


class TubeGroundTruth(NamedTuple):
  """Annotations of a data set.

  Attributes:
    labels: names of the classes.
    videos: name to annotation.
    splits: names of the training and of the test videos of each split; test videos in the order of evaluation.
  """

  labels: list[str]
  videos: dict[str, Video]
  splits: list[tuple[list[str], list[str]]]


class TubeDetections(NamedTuple):
  """Detections in columns, in file order: boxes of single frames (``T`` = 1) or tubelets of ``T`` frames.

  Attributes:
    videos: ``[V]`` names.
    video: ``[R]`` int32 index into ``videos``.
    frame: ``[R]`` int32 (first) frame, from 1 up.
    boxes: ``[R, T, 4]`` float64 xyxy in pixels.
    actor: ``[R]`` float64 probability of a person; NaN where the file does not tell.
    scores: ``[R, K]`` float32 score of each class; NaN where it was not detected as this class.
  """

  videos: list[str]
  video: np.ndarray
  frame: np.ndarray
  boxes: np.ndarray
  actor: np.ndarray
  scores: np.ndarray


def read_ground_truth(path: PathLike) -> TubeGroundTruth:
  """Reads annotations; the content tells which of three forms it is.

  * The published pickles (``JHMDB-GT.pkl``, ``UCF101v2-GT.pkl``, ``multisports_GT.pkl``): a dict of ``labels``,
    ``gttubes`` {video: {label: [``[n, 5]`` array]}}, ``nframes``, ``resolution`` {video: (height, width)},
    ``train_videos`` and ``test_videos`` (lists over splits). No code of the file is run.
  * JSON: ``{"labels": [name], "test_videos": [name] or [[name]] over splits, "train_videos": the same (optional),
    "videos": {name: {"nframes": n, "resolution": [height, width], "fps": 25.0 (optional), "tubes": [{"label": 0,
    "boxes": [[frame, x1, y1, x2, y2]]}]}}}``.
  * Lines of the class-query code's evaluator: ``<video>_<frame> [video index, frame, x1, y1, x2, y2, one-hot of the
    classes and of the background]``. The i-th line of a frame belongs to the i-th tube, a box of zeros says that the
    tube is absent. Frames count from 0 where any key ends in 0. All videos are test videos.

  Raises:
    AnnotationError: something is missing or malformed; names the file and the place in it.
    ValueError: a pickle that holds more than data, or is damaged.
    FileNotFoundError: there is no such file.
  """
  first = _first_line(path)
  if first.startswith("{"):
    return _ground_truth_of_json(path)
  return _ground_truth_of_lines(path) if _LINE.match(first) else _ground_truth_of_pickle(path)


def read_detections(path: PathLike, num_classes: int) -> TubeDetections:
  """Reads detections; the content tells which of four forms it is.

  * CSV with the header ``video,frame,query,x1,y1,x2,y2,actor,s0,...``: a row for each box, with the score of every
    class.
  * CSV without a header, ``video,frame,x1,y1,x2,y2,class id,score``: a row for each box and class; class ids count
    from 1. Rows of equal boxes in a frame become one detection. The actor probability is unknown.
  * Lines of the class-query code: ``<video>_<frame> [x1, y1, x2, y2, s_1..s_K, actor]``. Frames count from 0 where
    any key ends in 0. Its pixels are those of the resized video: score it against ground truth in the same ones.
    Lines that repeat word by word, as a distributed sampler leaves them, count once.
  * What `write_detections` wrote; the only form that holds tubelets.

  Raises:
    AnnotationError: a row is malformed; names the file, the line and what is wrong with it.
    FileNotFoundError: there is no such file.
  """
  first = _first_line(path)
  if first.startswith("PK"):
    detections = _detections_of_npz(path, num_classes)
  elif first.startswith("video,"):
    detections = _detections_of_query_csv(path, num_classes, first)
  elif _LINE.match(first):
    detections = _detections_of_lines(path, num_classes)
  else:
    detections = _detections_of_box_csv(path, num_classes)
  inverted = int((detections.boxes[..., :2] > detections.boxes[..., 2:]).any(axis=(1, 2)).sum())
  if inverted:
    logger.warning("%s: %d of %d detections are inverted, not x1,y1,x2,y2", path, inverted, len(detections.frame))
  return detections


def read_person_tubes(paths: Sequence[PathLike | None], label_map: dict[int, str]) -> TubeGroundTruth:
  """Reads where people are and what they do, as rendered sets tell it: one file for each split.

  A file holds ``{video: {"fps": f, "num_frames": n, "size": [height, width], "tubes": [{"boxes": [[frame, x1, y1, x2,
  y2]], "labels": [{"id": class id, "start_frame": a, "end_frame": b}]}]}}``. Its frames count from 0, an action ends
  before its last one, and boxes are in [0, 1]. What a person goes on doing is one tube, whatever else changes.

  Args:
    paths: of the training and of the test videos; None for a split that is not there.
    label_map: class id to name; labels are the places in the sorted ids.

  Raises:
    AnnotationError: something is missing or malformed; names the file and the place in it.
  """
  label = {class_id: index for index, class_id in enumerate(sorted(label_map))}
  videos: dict[str, Video] = {}
  names: list[list[str]] = []
  for path in paths:
    try:
      content = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
      names.append(list(content))
      for name, video in content.items():
        height, width = video["size"]
        tubes = []
        for person in video["tubes"]:
          boxes = np.array(person["boxes"], np.float64).reshape(-1, 5) * (1, width, height, width, height)
          boxes[:, 0] += 1
          for class_id, begin, end in _spans(person["labels"]):
            shown = boxes[(boxes[:, 0] > begin) & (boxes[:, 0] <= end)]
            if len(shown):
              tubes.append(_tube(label[class_id], shown, f"{path}: {name}"))
        videos[name] = Video(int(video["num_frames"]), (height, width), tubes, float(video["fps"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
      if isinstance(error, AnnotationError):
        raise
      raise _unexpected(path or "", error, "fps, num_frames, size and tubes with boxes and labels") from None
  return TubeGroundTruth([label_map[class_id] for class_id in label], videos, [(names[0], names[1])])


def _spans(labels: list[dict[str, int]]) -> list[tuple[int, int, int]]:
  """Class id, first and end frame of what is done without a break."""
  spans: list[tuple[int, int, int]] = []
  for class_id, begin, end in sorted((label["id"], label["start_frame"], label["end_frame"]) for label in labels):
    if spans and spans[-1][0] == class_id and begin <= spans[-1][2]:
      begin, end = spans[-1][1], max(end, spans.pop()[2])
    spans.append((class_id, begin, end))
  return spans


def write_ground_truth(path: PathLike, truth: TubeGroundTruth) -> None:
  """Writes annotations as the JSON that `read_ground_truth` reads; nothing is rounded."""
  Path(path).write_text(json.dumps(ground_truth_json(truth), separators=(",", ":")), encoding="utf-8")


def ground_truth_json(truth: TubeGroundTruth) -> dict[str, Any]:
  """Annotations in the form of that JSON."""
  return {
    "labels": truth.labels,
    "train_videos": [train for train, _ in truth.splits],
    "test_videos": [test for _, test in truth.splits],
    "videos": {
      name: {
        "nframes": video.num_frames,
        "resolution": video.size,
        "fps": video.fps,
        "tubes": [{"label": tube.label, "boxes": tube.boxes.tolist()} for tube in video.tubes],
      }
      for name, video in truth.videos.items()
    },
  }


def write_detections(path: PathLike, detections: TubeDetections) -> None:
  """Writes detections as a compressed npz with the columns of `TubeDetections` as arrays; nothing is rounded."""
  videos, video, frame, boxes, actor, scores = detections
  with open(path, "wb") as file:  # numpy would change the name
    np.savez_compressed(
      file, videos=np.array(videos, str), video=video, frame=frame, boxes=boxes, actor=actor, scores=scores
    )


def _ground_truth_of_json(path: PathLike) -> TubeGroundTruth:
  try:
    with open(path, encoding="utf-8-sig") as file:
      content = json.load(file)
  except ValueError as error:
    raise AnnotationError(f"{path}: not JSON: {error}") from None
  try:
    videos = {
      name: Video(
        int(video["nframes"]),
        _size(video.get("resolution")),
        [_tube(tube["label"], tube["boxes"], f"{path}: {name}") for tube in video["tubes"]],
        video.get("fps"),
      )
      for name, video in content["videos"].items()
    }
    return _ground_truth(path, content, videos)
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise _unexpected(path, error) from None


def _ground_truth_of_pickle(path: PathLike) -> TubeGroundTruth:
  content: Any = safe_pickle.load(path)
  try:
    videos = {
      name: Video(
        int(num_frames),
        _size(content.get("resolution", {}).get(name)),
        [
          _tube(label, boxes, f"{path}: {name}")
          for label, tubes in sorted(content["gttubes"].get(name, {}).items())
          for boxes in tubes
        ],
      )
      for name, num_frames in content["nframes"].items()
    }
    return _ground_truth(path, content, videos)
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise _unexpected(path, error) from None


def _ground_truth_of_lines(path: PathLike) -> TubeGroundTruth:
  names, video, table = _read_rows(path, _split_line)
  num_classes = table.shape[1] - 8  # besides them: the key's frame, video index, frame, box and background
  if num_classes < 1:
    raise AnnotationError(f"{path}:1: {table.shape[1] - 1} numbers; expected video index, frame, box and classes")
  frame = _from_one(table[:, 0])
  number = positions(video * (int(frame.max()) + 1) + frame.astype(np.int64))  # of the tube in its video
  videos = {}
  for index, name in enumerate(names):
    mine = np.flatnonzero(video == index)
    tubes: dict[bytes, Tube] = {}  # by content: evaluation on several devices writes some videos twice
    for tube in range(number[mine].max() + 1):
      rows = mine[(number[mine] == tube) & table[mine, 3:7].any(axis=1)]
      labels = np.unique(table[rows, 7:].argmax(axis=1))
      if len(labels) > 1 or num_classes in labels:
        raise AnnotationError(f"{path}: {name}: the boxes of tube {tube + 1} are not all of one class")
      if len(rows):
        boxes = np.column_stack([frame[rows], table[rows, 3:7]])
        tubes.setdefault(boxes.tobytes(), _tube(int(labels[0]), boxes, f"{path}: {name}"))
    videos[name] = Video(int(frame[mine].max()), None, list(tubes.values()))
  return TubeGroundTruth([f"class {k + 1}" for k in range(num_classes)], videos, [([], names)])


def _ground_truth(path: PathLike, content: dict[str, Any], videos: dict[str, Video]) -> TubeGroundTruth:
  labels, test = list(content["labels"]), _splits(content["test_videos"])
  train = _splits(content["train_videos"]) if "train_videos" in content else [[]] * len(test)
  if len(train) != len(test):
    raise AnnotationError(f"{path}: {len(train)} splits of train_videos, but {len(test)} of test_videos")
  for name, video in videos.items():
    for tube in video.tubes:
      if tube.label >= len(labels):
        raise AnnotationError(f"{path}: {name}: label {tube.label}, but there are {len(labels)} labels, from 0 up")
    last = max((int(tube.boxes[-1, 0]) for tube in video.tubes), default=0)
    if last > video.num_frames:
      logger.warning(
        "%s: %s has boxes up to frame %d; taken for its length, not %d", path, name, last, video.num_frames
      )
      videos[name] = video._replace(num_frames=last)
  for name in (name for split in test for name in split):
    if name not in videos:
      raise AnnotationError(f"{path}: the test video {name} is not annotated")
  return TubeGroundTruth(labels, videos, list(zip(train, test, strict=True)))


def _tube(label: Any, boxes: Any, place: str) -> Tube:
  if not isinstance(label, int | np.integer) or label < 0:
    raise AnnotationError(f"{place}: label {label!r}; expected an index from 0 up")
  try:
    table = np.array(boxes, np.float64)
  except (ValueError, TypeError):
    table = np.empty((0, 0))
  if table.ndim != 2 or table.shape[1:] != (5,) or not len(table):
    raise AnnotationError(f"{place}: a tube of class {label} is not a table of frame,x1,y1,x2,y2")
  table = table[np.argsort(table[:, 0], kind="stable")]
  frame = table[:, 0]
  if not np.isfinite(table).all() or frame[0] < 1 or (frame != np.floor(frame)).any() or (np.diff(frame) == 0).any():
    raise AnnotationError(f"{place}: a tube of class {label} holds what is not finite, or frames other than 1, 2, ...")
  inverted = table[(table[:, 1:3] > table[:, 3:]).any(axis=1)]
  if len(inverted):
    box = inverted[0, 1:].tolist()
    raise AnnotationError(f"{place}: frame {inverted[0, 0]:g}: the box {box} is inverted; expected x1,y1,x2,y2")
  return Tube(int(label), table)


def _size(resolution: Any) -> tuple[int, int] | None:
  return None if resolution is None else (int(resolution[0]), int(resolution[1]))


def _splits(names: list) -> list[list[str]]:
  return [names] if not names or isinstance(names[0], str) else [list(split) for split in names]


def _unexpected(
  path: PathLike, error: Exception, expected: str = "labels, test_videos and the tubes of every video"
) -> AnnotationError:
  what = f"the key {error} is missing" if isinstance(error, KeyError) else f"unexpected content ({error})"
  return AnnotationError(f"{path}: {what}; expected {expected}")


def _detections_of_query_csv(path: PathLike, num_classes: int, header: str) -> TubeDetections:
  columns = ["video", "frame", "query", "x1", "y1", "x2", "y2", "actor", *(f"s{k}" for k in range(num_classes))]
  if header.split(",") != columns:
    expected = f"{','.join(columns[:8])},s0..s{num_classes - 1}"
    raise AnnotationError(f"{path}:1: the header is {header}; expected {expected}, a score for each class")
  names, video, table = _read_rows(path, _split_csv, width=num_classes + 7, header=1)
  repeated = np.flatnonzero(positions(_groups(video, *table[:, :2].T)))
  if len(repeated):
    frame, query = table[repeated[0], :2]
    raise AnnotationError(f"{path}:{repeated[0] + 2}: query {query:g} of frame {frame:g} stands twice")
  return _detections(names, video, table[:, 0], table[:, 2:6], table[:, 6], table[:, 7:])


def _detections_of_box_csv(path: PathLike, num_classes: int) -> TubeDetections:
  names, video, table = _read_rows(path, _split_csv, width=7)
  label = table[:, 5] - 1
  bad = np.flatnonzero((label != np.floor(label)) | (label < 0) | (label >= num_classes))
  if len(bad):
    raise AnnotationError(f"{path}:{bad[0] + 1}: class id {table[bad[0], 5]:g}; expected one of 1 to {num_classes}")
  label = label.astype(np.int64)
  box = _groups(video, *table[:, :5].T)
  box += len(box) * positions(box * num_classes + label)  # what stands twice with one class is two detections
  _, first, box = np.unique(box, return_index=True, return_inverse=True)
  order = np.argsort(first)  # file order
  scores = np.full((len(first), num_classes), np.nan, np.float32)
  scores[np.argsort(order)[box], label] = table[:, 6]
  first = first[order]
  return _detections(names, video[first], table[first, 0], table[first, 1:5], np.full(len(first), np.nan), scores)


def _detections_of_lines(path: PathLike, num_classes: int) -> TubeDetections:
  names, video, table = _read_rows(path, _split_line, width=num_classes + 6)
  first = positions(_groups(video, *table.T)) == 0
  if not first.all():
    logger.warning("%s: %d lines repeat others word by word and are left out", path, (~first).sum())
    video, table = video[first], table[first]
  return _detections(names, video, _from_one(table[:, 0]), table[:, 1:5], table[:, -1], table[:, 5:-1])


def _detections_of_npz(path: PathLike, num_classes: int) -> TubeDetections:
  try:
    with np.load(path) as file:
      videos, video, frame, boxes, actor, scores = (file[name] for name in TubeDetections._fields)
  except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
    raise AnnotationError(f"{path}: not what write_detections writes, or damaged ({error})") from None
  shapes = [column.shape for column in (video, frame, boxes, actor, scores)]
  num_rows, length = len(scores), boxes.shape[1] if boxes.ndim == 3 else 1
  expected = [(num_rows,), (num_rows,), (num_rows, length, 4), (num_rows,), (num_rows, num_classes)]
  if shapes != expected:
    raise AnnotationError(f"{path}: video, frame, boxes, actor, scores of shapes {shapes}; expected {expected}")
  if ((video < 0) | (video >= len(videos)) | (frame < 1)).any():
    raise AnnotationError(f"{path}: a row's video is none of the {len(videos)}, or its frame less than 1")
  if not np.isfinite(boxes).all():
    raise AnnotationError(f"{path}: a box is not finite")
  return TubeDetections(videos.tolist(), video, frame, boxes, actor, scores)


def _detections(
  names: list[str], video: np.ndarray, frame: np.ndarray, boxes: np.ndarray, actor: np.ndarray, scores: np.ndarray
) -> TubeDetections:
  boxes = np.ascontiguousarray(boxes)[:, None]
  return TubeDetections(names, video, frame.astype(np.int32), boxes, actor.copy(), scores.astype(np.float32))


def _first_line(path: PathLike) -> str:
  """First line of a text file; something without a meaning for other files."""
  with open(path, "rb") as file:
    line = file.readline(1 << 16)
  if not line.strip():
    raise AnnotationError(f"{path}: the file is empty or starts with an empty line")
  return line.decode("utf-8-sig", "replace").strip()


def _read_rows(
  path: PathLike, split: Callable[[str], tuple[str, str]], *, width: int | None = None, header: int = 0
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Reads a text file that has a video, a frame, a box and more numbers in each line.

  Args:
    path: the file.
    split: cuts a line into the video's name ("" where it has none) and the numbers between commas, the frame first.
    width: how many numbers a line has; by default as many as the first.
    header: lines to skip.

  Returns:
    Names of the videos, ``[R]`` int32 index of each row's video, ``[R, width]`` float64 numbers.
  """
  first_frame = int(split is _split_csv)
  ids: dict[str, int] = {}
  videos, tables, line_number = [np.empty(0, np.int32)], [], header
  try:
    with open(path, encoding="utf-8-sig") as file:
      for _ in range(header):
        next(file)
      while lines := file.readlines(_CHUNK):
        parts = [split(line.strip()) for line in lines]
        table = _parse([numbers for _, numbers in parts], width)
        width = width or len(parts[0][1].split(","))
        if table is None or not all(name for name, _ in parts) or _problem(table, first_frame):
          for number, (name, numbers) in enumerate(parts, line_number + 1):
            _check_line(f"{path}:{number}", name, numbers, width, first_frame)
        videos.append(np.array([ids.setdefault(name, len(ids)) for name, _ in parts], np.int32))
        tables.append(table)
        line_number += len(lines)
  except UnicodeDecodeError:
    raise AnnotationError(f"{path}: not a text file") from None
  if not tables:
    raise AnnotationError(f"{path}: no rows")
  return list(ids), np.concatenate(videos), np.concatenate(tables)


def _parse(lines: list[str], width: int | None) -> np.ndarray | None:
  if "" in lines:
    return None
  try:
    table = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
  except ValueError:
    return None
  return table if len(table) == len(lines) and width in (None, table.shape[1]) else None


def _problem(table: np.ndarray, first_frame: int) -> str:
  """What is wrong with rows of numbers; empty where nothing is."""
  frame = table[:, 0]
  if not np.isfinite(table).all():
    return "a number is not finite"
  if (frame != np.floor(frame)).any() or (frame < first_frame).any():
    return f"frame {frame[0]:g}; frames are whole numbers from {first_frame} up"
  return ""


def _check_line(place: str, name: str, numbers: str, width: int, first_frame: int) -> None:
  fields = numbers.split(",")
  if not name:
    raise AnnotationError(f"{place}: the line is empty, names no video or is unlike the first one")
  if len(fields) != width:
    raise AnnotationError(f"{place}: {len(fields)} numbers, the frame included; expected {width}")
  for field in fields:
    if _parse([field], 1) is None:
      raise AnnotationError(f"{place}: {field.strip()!r} is not a number")
  if problem := _problem(np.array([[float(field) for field in fields]]), first_frame):
    raise AnnotationError(f"{place}: {problem}")


def _split_csv(line: str) -> tuple[str, str]:
  name, _, numbers = line.partition(",")
  return name, numbers


def _split_line(line: str) -> tuple[str, str]:
  match = _LINE.match(line)
  return (match[1], f"{match[2]},{match[3]}") if match else ("", "")


def _from_one(frame: np.ndarray) -> np.ndarray:
  """Frames that count from 1, of frames that may count from 0."""
  return frame + (frame.min() == 0)


def _groups(*columns: np.ndarray) -> np.ndarray:
  """Numbers rows so that those get the same number that agree in all columns: ``[R]`` int64."""
  order = np.lexsort(columns)
  new = np.zeros(len(order), bool)
  for column in columns:
    new[1:] |= np.diff(column[order]) != 0
  result = np.empty(len(order), np.int64)
  result[order] = np.cumsum(new)
  return result


def positions(group: np.ndarray) -> np.ndarray:
  """Position of each row among the rows of its group, from 0 up; groups are int64 ``[R]``."""
  order = np.argsort(group, kind="stable")
  start = np.flatnonzero(np.diff(group[order], prepend=group[order[:1]] - 1))
  result = np.empty(len(group), np.int64)
  result[order] = np.arange(len(group)) - np.repeat(start, np.diff(start, append=len(group)))
  return result
