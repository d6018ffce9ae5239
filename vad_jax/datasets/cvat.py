"""CVAT's XML, "CVAT for video 1.1": tracks whose boxes are linear between keyframes, of a task, a job or a project."""

import bisect
import collections
import io
import math
import re
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from vad_jax.annotations import AnnotationError
from vad_jax.datasets.export_formats import (
  MOST_FRAMES,
  NO_ACTION,
  NOT_BOXES,
  AnnotatedVideo,
  Attribute,
  Box,
  Classes,
  Corners,
  Document,
  Parsed,
)
from vad_jax.datasets.source_set import Problems

_LABEL_TYPES = ("any", "rectangle", "bbox", "")  # others have no boxes


class _Track(NamedTuple):
  """Boxes of one CVAT track.

  Attributes:
    number: its id.
    frames: ``[n]`` ascending.
    boxes: ``[n, 5]`` x1, y1, x2, y2 and clockwise rotation in degrees.
    outside: ``[n]`` whether the person is out of the picture from this frame on.
    actions: of each box, until the next.
    drawn: frames where somebody drew the person, who is there.
  """

  number: int
  frames: list[int]
  boxes: np.ndarray
  outside: list[bool]
  actions: list[tuple[str, ...]]
  drawn: set[int]

  def at(self, frame: int) -> Box | None:
    """The box of a frame: linear between two that are given, the last one for ever after."""
    here = bisect.bisect_right(self.frames, frame) - 1
    if here < 0 or self.outside[here]:
      return None
    box = self.boxes[here]
    if here + 1 < len(self.frames) and frame > self.frames[here]:
      share = (frame - self.frames[here]) / (self.frames[here + 1] - self.frames[here])
      step = self.boxes[here + 1] - box
      step[4] = (step[4] + 180) % 360 - 180  # the short way round
      box = box + share * step
    return Box(_around(box), self.number, self.actions[here])


def _around(box: np.ndarray) -> Corners:
  """The upright box around a rotated one."""
  x1, y1, x2, y2, angle = box.tolist()
  if not angle:
    return x1, y1, x2, y2
  cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
  half_width = ((x2 - x1) * cos + (y2 - y1) * sin) / 2
  half_height = ((x2 - x1) * sin + (y2 - y1) * cos) / 2
  x, y = (x1 + x2) / 2, (y1 + y2) / 2
  return x - half_width, y - half_height, x + half_width, y + half_height


def parse(document: Document, classes: Classes, problems: Problems) -> Parsed:
  """CVAT for video 1.1: of a task, a job or a project."""
  meta: ElementTree.Element | None = None
  chosen: dict[str, dict[str, Attribute]] = {}
  tracks: dict[str, list[_Track]] = collections.defaultdict(list)
  try:
    for _, element in ElementTree.iterparse(io.BytesIO(document.content)):
      if element.tag == "meta":
        meta = element
        for label in meta.iter("label"):
          if label.findtext("type", "any") in _LABEL_TYPES and not label.findtext("parent"):
            name = _text(label, "name")
            chosen[name] = classes.choose(map(_attribute, label.iter("attribute")))
            classes.add([] if chosen[name] else [name])
      elif element.tag == "track":
        track = _track(element, document, chosen, classes, problems)
        if track.frames:
          tracks[element.get("task_id", "")].append(track)
        element.clear()
      elif element.tag == "image":
        raise AnnotationError(f'{document.path}: is "CVAT for images"; export the task as "CVAT for video 1.1"')
  except ElementTree.ParseError as error:
    raise AnnotationError(f"{document.path}:{error.position[0]}: not valid XML: {error}") from None
  if meta is None:
    raise AnnotationError(f"{document.path}: no <meta>; expected an export of CVAT for video 1.1")
  tasks = [*meta.iter("task")] or [*meta.iter("job")]
  if not tasks:
    raise AnnotationError(f"{document.path}: <meta> has neither <task> nor <job>")
  source = meta.findtext("source") or ""
  return None, [_video(task, source, tracks, document, alone=len(tasks) == 1) for task in tasks]


def _attribute(element: ElementTree.Element) -> Attribute:
  kinds: dict[str, Any] = {"checkbox": "switch", "text": "text", "number": "text"}
  kind = kinds.get(element.findtext("input_type", ""), "choice")
  values = element.findtext("values", "").split("\n") if kind == "choice" else []
  return Attribute(_text(element, "name"), kind, [value.strip() for value in values])


def _track(
  element: ElementTree.Element,
  document: Document,
  chosen: dict[str, dict[str, Attribute]],
  classes: Classes,
  problems: Problems,
) -> _Track:
  place = f"{document.path}: track {element.get('id')}"
  label = element.get("label")
  if label is None:
    raise AnnotationError(f"{place}: has no label")
  attributes = chosen.get(label, {})
  found: dict[int, tuple[list[float], bool, tuple[str, ...]]] = {}
  drawn = set()
  problems.add(NOT_BOXES, document.path, sum(shape.tag not in ("box", "attribute") for shape in element))
  for shape in element.findall("box"):
    frame = _number(shape, "frame", place, whole=True)
    where = f"{place}, frame {frame:g}"
    box = [_number(shape, name, where) for name in ("xtl", "ytl", "xbr", "ybr")]
    box.append(_number(shape, "rotation", where) if "rotation" in shape.attrib else 0.0)
    names = [label]
    if attributes:
      given = {a.get("name", ""): a.text or "" for a in (*element.findall("attribute"), *shape.findall("attribute"))}
      names = [action for name, attribute in attributes.items() for action in attribute.actions(given.get(name, ""))]
    if frame in found:
      raise AnnotationError(f"{where}: two boxes of one track in one frame")
    gone = shape.get("outside") == "1"
    if not gone and shape.get("keyframe") != "0":
      drawn.add(int(frame))
    found[int(frame)] = box, gone, classes.add(names)
  problems.add(NO_ACTION, document.path, sum(not actions and not outside for _, outside, actions in found.values()))
  frames = sorted(found)
  boxes, outside, actions = zip(*(found[frame] for frame in frames), strict=True) if found else ((), (), ())
  number = element.get("id", "")
  return _Track(int(number) if number.isdecimal() else -1, frames, np.array(boxes), list(outside), list(actions), drawn)


def _video(
  task: ElementTree.Element,
  source: str,
  tracks: dict[str, list[_Track]],
  document: Document,
  *,
  alone: bool,
) -> AnnotatedVideo:
  """One task. Frames count as annotated from the first to the last box, as far as the task was to be annotated."""
  number = task.findtext("id", "")
  mine = [*tracks.get(number, []), *(tracks.get("", []) if alone else [])]
  place = f"{document.path}: task {number}"
  ends = [track.frames[-1] for track in mine]
  start = _field(task, "start_frame", 0, place)
  step = re.search(r"step\s*=\s*(\d+)", task.findtext("frame_filter", ""))
  stride = max(int(step[1]), 1) if step else 1
  last = start + (_field(task, "size", 1, place) - 1) * stride
  stop = max([_field(task, "stop_frame", last, place), *ends])
  if max(stop, stride) > MOST_FRAMES:
    raise AnnotationError(f"{place}: frame {stop} with step {stride}: no video is that long")
  still_there = any(not track.outside[-1] for track in mine)
  first = min((track.frames[0] for track in mine), default=start)
  last = stop if still_there else max(ends, default=start) - 1
  moments = [frame for frame in range(start, stop + 1, stride) if first <= frame <= last]
  size = task.find("original_size")
  if size is None:
    raise AnnotationError(f"{place}: no <original_size>; export the task of a video, not of images")
  height, width = (_field(size, name, 0, f"{place}, original_size") for name in ("height", "width"))
  if min(height, width) < 1:
    raise AnnotationError(f"{place}: original_size is {width} x {height}")
  names = [task.findtext("source") or source, task.findtext("name", ""), *document.suggested_names()]

  def boxes_at(frame: int) -> list[Box]:
    return [box for track in mine if (box := track.at(frame))]

  subset = task.findtext("subset", "").lower()
  split = next((split for split in ("train", "val", "test") if subset.startswith(split)), "")
  drawn = sorted({frame for track in mine for frame in track.drawn}.intersection(moments))
  return AnnotatedVideo(names, place, "frames", moments, boxes_at, (height, width), split, drawn)


def _text(element: ElementTree.Element, name: str) -> str:
  text = element.findtext(name, "").strip()
  if not text:
    raise ValueError(f"a <{element.tag}> has no {name}")
  return text


def _field(element: ElementTree.Element, name: str, default: int, place: str) -> int:
  text = (element.findtext(name) or str(default)).strip()
  if not text.isdecimal():
    raise AnnotationError(f"{place}: {name} is {text!r}; expected a whole number")
  return int(text)


def _number(element: ElementTree.Element, name: str, place: str, *, whole: bool = False) -> float:
  text = element.get(name, "nothing")
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not math.isfinite(value) or (whole and not 0 <= value == int(value)):
    raise AnnotationError(f"{place}: {name} is {text!r}; expected a {'whole ' if whole else ''}number")
  return value
