"""CVAT's XML, "CVAT for video 1.1", to correct detections there."""

import collections
import json
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from vad_jax.annotations import AnnotationError, PathLike
from vad_jax.interchange.people import LabelMap, classes_of, on_frames, people_of, read_export
from vad_jax.predictions import Prediction

_CVAT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>0</id>
      <name>{{ video.stem }}</name>
      <size>{{ num_frames }}</size>
      <mode>interpolation</mode>
      <start_frame>0</start_frame>
      <stop_frame>{{ num_frames - 1 }}</stop_frame>
      <frame_filter></frame_filter>
      <labels>
        <label>
          <name>person</name>
          <type>rectangle</type>
          <attributes>
{% for name in classes %}
            <attribute>
              <name>{{ name }}</name>
              <mutable>True</mutable>
              <input_type>checkbox</input_type>
              <default_value>false</default_value>
              <values>false</values>
            </attribute>
{% endfor %}
          </attributes>
        </label>
      </labels>
      <original_size>
        <width>{{ width }}</width>
        <height>{{ height }}</height>
      </original_size>
      <source>{{ video.name }}</source>
    </task>
  </meta>
{% for person, shapes in tracks %}
  <track id="{{ person }}" label="person" source="auto">
{% for shape in shapes %}
    <box frame="{{ shape.frame }}" keyframe="1" outside="{{ shape.outside }}" occluded="0" \
xtl="{{ shape.corners[0] }}" ytl="{{ shape.corners[1] }}" xbr="{{ shape.corners[2] }}" ybr="{{ shape.corners[3] }}" \
z_order="0">
{% for name in classes %}
      <attribute name="{{ name }}">{{ "true" if name in shape.actions else "false" }}</attribute>
{% endfor %}
    </box>
{% endfor %}
  </track>
{% endfor %}
</annotations>
""")


class _Shape(NamedTuple):
  """A box of a CVAT track: its frame, whether the person is gone from there on, corners in pixels, names of actions."""

  frame: int
  outside: int
  corners: list[str]
  actions: set[str]


def write_cvat(result: Prediction, path: PathLike, label_map: LabelMap | None = None) -> None:
  """Writes "CVAT for video 1.1": a track for each person, to correct in CVAT and to train on again.

  The label is "person", with a checkbox for each action. Boxes are linear between keyframes in a row that have the
  person; the track is outside from the next one on that has not, or after 1.5 of the usual distance.
  ``<path>.labels.json`` beside the file describes the label for the tab "Raw" of a new task of CVAT, into which the
  file can then be uploaded.

  Args:
    result: what to write; its video has to be there.
    path: the file.
    label_map: the actions to choose from; by default those that somebody does.

  Raises:
    AnnotationError: nobody does anything, the video is another one, or a name of an action is of no use there.
    VideoError: the video cannot be read.
  """
  classes, (keyframes, num_frames) = classes_of(result, label_map), on_frames(result)
  if not classes:
    raise AnnotationError(f"{path}: nobody does anything; name the actions to choose from, with --labels")
  height, width = result.size
  frames = [*keyframes, num_frames]
  longest = int(1.5 * np.median(np.diff(list(keyframes)))) if len(keyframes) > 1 else num_frames
  tracks: dict[int, list[_Shape]] = collections.defaultdict(list)
  for (frame, keyframe), following in zip(keyframes.items(), frames[1:], strict=True):
    if len(set(keyframe.person.tolist())) < len(keyframe.person):
      raise AnnotationError(f"{path}: somebody is there twice at {keyframe.time:g} s; a track has one box in a frame")
    still_there = set(keyframes[following].person.tolist()) if following in keyframes else set()
    for corners, _, actions, person in people_of(keyframe):
      pixels = [f"{value:.2f}" for value in corners * (width, height, width, height)]
      shape = _Shape(frame, 0, pixels, {action.name for action in actions})
      end = min(following, frame + longest)
      tracks[person].append(shape)
      if person not in still_there and end < num_frames:
        tracks[person].append(shape._replace(frame=end, outside=1))
  names = list(classes.values())
  size = {"width": width, "height": height}
  stream = _CVAT.stream(
    video=result.source, num_frames=num_frames, classes=names, tracks=sorted(tracks.items()), **size
  )
  stream.enable_buffering(1000)
  stream.dump(str(path), encoding="utf-8")
  checkbox = {"input_type": "checkbox", "mutable": True, "default_value": "false", "values": ["false"]}
  label = {"name": "person", "type": "rectangle", "attributes": [{"name": name, **checkbox} for name in names]}
  labels_file(path).write_text(json.dumps([label], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def labels_file(path: PathLike) -> Path:
  """Where `write_cvat` describes the label."""
  return Path(path).with_suffix(".labels.json")


def read_cvat(path: PathLike, video: PathLike, label_map: LabelMap | None = None) -> Prediction:
  """Reads "CVAT for video 1.1": one keyframe for each frame with a box that is not interpolated, all scores 1.

  Args:
    path: the file, or the archive that CVAT exports.
    video: see `read_coco`.
    label_map: ids of the actions; by default 1, 2, ... in the order of the file.

  Raises:
    AnnotationError: see `read_coco`.
    VideoError: see `read_coco`.
  """
  return read_export(path, video, label_map, "cvat")
