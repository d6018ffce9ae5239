"""Frame-mAP and video-mAP of tube data sets: JHMDB51-21, UCF101-24 and MultiSports.

Frame-mAP compares boxes, video-mAP tubes: the boxes of one person through a video, which `linking` links. Three
protocols are in use, and the same detections get different numbers from them:

* ``act`` (ACT, MOC): sides of boxes are one pixel longer than the difference of their coordinates. Scores are lowered
  by soft NMS, tubes linked greedily and thinned by NMS. A box or tube that was claimed is not there for the next
  detection. AP is the area under the curve itself. A class without ground truth counts 0.
* ``class_query``: in frames, a detection whose best box was claimed is wrong, sides are differences, and AP is the
  area under the curve's envelope, as in AVA's protocol; classes without ground truth are left out. Tubes are linked by
  Viterbi and cut in time, with sides of boxes and claims as in ``act``; recall is hits / (annotations + 1e-5), so that
  perfect tubes give 0.99999; classes without ground truth count 0. Two rules depend on the data set. JHMDB: every
  detection may be of every class, and tubes are compared in space only. UCF101-24: a detection enters the tubes of its
  best class alone, and if it is a person with 0.7 or more.
* ``multisports``: as in AVA's protocol, with tubes linked as in ``act`` and not thinned; each detection is of its best
  class alone. Classes without ground truth and six others are left out. mmaction2, from which it comes, gives all
  detections of a video the score of the last one; this error is not repeated, so that its figures differ.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from vad_jax import progress
from vad_jax.metrics.frame_map import average_precision, true_positives
from vad_jax.metrics.linking import (
  Candidates,
  LinkedTube,
  box_iou,
  link_by_viterbi,
  link_greedily,
  soft_nms,
  tube_nms,
  tube_overlaps,
)
from vad_jax.tubes import TubeDetections, TubeGroundTruth, positions

Protocol = Literal["act", "class_query", "multisports"]
Dataset = Literal["jhmdb", "ucf101_24"]

IOUS = tuple(k / 100 for k in range(5, 100, 5))  # least IoU of a hit, inclusive
_SUMMARY = {
  "frame-mAP@0.5": (0.5,),
  "frame-mAP@0.75": (0.75,),
  "video-mAP@0.2": (0.2,),
  "video-mAP@0.5": (0.5,),
  "video-mAP@0.75": (0.75,),
  "video-mAP@0.05:0.45": IOUS[:9],
  "video-mAP@0.1:0.9": IOUS[1:18:2],
  "video-mAP@0.5:0.95": IOUS[9:],
}
_LEFT_OUT_OF_MULTISPORTS = {
  "aerobic kick jump",
  "aerobic off axis jump",
  "aerobic butterfly jump",
  "aerobic balance turn",
  "basketball save",
  "basketball jump ball",
}
_UCF_ACTOR = 0.7


class VideoMap(NamedTuple):
  """Frame-mAP and video-mAP, as fractions in [0, 1].

  Attributes:
    protocol: by which they were computed.
    dataset: whose rules were taken, where the protocol has several.
    split: index of the split; None for the mean over several.
    labels: names of the ``K`` classes.
    summary: means over classes, and over the IoUs where it says so: ``frame-mAP@0.5``, ``frame-mAP@0.75``,
      ``video-mAP@`` with ``0.2``, ``0.5``, ``0.75``, ``0.05:0.45``, ``0.1:0.9`` (step 0.1), ``0.5:0.95``.
    frame_ap: least IoU (0.05, 0.1, ..., 0.95) to ``[K]`` AP of boxes; NaN where the class is left out.
    video_ap: least IoU to ``[K]`` AP of tubes; NaN where the class is left out.
    num_videos: test videos.
    num_boxes: ``[K]`` annotated boxes.
    num_tubes: ``[K]`` annotated tubes.
    num_detections: rows that were scored.
    num_ignored: rows in videos that are no test videos.
    num_linked: ``[K]`` detected tubes.
  """

  protocol: Protocol
  dataset: Dataset | None
  split: int | None
  labels: list[str]
  summary: dict[str, float]
  frame_ap: dict[float, np.ndarray]
  video_ap: dict[float, np.ndarray]
  num_videos: int
  num_boxes: np.ndarray
  num_tubes: np.ndarray
  num_detections: int
  num_ignored: int
  num_linked: np.ndarray


class _Truth(NamedTuple):
  """Annotations of one class.

  Attributes:
    video: ``[n]`` index of each tube's video.
    boxes: ``[n]`` tables of frame, x1, y1, x2, y2.
  """

  video: np.ndarray
  boxes: list[np.ndarray]


def video_map(
  ground_truth: TubeGroundTruth,
  detections: TubeDetections,
  *,
  protocol: Protocol,
  dataset: Dataset | None = None,
  split: int = 0,
) -> VideoMap:
  """Scores the detections on the test videos of one split; see the module for the protocols.

  Args:
    ground_truth: annotations.
    detections: boxes of frames; for ``act``, tubelets as well.
    protocol: how to score.
    dataset: whose rules ``class_query`` shall take; None for the other protocols.
    split: index of the split, from 0 up.

  Raises:
    ValueError: the arguments do not fit each other, or the detections the ground truth; says why.
  """
  _check(ground_truth, detections, protocol, dataset, split)
  names = ground_truth.splits[split][1]
  if protocol == "class_query":
    names = sorted(names)
    _check_same_videos(names, detections)
  num_frames = np.array([ground_truth.videos[name].num_frames for name in names])
  found = _of_videos(detections, names, num_frames)
  in_frames, in_tubes = _members(found, protocol, dataset)
  labels = ground_truth.labels
  without_truth = {"act": (0, 0), "class_query": (np.nan, 0), "multisports": (np.nan, np.nan)}[protocol]
  frame_ap, video_ap = (np.full((len(IOUS), len(labels)), value, np.float64) for value in without_truth)
  num_boxes, num_tubes, num_linked = np.zeros((3, len(labels)), np.int64)
  with progress.bar("scoring classes", len(labels)) as advance:
    for k, label in enumerate(labels):
      truth = _truth_of_class(ground_truth, names, k)
      num_boxes[k], num_tubes[k] = sum(map(len, truth.boxes)), len(truth.boxes)
      tubes = _link(_candidates(found, k, in_tubes[:, k]), num_frames, protocol, dataset)
      num_linked[k] = len(tubes)
      if truth.boxes and not (protocol == "multisports" and label in _LEFT_OUT_OF_MULTISPORTS):
        frame_ap[:, k] = _frame_ap(_candidates(found, k, in_frames[:, k]), truth, protocol)
        video_ap[:, k] = _video_ap(tubes, truth, protocol, dataset)
      advance()
  if not num_boxes.any() or np.isnan(video_ap).all():
    raise ValueError(f"no class that {protocol} scores is annotated in the test videos: nothing to score against")
  by_iou = {"frame": dict(zip(IOUS, frame_ap, strict=True)), "video": dict(zip(IOUS, video_ap, strict=True))}
  summary = {
    name: float(np.mean([np.nanmean(by_iou[name.split("-")[0]][iou]) for iou in ious]))
    for name, ious in _SUMMARY.items()
  }
  num_ignored = len(detections.frame) - len(found.frame)
  return VideoMap(
    *(protocol, dataset, split, labels, summary, by_iou["frame"], by_iou["video"]),
    *(len(names), num_boxes, num_tubes, len(found.frame), num_ignored, num_linked),
  )


def mean_over_splits(results: Sequence[VideoMap]) -> VideoMap:
  """Mean of the figures of several splits, as JHMDB51-21 reports them; counts are sums.

  Raises:
    ValueError: the results are not of one protocol, or two of them of the same split.
  """
  first = results[0]
  if len({(r.protocol, r.dataset, *r.labels) for r in results}) > 1 or len({r.split for r in results}) < len(results):
    raise ValueError("expected results of one protocol and data set, each of another split")
  mean = {name: float(np.mean([r.summary[name] for r in results])) for name in first.summary}
  frame_ap = {iou: np.mean([r.frame_ap[iou] for r in results], axis=0) for iou in IOUS}
  video_ap = {iou: np.mean([r.video_ap[iou] for r in results], axis=0) for iou in IOUS}
  counts = {name: sum(getattr(r, name) for r in results) for name in first._fields if name.startswith("num_")}
  return first._replace(split=None, summary=mean, frame_ap=frame_ap, video_ap=video_ap, **counts)


def _check(truth: TubeGroundTruth, detections: TubeDetections, protocol: str, dataset: str | None, split: int) -> None:
  if protocol not in get_args(Protocol):
    raise ValueError(f"protocol {protocol!r}; expected one of {', '.join(get_args(Protocol))}")
  if (dataset in get_args(Dataset)) != (protocol == "class_query") or dataset not in (None, *get_args(Dataset)):
    raise ValueError(f"{protocol} with the rules of {dataset}; class_query needs jhmdb or ucf101_24, the others None")
  if not 0 <= split < len(truth.splits):
    raise ValueError(f"split {split}; the ground truth has {len(truth.splits)}, from 0 up")
  if detections.scores.shape[1] != len(truth.labels):
    raise ValueError(f"detections of {detections.scores.shape[1]} classes; the ground truth has {len(truth.labels)}")
  if detections.boxes.shape[1] > 1 and protocol != "act":
    raise ValueError(f"tubelets of {detections.boxes.shape[1]} frames; {protocol} links boxes of single frames")
  if dataset == "ucf101_24" and np.isnan(detections.actor).any():
    raise ValueError("detections without actor probability, which the rules of ucf101_24 need")
  if detections.boxes.size and np.abs(detections.boxes).max() <= 2:
    raise ValueError("no coordinate exceeds 2, so that boxes seem normalised to [0, 1]; expected pixels")


def _check_same_videos(names: list[str], detections: TubeDetections) -> None:
  present = set(detections.videos)  # nothing may be found in some
  for what, videos in (("without detections", set(names) - present), ("in the detections only", present - set(names))):
    if videos:
      some = ", ".join(sorted(videos)[:5]) + (", ..." if len(videos) > 5 else "")
      raise ValueError(f"class_query asks for the test videos, no more and no less; {len(videos)} {what}: {some}")


def _of_videos(detections: TubeDetections, names: list[str], num_frames: np.ndarray) -> TubeDetections:
  """The rows in the named videos, in the same order; `video` becomes an index into the names."""
  index = {name: k for k, name in enumerate(names)}
  video = np.array([index.get(name, -1) for name in detections.videos], np.int64)[detections.video]
  rows = np.flatnonzero(video >= 0)
  columns = (column[rows] if len(rows) < len(video) else column for column in detections[2:])
  found = TubeDetections(names, video[rows], *columns)
  last = found.frame + found.boxes.shape[1] - 1
  bad = np.flatnonzero((found.frame < 1) | (last > num_frames[found.video]))
  if len(bad):
    name, length = names[found.video[bad[0]]], num_frames[found.video[bad[0]]]
    frames = (
      f"frames {found.frame[bad[0]]} to {last[bad[0]]}"
      if last[bad[0]] > found.frame[bad[0]]
      else f"frame {last[bad[0]]}"
    )
    raise ValueError(f"{len(bad)} detections behind the end, the first in {frames} of {name}, which has {length}")
  return found


def _members(found: TubeDetections, protocol: Protocol, dataset: Dataset | None) -> tuple[np.ndarray, np.ndarray]:
  """Which detections are of which class, in frames and in tubes: both ``[R, K]`` bool."""
  scored = ~np.isnan(found.scores)
  if protocol == "act" or dataset == "jhmdb":
    return scored, scored
  best = np.zeros_like(scored)
  best[np.arange(len(best)), np.where(scored, found.scores, -np.inf).argmax(axis=1)] = True
  best &= scored
  return (best, best) if protocol == "multisports" else (scored, best & (found.actor >= _UCF_ACTOR)[:, None])


def _candidates(found: TubeDetections, label: int, members: np.ndarray) -> Candidates:
  rows = np.flatnonzero(members)
  return Candidates(found.video[rows], found.frame[rows], found.boxes[rows], found.scores[rows, label])


def _truth_of_class(truth: TubeGroundTruth, names: list[str], label: int) -> _Truth:
  tubes = [(k, t.boxes) for k, name in enumerate(names) for t in truth.videos[name].tubes if t.label == label]
  return _Truth(np.array([video for video, _ in tubes], np.int64), [boxes for _, boxes in tubes])


def _link(found: Candidates, num_frames: np.ndarray, protocol: Protocol, dataset: Dataset | None) -> list[LinkedTube]:
  if protocol == "class_query":
    return link_by_viterbi(found, num_frames, first_frame=0 if dataset == "jhmdb" else 1)
  tubes = link_greedily(found, num_frames)
  return tube_nms(tubes) if protocol == "act" else tubes


def _frame_ap(found: Candidates, truth: _Truth, protocol: Protocol) -> np.ndarray:
  """AP of the boxes of one class at each of `IOUS`."""
  if protocol == "class_query":
    has_area = (found.boxes[:, 0, :2] < found.boxes[:, 0, 2:]).all(axis=1)
    found = Candidates(*(column[has_area] for column in found))
  else:
    found = _by_frame(found)
  step = 1 + max(int(found.frame.max(initial=0)), *(int(tube[-1, 0]) for tube in truth.boxes), 0)
  frame = found.video * step + found.frame
  score = soft_nms(frame, found.boxes, found.score) if protocol == "act" else found.score
  order = np.argsort(-score, kind="stable")
  rank = np.empty(len(order), np.int64)
  if protocol == "class_query":  # equal scores rank in reverse order of the list of frames, each sorted by score
    _, first, inverse = np.unique(frame, return_index=True, return_inverse=True)
    listed = np.lexsort((-score, first[inverse]))[::-1]
    rank[listed[np.argsort(-score[listed], kind="stable")]] = np.arange(len(order))
  else:
    rank[order] = np.arange(len(order))

  boxes = np.concatenate(truth.boxes)
  owner = np.repeat(truth.video, [len(tube) for tube in truth.boxes]) * step + boxes[:, 0].astype(np.int64)
  frames, owner = np.unique(owner, return_inverse=True)
  slot = positions(owner)
  table = np.full((len(frames), int(slot.max(initial=-1)) + 1, 4), np.nan)
  table[owner, slot] = boxes[:, 1:]
  rows = order[np.isin(frame[order], frames)]
  owner = np.searchsorted(frames, frame[rows])
  overlap = np.nan_to_num(box_iou(found.boxes[rows], table[owner], float(protocol == "act")), nan=-1)
  return _average_precisions(overlap, owner, rank[rows], len(boxes), protocol, gone=protocol == "act")


def _by_frame(found: Candidates) -> Candidates:
  """The boxes of all frames of tubelets, sorted by video and frame."""
  num_rows, length = found.boxes.shape[:2]
  row = np.repeat(np.arange(num_rows), length)
  frame = (found.frame[:, None] + np.arange(length)).reshape(-1)
  order = np.lexsort((found.frame[row], frame, found.video[row]))
  row = row[order]
  return Candidates(found.video[row], frame[order], found.boxes.reshape(-1, 1, 4)[order], found.score[row])


def _video_ap(tubes: list[LinkedTube], truth: _Truth, protocol: Protocol, dataset: Dataset | None) -> np.ndarray:
  """AP of the tubes of one class at each of `IOUS`."""
  score = np.array([tube.score for tube in tubes])
  order = np.argsort(-score, kind="stable")
  video = np.array([tube.video for tube in tubes], np.int64)[order]
  slot = positions(truth.video)
  overlap = np.full((len(tubes), int(slot.max(initial=0)) + 1), -1.0)
  for owner, column, boxes in zip(truth.video, slot, truth.boxes, strict=True):
    rows = np.flatnonzero(video == owner)
    if len(rows):
      overlap[rows, column] = tube_overlaps(
        boxes,
        [tubes[order[row]].boxes for row in rows],
        margin=float(protocol != "multisports"),
        least_common=2 if protocol == "class_query" else 1,
        in_time=dataset != "jhmdb",
      )
  rank, gone = np.arange(len(order)), protocol != "multisports"
  slack = 1e-5 if protocol == "class_query" else 0.0
  return _average_precisions(overlap, video, rank, len(truth.boxes) + slack, protocol, gone=gone)


def _average_precisions(
  overlap: np.ndarray, owner: np.ndarray, rank: np.ndarray, total: float, protocol: Protocol, *, gone: bool
) -> np.ndarray:
  """AP at each of `IOUS`.

  Args:
    overlap: ``[D, M]`` of each detection that might be right with the annotations of its frame or video; negative
      where there is none. In the order in which detections claim annotations.
    owner: ``[D]`` number of its frame or video.
    rank: ``[D]`` its place among all detections of the class, from 0 up.
    total: number of annotations.
    protocol: whose area under the curve.
    gone: whether annotations that were claimed are not there for later detections.
  """
  result = np.zeros(len(IOUS))
  for k, iou in enumerate(IOUS):
    place = np.sort(rank[_hits(overlap, owner, iou, gone=gone)])
    hits = np.arange(1, len(place) + 1)
    precision, recall = hits / (place + 1), hits / total
    if protocol == "act":
      before = np.where(place > 0, (hits - 1) / np.maximum(place, 1), 1)  # precision one detection earlier
      result[k] = np.sum(precision + before) / (2 * total)
    else:
      result[k] = average_precision(precision, recall)
  return result


def _hits(overlap: np.ndarray, owner: np.ndarray, iou: float, *, gone: bool) -> np.ndarray:
  """Which of the detections that `_average_precisions` describes are right: ``[D]`` bool."""
  if not gone:
    best = overlap.argmax(axis=1)
    return true_positives(overlap.max(axis=1), owner * overlap.shape[1] + best, iou)
  correct = np.zeros(len(overlap), bool)
  rows = np.flatnonzero(overlap.max(axis=1) >= iou)
  turn = positions(owner[rows])
  free = np.ones((int(owner.max(initial=0)) + 1, overlap.shape[1]), bool)
  for k in range(int(turn.max(initial=-1)) + 1):  # the k-th detection of every frame or video at once
    now = rows[turn == k]
    left = np.where(free[owner[now]], overlap[now], -1)
    best = left.argmax(axis=1)
    hit = left[np.arange(len(now)), best] >= iou
    free[owner[now[hit]], best[hit]] = False
    correct[now[hit]] = True
  return correct
