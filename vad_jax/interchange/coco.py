"""COCO JSON with frames of videos, which annotation and tracking tools read."""

import json
from pathlib import Path

import vad_jax
from vad_jax.annotations import PathLike
from vad_jax.interchange.people import LabelMap, classes_of, on_frames, people_of, read_export
from vad_jax.predictions import Prediction


def write_coco(result: Prediction, path: PathLike, label_map: LabelMap | None = None) -> None:
  """Writes COCO JSON with ``videos``, ``video_id`` and ``frame_id`` (from 0), which annotation and tracking tools read.

  A person is one annotation of the category "person", with ``score``, ``track_id`` (``instance_id`` is the same), a
  checkbox among the ``attributes`` for each action that is done, and, beside what others read, ``action_scores`` by
  name. An image stands for each keyframe, with anybody or not; ``action_categories`` lists the actions with their ids.

  Args:
    result: what to write; its video has to be there.
    path: the file.
    label_map: all actions that there are; by default those that somebody does.

  Raises:
    AnnotationError: the video is another one, or a name of an action is of no use there; says which.
    VideoError: the video cannot be read.
  """
  classes, (keyframes, _) = classes_of(result, label_map), on_frames(result)
  height, width = result.size
  size = {"width": width, "height": height}
  images, boxes = [], []
  for frame, keyframe in keyframes.items():
    image = {
      "id": len(images) + 1,
      "video_id": 1,
      "frame_id": frame,
      "file_name": f"{result.source.stem}/{frame:06d}.jpg",
    }
    images.append({**image, **size})
    for corners, score, actions, person in people_of(keyframe):
      x1, y1, x2, y2 = (corners * (width, height, width, height)).tolist()
      boxes.append(
        {
          "id": len(boxes) + 1,
          "image_id": image["id"],
          "video_id": 1,
          "category_id": 1,
          "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
          "area": round((x2 - x1) * (y2 - y1), 3),
          "iscrowd": 0,
          "track_id": person,
          "instance_id": person,
          "score": round(score, 6),
          "attributes": {action.name: True for action in actions},
          "action_scores": {action.name: round(action.score, 6) for action in actions},
        }
      )
  content = {
    "info": {"description": f"people and actions in {result.source.name}", "version": f"vad_jax {vad_jax.__version__}"},
    "licenses": [],
    "videos": [{"id": 1, "name": result.source.name, "fps": result.fps, **size}],
    "categories": [{"id": 1, "name": "person"}],
    "action_categories": [{"id": index, "name": name} for index, name in classes.items()],
    "images": images,
    "annotations": boxes,
  }
  Path(path).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read_coco(path: PathLike, video: PathLike, label_map: LabelMap | None = None) -> Prediction:
  """Reads COCO JSON of `write_coco` or of other tools; `vad_jax.datasets.exports` says what names actions there.

  Args:
    path: the file; may hold other videos as well.
    video: the video; the file has to call it like this.
    label_map: ids of the actions; by default those of the file, or from 1 up.

  Raises:
    AnnotationError: the file is malformed, or does not fit video or label map; says where.
    VideoError: the video cannot be read, or the file does not have it.
  """
  return read_export(path, video, label_map, "coco")
