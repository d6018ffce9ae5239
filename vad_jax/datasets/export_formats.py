"""Formats of annotation tools: COCO-style JSON, VIA, and CSV as AVA and Datumaro have it; `cvat` is the fourth.

Each parser takes one `Document` to the `AnnotatedVideo`s in it. Frames stay numbers and boxes stay pixels where the
tool counts in them: only the video itself tells what time and which part of the picture they mean.

Something unexpected may leave a parser as any of ``PARSING_ERRORS``; `exports.read` makes one line of it.
"""

import collections
import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vad_jax.annotations import AnnotationError
from vad_jax.datasets.source_set import Problems

PARSING_ERRORS = (LookupError, TypeError, AttributeError, ValueError, OverflowError)

NOT_BOXES = "shapes that are no boxes, left out"
NO_ACTION = "boxes without an action, left out"
_ACTION_NAME = re.compile("action|activit|behaviou?r", re.IGNORECASE)
# Checkboxes that annotation tools and their users have for other things.
_OTHER_CHECKBOXES = {"occluded", "outside", "keyframe", "truncated", "difficult", "crowd", "iscrowd", "is_crowd"}
_UNSET = {"", "__undefined__", "undefined", "none"}
MOST_FRAMES = 10**7  # of a video, so that a slip in a number is told instead of filling the memory
_VIA_VIDEO, _VIA_TEXT, _VIA_CHECKBOX = 4, 1, 2
_VIA_RECTANGLE, _VIA_EXTREME_RECTANGLE = 2, 8
_FRAME_FILE = re.compile(r"(.*?)[/_-]*(?:frame|img|image)?[/_-]*(\d+)\.\w+")
DATUMARO_LABELS = "ava_action_list_v2.2.pbtxt"

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2


class Box(NamedTuple):
  """One person at one moment.

  Attributes:
    corners: see `AnnotatedVideo.size`.
    person: number of the track; of COCO without tracks a negative one, of others that of the box in its frame.
    actions: names of classes.
    score: that this is a person, in [0, 1]; 1 where annotated.
    action_scores: of each action; empty where all are 1.
  """

  corners: Corners
  person: int
  actions: tuple[str, ...]
  score: float = 1.0
  action_scores: tuple[float, ...] = ()


class AnnotatedVideo(NamedTuple):
  """The annotations of one video.

  Attributes:
    names: what the video may be called; the first that there is a video of counts.
    place: where they stand, for messages.
    clock: what moments are: "frames" count from 0 in order of presentation; "seconds" mean the nearest frame, and
      "shown" seconds the frame that a player shows then.
    moments: the annotated ones, ascending; with or without people.
    boxes_at: the boxes of a moment.
    size: height and width that corners refer to; None for those of the video.
    split: what the file says: "train", "val", "test" or nothing.
    drawn: the moments with a box that is not interpolated; None for all.
  """

  names: list[str]
  place: str
  clock: Literal["frames", "seconds", "shown"]
  moments: Sequence[float]
  boxes_at: Callable[[Any], list[Box]]
  size: tuple[float, float] | None
  split: str = ""
  drawn: Sequence[float] | None = None


class Document(NamedTuple):
  """A file.

  Attributes:
    path: its name, for messages; one in an archive counts as if the archive were a folder.
    content: what is in it.
  """

  path: Path
  content: bytes

  def text(self) -> str:
    try:
      return self.content.decode("utf-8-sig")
    except UnicodeDecodeError:
      raise AnnotationError(f"{self.path}: not a text file in UTF-8") from None

  def json(self) -> Any:
    try:
      return json.loads(self.text())
    except json.JSONDecodeError as error:
      raise AnnotationError(f"{self.path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
      raise AnnotationError(f"{self.path}: nested too deeply") from None

  def suggested_names(self) -> list[str]:
    """What the names of the file and of the folders around it say of the video."""
    return [self.path.stem, *(folder.stem for folder in self.path.parents[:2])]

  def split(self) -> str:
    """What the name of the file says of the split."""
    match = re.search(r"(?:^|[_.-])(train|val|test)(?:idation|ing)?(?:[_.-]|$)", self.path.stem.lower())
    return match[1] if match else ""


class Attribute(NamedTuple):
  """Something that a tool asks of every box.

  Attributes:
    name: of the attribute.
    kind: "switch" is on or off, "choice" one of the values, "text" anything, with commas between several.
    values: what can be chosen.
  """

  name: str
  kind: Literal["switch", "choice", "text"]
  values: list[str]

  def actions(self, value: Any) -> list[str]:
    """The actions that a value names."""
    if isinstance(value, list):
      return [action for item in value for action in self.actions(item)]
    text = str(value).strip()
    if self.kind == "switch":
      return [self.name] if text.lower() in ("true", "1") else []
    parts = re.split("[,;]", text) if self.kind == "text" else [text]
    return [part.strip() for part in parts if part.strip().lower() not in _UNSET]


class Classes:
  """Collects names of classes, in order of appearance, and decides which attributes name them.

  Attributes:
    names: the classes.
    wanted: names of attributes that name actions; where none are given, those that look like it.
    known: names of all attributes.
    chosen: names of those that are used.
  """

  def __init__(self, wanted: Sequence[str] = ()):
    self.names: dict[str, None] = {}
    self.wanted = wanted
    self.known: set[str] = set()
    self.chosen: set[str] = set()

  def choose(self, attributes: Iterable[Attribute], *, or_all: bool = False) -> dict[str, Attribute]:
    """The attributes that name actions, by their names; their values become classes.

    Args:
      attributes: of a label.
      or_all: take all of them where none looks like it.
    """
    found = {attribute.name: attribute for attribute in attributes}
    if self.wanted:
      chosen = {name: attribute for name, attribute in found.items() if name in self.wanted}
    else:
      chosen = {name: attribute for name, attribute in found.items() if _names_actions(attribute)}
      chosen = chosen or (found if or_all else {})
    self.known |= found.keys()
    self.chosen |= chosen.keys()
    for name, attribute in chosen.items():
      self.add([name] if attribute.kind == "switch" else attribute.values)
    return chosen

  def add(self, names: Iterable[str]) -> tuple[str, ...]:
    """Notes names that were met, and returns them without repetitions."""
    names = tuple(dict.fromkeys(name for name in names if name.lower() not in _UNSET))
    self.names.update(dict.fromkeys(names))
    return names


def is_readable_action(name: str) -> bool:
  """Whether a checkbox of this name is read as an action, and under this name."""
  return name == name.strip() and name.lower() not in _UNSET and _names_actions(Attribute(name, "switch", []))


def _names_actions(attribute: Attribute) -> bool:
  checkbox = attribute.kind == "switch" and attribute.name.lower() not in _OTHER_CHECKBOXES
  return checkbox or bool(_ACTION_NAME.search(attribute.name))


# ids of the classes, where the file gives them, and the annotations
Parsed = tuple[dict[int, str] | None, list[AnnotatedVideo]]


# --- COCO-style JSON ------------------------------------------------------------------------------------------


class _Image(NamedTuple):
  """Where an entry of ``images`` belongs."""

  video: str | None
  frame: int
  size: tuple[float, float] | None


def parse_coco(document: Document, classes: Classes, problems: Problems) -> Parsed:
  """COCO with frames of videos: by ``video_id`` and ``frame_id``, or by names of files such as ``clip/000012.jpg``.

  Frames count from 0, or from 1 where no frame is 0 and one is 1. Files of `vad_jax.interchange` always count from 0,
  and list the actions with their ids as ``action_categories``; those of a box are its checkboxes.
  """
  content = document.json()
  titles = {video["id"]: str(video.get("name") or video["file_name"]) for video in content.get("videos", [])}
  sizes = {video["id"]: _coco_size(video) for video in content.get("videos", [])}
  images: dict[Any, _Image] = {}
  for index, image in enumerate(content.get("images", [])):
    images[image["id"]] = _coco_image(image, f"{document.path}: images[{index}]", titles, sizes)
  first = min((image.frame for image in images.values()), default=0)
  listed = content.get("action_categories")
  base = int(first == 1 and listed is None)
  if base:
    problems.explain("frames that count from 1", {str(document.path): f"{document.path}: frame 1 is the first"})

  names = {category["id"]: str(category["name"]) for category in content["categories"]}
  ids = None if listed is None else {int(action["id"]): str(action["name"]) for action in listed}
  classes.add((ids or {}).values())
  attributes = classes.choose(_coco_attributes(content["annotations"]))
  by_label = ids is None and not attributes
  if by_label:
    ids = {int(index): name for index, name in names.items()}
    classes.add(names.values())
  frames: dict[str | None, dict[int, list[Box]]] = collections.defaultdict(dict)
  for image in images.values():
    frames[image.video].setdefault(image.frame - base, [])
  people: dict[Any, int] = {}  # boxes without a number of a track: one that stands twice does two things
  for index, annotation in enumerate(content["annotations"]):
    place = f"{document.path}: annotations[{index}]"
    if annotation.get("iscrowd"):
      problems.add("groups (iscrowd), left out", document.path, 1)
      continue
    if annotation["image_id"] not in images:
      raise AnnotationError(f"{place}: image_id {annotation['image_id']!r} is none of the images")
    if annotation["category_id"] not in names:
      raise AnnotationError(f"{place}: category_id {annotation['category_id']!r} is none of the categories")
    x, y, width, height = _numbers(annotation.get("bbox"), 4, f"{place}: bbox")
    given = annotation.get("attributes") or {}
    found = [names[annotation["category_id"]]]
    if not by_label:
      found = [action for name, attribute in attributes.items() for action in attribute.actions(given.get(name, ""))]
    image, corners = images[annotation["image_id"]], (x, y, x + width, y + height)
    track = annotation.get("track_id", annotation.get("instance_id", given.get("track_id")))
    if not isinstance(track, int) or track < 0:
      track = ~people.setdefault((annotation["image_id"], corners) if track is None else track, len(people))
    actions, score, of_actions = classes.add(found), annotation.get("score", 1), annotation.get("action_scores") or {}
    scores = [score, *(of_actions.get(action, score) for action in actions)]
    score, *scores = _numbers(scores, len(scores), f"{place}: score and action_scores")
    frames[image.video][image.frame - base].append(Box(corners, track, actions, score, tuple(scores)))
    problems.add(NO_ACTION, document.path, int(not actions))
  image_sizes: dict[str | None, Any] = {}
  for key, image in images.items():
    if image_sizes.setdefault(image.video, image.size) != image.size:
      raise AnnotationError(f"{document.path}: image {key} is not as large as others of {image.video}")
  return ids, [
    AnnotatedVideo(
      document.suggested_names() if video is None else [video],
      f"{document.path}: {video or 'frames of a video without name'}",
      "frames",
      sorted(found),
      found.__getitem__,
      image_sizes[video],
      document.split(),
    )
    for video, found in frames.items()
  ]


def _coco_image(image: dict[str, Any], place: str, titles: dict[Any, str], sizes: dict[Any, Any]) -> _Image:
  size = _coco_size(image) or sizes.get(image.get("video_id"))
  frame = next((image[name] for name in ("frame_id", "frame_index", "frame_num") if name in image), None)
  match = _FRAME_FILE.fullmatch(str(image.get("file_name", "")))
  if image.get("video_id") is not None:
    if image["video_id"] not in titles:
      raise AnnotationError(f"{place}: video_id {image['video_id']!r} is none of the videos")
    video: str | None = titles[image["video_id"]]
  else:
    video = match[1] or None if match else None
  if frame is None:
    if not match:
      raise AnnotationError(f"{place}: neither frame_id nor a number at the end of file_name tells the frame")
    frame = int(match[2])
  if not isinstance(frame, int) or not 0 <= frame <= MOST_FRAMES:
    raise AnnotationError(f"{place}: frame {frame!r}; expected a whole number from 0 up")
  return _Image(video, frame, size)


def _coco_size(entry: dict[str, Any]) -> tuple[float, float] | None:
  height, width = entry.get("height"), entry.get("width")
  return (float(height), float(width)) if height and width else None


def _coco_attributes(annotations: list[dict[str, Any]]) -> list[Attribute]:
  """Attributes by the values that they have; CVAT writes them."""
  values: dict[str, dict[Any, None]] = collections.defaultdict(dict)
  for annotation in annotations:
    for name, value in (annotation.get("attributes") or {}).items():
      values[name].update(dict.fromkeys(value if isinstance(value, list) else [value]))
  return [
    Attribute(name, "switch" if all(isinstance(v, bool) for v in found) else "choice", [])
    for name, found in values.items()
  ]


def _numbers(values: Any, count: int, place: str) -> list[float]:
  try:
    numbers = [float(value) for value in values]
  except (TypeError, ValueError):
    numbers = []
  if len(numbers) != count or not all(map(math.isfinite, numbers)):
    raise AnnotationError(f"{place} is {json.dumps(values)[:60]}; expected {count} numbers")
  return numbers


# --- VIA ------------------------------------------------------------------------------------------------------


def parse_via(document: Document, classes: Classes, problems: Problems) -> Parsed:
  """A VIA 3 project: boxes drawn on single frames of videos, with attributes."""
  content = document.json()
  spatial = {
    index: attribute for index, attribute in content["attribute"].items() if "_XY0" not in attribute["anchor_id"]
  }
  described = {index: _via_attribute(attribute) for index, attribute in spatial.items()}
  chosen = classes.choose(described.values(), or_all=True)  # there are no labels that could name actions
  frames: dict[str, dict[float, list[Box]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for key, region in content["metadata"].items():
    place = f"{document.path}: metadata {key}"
    if not region["xy"]:
      continue  # a segment of time
    if region["xy"][0] not in (_VIA_RECTANGLE, _VIA_EXTREME_RECTANGLE) or len(region["z"]) > 1:
      problems.add(NOT_BOXES, document.path, 1)
      continue
    file = content["file"][str(content["view"][str(region["vid"])]["fid_list"][0])]
    if file["type"] != _VIA_VIDEO:
      raise AnnotationError(f"{place}: {file['fname']} is no video; annotate videos in VIA's video annotator")
    [time] = _numbers(region["z"], 1, f"{place}: z")
    numbers = _numbers(region["xy"][1:], len(region["xy"]) - 1, f"{place}: xy")
    if region["xy"][0] == _VIA_RECTANGLE:
      x, y, width, height = _numbers(numbers, 4, f"{place}: xy without its first number")
      numbers = [x, y, x + width, y + height]
    corners = min(numbers[0::2]), min(numbers[1::2]), max(numbers[0::2]), max(numbers[1::2])
    actions = [
      action
      for index, value in region["av"].items()
      if index in described and described[index].name in chosen
      for action in _via_actions(described[index], spatial[index], value)
    ]
    boxes = frames[file["fname"]][time]
    if names := classes.add(actions):
      boxes.append(Box(corners, len(boxes), names))
    problems.add(NO_ACTION, document.path, int(not names))
  return None, [
    AnnotatedVideo([name], f"{document.path}: {name}", "shown", sorted(found), found.__getitem__, None)
    for name, found in frames.items()
  ]


def _via_attribute(attribute: dict[str, Any]) -> Attribute:
  is_text = attribute["type"] == _VIA_TEXT
  values = [] if is_text else [str(value) for value in attribute["options"].values()]
  return Attribute(str(attribute["aname"]), "text" if is_text else "choice", values)


def _via_actions(attribute: Attribute, source: dict[str, Any], value: Any) -> list[str]:
  """VIA keeps the keys of what was chosen, with commas between those of checkboxes."""
  if attribute.kind == "text":
    return attribute.actions(value)
  keys = str(value).split(",") if source["type"] == _VIA_CHECKBOX else [str(value)]
  return [str(source["options"][key]) for key in keys if key in source["options"]]


# --- CSV ------------------------------------------------------------------------------------------------------


def csv_header(line: str) -> bool | None:
  """Whether the first line of a CSV in AVA's columns is a header; None where it is no such CSV."""
  try:
    fields = next(csv.reader([line]), [])
  except csv.Error:
    return None
  if len(fields) not in (2, 7, 8):
    return None
  if _is_number(fields[1]):
    return False
  return True if fields[1].strip().lower() in ("timestamp", "time", "second", "seconds") else None


def label_file(path: Path) -> Path | None:
  """The label map beside a CSV: Datumaro's, or the only ``.pbtxt``."""
  found = sorted(path.parent.glob("*.pbtxt")) if path.parent.is_dir() else []
  if path.with_name(DATUMARO_LABELS) in found:
    return path.with_name(DATUMARO_LABELS)
  return found[0] if len(found) == 1 else None


def parse_csv(document: Document, classes: Classes, problems: Problems) -> Parsed:
  """Rows ``video,seconds,x1,y1,x2,y2,action[,person]``, the action by id or by name, boxes in [0, 1].

  A row of two columns names a keyframe without people. Names of ids come from the label map beside the file.
  """
  lines = document.text().splitlines()
  if lines and csv_header(lines[0]):
    lines[0] = ""
  rows = []
  try:
    for number, fields in zip(itertools.count(1), csv.reader(lines), strict=False):
      if fields:
        rows.append((f"{document.path}:{number}", [field.strip() for field in fields]))
  except csv.Error as error:
    raise AnnotationError(f"{document.path}: not a CSV: {error}") from None
  named = dict.fromkeys(fields[6] for _, fields in rows if len(fields) > 6)
  ids = {int(name) for name in named if name.isdecimal()} if all(map(str.isdecimal, named)) else None
  labels = label_file(document.path)
  if labels:
    given = _read_labels(labels)
    if 0 in given and 0 not in (ids or ()):
      del given[0]  # "no action", which Datumaro adds
  else:
    given = {index: f"class {index}" for index in sorted(ids or ())}
  classes.add(given.values())
  frames: dict[str, dict[float, list[Box]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for place, fields in rows:
    if len(fields) not in (2, 7, 8):
      raise AnnotationError(f"{place}: {len(fields)} columns; expected video,seconds,x1,y1,x2,y2,action[,person]")
    if not fields[0]:
      raise AnnotationError(f"{place}: names no video")
    [time] = _numbers([fields[1]], 1, f"{place}: the time")
    boxes = frames[fields[0]][time]
    if len(fields) == 2:
      continue
    x1, y1, x2, y2 = _numbers(fields[2:6], 4, f"{place}: the box")
    if max(map(abs, (x1, y1, x2, y2))) > 2:
      raise AnnotationError(f"{place}: the box is in pixels; expected x1,y1,x2,y2 in [0, 1] of the frame")
    action = given.get(int(fields[6]), "") if ids is not None else fields[6]
    if not action or (given and action not in given.values()):
      raise AnnotationError(f"{place}: {fields[6]!r} is none of the classes of {labels}")
    person = _numbers(fields[7:], 1, f"{place}: the person")[0] if len(fields) == 8 and fields[7] else None
    if person is None:
      known = [box.person for box in boxes if box.corners == (x1, y1, x2, y2)]
      person = known[0] if known else len(boxes)
    boxes.append(Box((x1, y1, x2, y2), int(person), classes.add([action])))
  return given or None, [
    AnnotatedVideo(
      [name], f"{document.path}: {name}", "seconds", sorted(found), found.__getitem__, (1, 1), document.split()
    )
    for name, found in frames.items()
  ]


def _read_labels(path: Path) -> dict[int, str]:
  """A label map; Datumaro leaves an id out that is 0."""
  text = Document(path, path.read_bytes()).text()
  names = {}
  for item in re.finditer(r"\b(?:item|label)\s*\{([^{}]*)\}", text):
    name, number = re.search(r'\bname:\s*"([^"]*)"', item[1]), re.search(r"\b(?:label_)?id:\s*(\d+)", item[1])
    if name is None:
      raise AnnotationError(f"{path}:{text.count(chr(10), 0, item.start()) + 1}: this class has no name")
    names[int(number[1]) if number else 0] = name[1]
  return names


def _is_number(text: str) -> bool:
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False
