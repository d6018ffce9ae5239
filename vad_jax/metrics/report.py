"""One HTML page on a run: headline numbers, AP by class, keyframes drawn, annotated video, settings.

The page opens offline and needs no JavaScript: pictures are part of it, and so is a small video.
"""

import base64
import importlib.resources
import json
import math
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np

import vad_jax
from vad_jax.annotations import PathLike
from vad_jax.metrics.frame_map import FrameMap

_INLINE_VIDEO_BYTES = 6 << 20  # larger videos stay a file beside the page
_SHOWN = {"frame_map_50": "frame-mAP@0.5", "person_ap_50": "person AP@0.5", "wall_seconds": "wall time"}


class _ClassRow(NamedTuple):
  index: int
  name: str
  ap: float
  num_ground_truth: int
  num_detections: int
  num_train: int | None


class _Figure(NamedTuple):
  caption: str
  source: str
  width: int
  height: int


def write_report(
  path: PathLike,
  *,
  title: str,
  metrics: Mapping[str, Any],
  frame_map: FrameMap,
  label_map: Mapping[int, str],
  train_counts: Mapping[int, int] | None = None,
  examples: Sequence[tuple[str, np.ndarray]] = (),
  video: PathLike | None = None,
  config: Mapping[str, Any] | None = None,
) -> None:
  """Writes the page.

  Args:
    path: the HTML file; its directory has to exist.
    title: heading, for example the name of the run.
    metrics: name to number; fractions under ``frame_map_50`` and ``person_ap_50`` and seconds under
      ``wall_seconds`` become the headline, the rest a table.
    frame_map: what the bars show.
    label_map: class id to name.
    train_counts: class id to number of training boxes.
    examples: captions and ``[H, W, 3]`` uint8 RGB pictures.
    video: an mp4; becomes part of the page when it is small, else a link relative to the page.
    config: settings of the run, shown folded.

  Raises:
    FileNotFoundError: there is no such video or directory.
  """
  path = Path(path)
  rows = [
    _ClassRow(
      index,
      label_map[index],
      ap,
      frame_map.num_ground_truth[index],
      frame_map.num_detections[index],
      None if train_counts is None else int(train_counts.get(index, 0)),
    )
    for index, ap in frame_map.ap.items()
  ]
  environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
  environment.filters |= {"percent": _percent, "number": _number}
  template = environment.from_string(
    importlib.resources.files("vad_jax.metrics").joinpath("report.html").read_text(encoding="utf-8")
  )
  page = template.render(
    title=title,
    headline=[(label, _headline(name, metrics[name])) for name, label in _SHOWN.items() if name in metrics],
    metrics={name: value for name, value in metrics.items() if name not in _SHOWN},
    frame_map=frame_map,
    num_boxes=sum(frame_map.num_ground_truth.values()),
    scored=sorted((row for row in rows if not math.isnan(row.ap)), key=lambda row: (-row.ap, row.name)),
    unscored=[row.name for row in rows if math.isnan(row.ap)],
    has_train_counts=train_counts is not None,
    figures=[_figure(caption, image) for caption, image in examples],
    video=None if video is None else _video_source(Path(video), path),
    config=None if config is None else json.dumps(config, indent=2, default=str),
    version=vad_jax.__version__,
  )
  unfinished = path.with_name(path.name + ".part")
  unfinished.write_text(page, encoding="utf-8")
  unfinished.replace(path)


def _headline(name: str, value: float) -> str:
  if name != "wall_seconds":
    return _percent(value)
  minutes, seconds = divmod(round(value), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _percent(value: float) -> str:
  return f"{100 * value:.1f} %"


def _number(value: Any) -> str:
  if isinstance(value, int | np.integer):
    return f"{int(value):,}"
  return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _figure(caption: str, image: np.ndarray) -> _Figure:
  _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
  height, width = image.shape[:2]
  return _Figure(caption, _data_uri("image/jpeg", data.tobytes()), width, height)


def _video_source(video: Path, page: Path) -> str:
  if video.stat().st_size <= _INLINE_VIDEO_BYTES:
    return _data_uri("video/mp4", video.read_bytes())
  return urllib.parse.quote(Path(os.path.relpath(video, page.parent)).as_posix())


def _data_uri(kind: str, data: bytes) -> str:
  return f"data:{kind};base64,{base64.b64encode(data).decode()}"
