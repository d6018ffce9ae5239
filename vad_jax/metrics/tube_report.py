"""One HTML page on detected tubes: frame-mAP and video-mAP, over IoUs and by class."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vad_jax.annotations import PathLike
from vad_jax.metrics.page import chart, duration, percent, write_page
from vad_jax.metrics.video_map import IOUS, VideoMap

_HEADLINE = ("frame-mAP@0.5", "video-mAP@0.2", "video-mAP@0.5", "video-mAP@0.75", "video-mAP@0.5:0.95")
_SPANS = {"0.2": (0.2,), "0.5": (0.5,), "0.75": (0.75,), "0.5:0.95": IOUS[9:]}


class _ClassRow(NamedTuple):
  name: str
  frame_ap: float
  video_ap: float
  num_boxes: int
  num_tubes: int
  num_linked: int
  num_train: int | None


def write_tube_report(
  path: PathLike,
  result: VideoMap,
  *,
  title: str,
  facts: Mapping[str, Any] | None = None,
  metrics: Mapping[str, Any] | None = None,
  train_counts: Mapping[int, int] | None = None,
  video: PathLike | None = None,
  maps: Sequence[PathLike] = (),
  config: Mapping[str, Any] | None = None,
) -> None:
  """Writes the page, and its numbers to a file of the same name that ends in ``.json``.

  Args:
    path: the HTML file; its directory has to exist.
    result: what the page shows.
    title: heading, for example the name of the run.
    facts: what was scored and how; shown as a table.
    metrics: name to number; ``wall_seconds`` becomes part of the headline, the rest a table.
    train_counts: class id (from 1 up) to number of training tubes.
    video: an mp4; becomes part of the page when it is small, else a link relative to the page.
    maps: pictures of what the model sees where in that video.
    config: settings of the run, shown folded.

  Raises:
    FileNotFoundError: there is no such video or directory.
  """
  metrics, facts = dict(metrics or {}), dict(facts or {})
  headline = [(name, percent(result.summary[name])) for name in _HEADLINE]
  if "wall_seconds" in metrics:
    headline.append(("wall time", duration(metrics["wall_seconds"])))
  counts = {
    "test videos": result.num_videos,
    "annotated boxes": int(result.num_boxes.sum()),
    "annotated tubes": int(result.num_tubes.sum()),
    "detected boxes": result.num_detections,
    "detected tubes": int(result.num_linked.sum()),
  }
  means = {
    kind: {iou: float(np.nanmean(ap)) for iou, ap in by_iou.items()}
    for kind, by_iou in (("frame", result.frame_ap), ("video", result.video_ap))
  }
  write_page(
    path,
    "tube_report.html",
    title=title,
    headline=headline,
    facts=counts | facts | {name: value for name, value in metrics.items() if name != "wall_seconds"},
    numbers={"facts": facts, "metrics": metrics, "train_counts": train_counts, "result": result},
    video=video,
    maps=maps,
    config=config,
    warnings=[],
    result=result,
    spans=list(_SPANS),
    table={kind: [float(np.mean([ap[iou] for iou in ious])) for ious in _SPANS.values()] for kind, ap in means.items()},
    charts={
      kind: chart(f"{kind}-mAP by IoU", "least IoU", [(f"{iou:.1f}"[1:], ap[iou], "") for iou in IOUS[1::2]])
      for kind, ap in means.items()
    },
    rows=_class_rows(result, train_counts),
    has_train_counts=train_counts is not None,
  )


def _class_rows(result: VideoMap, train_counts: Mapping[int, int] | None) -> list[_ClassRow]:
  """The classes; those with most training tubes come first, or without such counts those with most annotated ones."""
  rows = [
    _ClassRow(
      name,
      *(float(result.frame_ap[0.5][k]), float(result.video_ap[0.5][k])),
      *(int(result.num_boxes[k]), int(result.num_tubes[k]), int(result.num_linked[k])),
      None if train_counts is None else train_counts.get(k + 1, 0),
    )
    for k, name in enumerate(result.labels)
  ]
  return sorted(rows, key=lambda row: -(row.num_tubes if row.num_train is None else row.num_train))
