"""Detections for other tools, and back: COCO-video JSON, AVA CSV, CVAT XML, supervision, FiftyOne.

    python -m vad_jax.interchange predictions/my_detections.json --to cvat --output my.xml
    python -m vad_jax.interchange my.xml --video my.mp4 --to json

In Python, on what `predict.predict_video` or `predictions.read_json` returns:

    interchange.write_cvat(result, "my.xml")
    corrected = interchange.read_cvat("my.xml", "my.mp4")

What survives the way there and back, besides names of classes, which AVA leaves to a label map:

| | times | boxes | people | scores | ids of classes |
| --- | --- | --- | --- | --- | --- |
| COCO | of the nearest frame | to 0.001 pixels | all | to 6 digits | all |
| CVAT | of the nearest frame | to 0.01 pixels | all | none: they are 1 | 1, 2, ... |
| AVA | to 1e-6 s | to 6 digits | linked anew | of actions | all |
| supervision | all | to float32 | all | all | all |
| FiftyOne | of the nearest frame | all | all | all | all |

CVAT has no keyframes without anybody; AVA has none without an action, nor people without one. Tubes, and scores of
actions that were not reported, are nowhere.

Frames are those of the video itself, found by their time stamps, so that variable frame rates are right.
"""

from pathlib import Path

from vad_jax.annotations import PathLike
from vad_jax.datasets import exports
from vad_jax.datasets.export_formats import Document
from vad_jax.interchange.ava import read_ava
from vad_jax.interchange.coco import read_coco, write_coco
from vad_jax.interchange.cvat import read_cvat, write_cvat
from vad_jax.interchange.libraries import from_fiftyone, from_supervision, to_fiftyone, to_supervision
from vad_jax.interchange.people import LabelMap, read_export
from vad_jax.predictions import Prediction, read_json
from vad_jax.predictions import write_csv as write_ava

__all__ = [
  "from_fiftyone",
  "from_supervision",
  "read",
  "read_ava",
  "read_coco",
  "read_cvat",
  "to_fiftyone",
  "to_supervision",
  "write_ava",
  "write_coco",
  "write_cvat",
]


def read(path: PathLike, video: PathLike | None = None, label_map: LabelMap | None = None) -> Prediction:
  """Reads JSON of `vad_jax.predict`, COCO JSON, AVA CSV or CVAT XML; the content tells which.

  Args:
    path: the file.
    video: the video; JSON of `vad_jax.predict` says itself where it is.
    label_map: ids or names of the actions, where the file does not give both.

  Raises:
    ValueError: the file is malformed or of no known format, or there is no video.
    OSError: a file cannot be read.
  """
  document = Document(Path(path), Path(path).read_bytes())
  if document.content.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{") and "keyframes" in document.json():
    result = read_json(path)
    return result if video is None else result._replace(source=Path(video))
  kind = exports.recognise(document)
  if kind is None and not document.content.startswith(b"PK"):
    raise ValueError(f"{path}: neither JSON of vad_jax.predict nor COCO JSON, AVA CSV or CVAT XML")
  if video is None:
    raise ValueError(f"{path}: does not say where its video is; give it with --video")
  if kind in ("csv", "datumaro"):
    return read_ava(path, video, label_map)
  return read_export(path, video, label_map)
