"""Links detections of single frames, or tubelets, to tubes: one person doing one thing through a video.

Two ways are in use. Action Tubelets (ACT, and MOC after it) link greedily from the first frame to the last
(`link_greedily`). The class-query code looks for the best path through the whole video (`link_by_viterbi`), as YOWO
does, and cuts it in time. Both treat one class, and all videos at once: a step from frame to frame is one for all.
"""

import itertools
from typing import NamedTuple

import numpy as np

from vad_jax.tubes import positions

NMS_IOU = 0.6  # of boxes and tubelets, softly
TUBE_NMS_IOU = 0.3
LINK_IOU = 0.5
MAX_TUBELETS = 10  # of a class that start in one frame
MIN_SCORE = 0.005
MIN_FRAMES = 15
MAX_PATHS = 3
JUMP_IOU = 0.3  # a box that overlaps the one before it less is a jump
_MANY = 10**6  # more than there are tubes at a time
_CHUNK = 1 << 16  # detections compared at once, so that memory stays flat


class Candidates(NamedTuple):
  """Detections as members of one class, in columns.

  Attributes:
    video: ``[R]`` int index of the video.
    frame: ``[R]`` int (first) frame, from 1 up.
    boxes: ``[R, T, 4]`` float64 xyxy in pixels; ``T`` = 1 unless they are tubelets.
    score: ``[R]`` of the class.
  """

  video: np.ndarray
  frame: np.ndarray
  boxes: np.ndarray
  score: np.ndarray


class LinkedTube(NamedTuple):
  """A detected tube.

  Attributes:
    video: index of the video.
    score: of the class, mean over the tube.
    boxes: ``[n, 5]`` float64 frame, x1, y1, x2, y2; frames without gaps.
  """

  video: int
  score: float
  boxes: np.ndarray


def box_iou(a: np.ndarray, b: np.ndarray, margin: float) -> np.ndarray:
  """IoU of boxes ``[..., 4]`` xyxy, pair by pair under broadcasting; 0 where there is no union.

  Args:
    a: boxes.
    b: boxes.
    margin: what a side is longer than the difference of its coordinates: 1 where they name pixels, 0 where edges.
  """
  ax, ay, ax2, ay2 = (a[..., k] for k in range(4))
  bx, by, bx2, by2 = (b[..., k] for k in range(4))
  width = np.minimum(ax2, bx2) - np.maximum(ax, bx) + margin
  height = np.minimum(ay2, by2) - np.maximum(ay, by) + margin
  shared = np.maximum(width, 0) * np.maximum(height, 0)
  union = (ax2 - ax + margin) * (ay2 - ay + margin) + (bx2 - bx + margin) * (by2 - by + margin) - shared
  return np.divide(shared, union, out=np.zeros_like(union), where=union != 0)


def soft_nms(group: np.ndarray, boxes: np.ndarray, score: np.ndarray) -> np.ndarray:
  """Lowers the scores of detections that overlap a better one of their group, as ACT does.

  From the best score down, each detection that was not lowered itself lowers those that overlap it by more than
  `NMS_IOU`: once, by the factor 1 - overlap. The overlap of tubelets is summed over their frames, which makes the
  factor negative. Of equal scores the later counts as the better one.

  Args:
    group: ``[R]`` int from 0 up, what may be compared, such as a frame.
    boxes: ``[R, T, 4]`` xyxy in pixels.
    score: ``[R]``.

  Returns:
    ``[R]`` float64 scores.
  """
  order = len(group) - 1 - np.lexsort((-score[::-1], group[::-1]))
  start = np.flatnonzero(np.diff(group[order], prepend=-1))
  count = np.diff(start, append=len(order))
  factor = np.ones(len(group))
  for size in np.unique(count[count > 1]):
    groups, step = start[count == size], max(1, _CHUNK // size)
    for chunk in np.split(groups, range(step, len(groups), step)):
      rows = order[chunk[:, None] + np.arange(size)]
      factor[rows] = _soft_factors(boxes[rows])
  return score * factor


def _soft_factors(boxes: np.ndarray) -> np.ndarray:
  """What scores are multiplied by: ``[G, n]`` for groups of detections ``[G, n, T, 4]``, best first."""
  factor = np.ones(boxes.shape[:2])
  for best in range(boxes.shape[1] - 1):
    overlap = box_iou(boxes[:, best, None], boxes[:, best + 1 :], 1).sum(axis=2)
    others = factor[:, best + 1 :]
    hit = (overlap > NMS_IOU * boxes.shape[2]) & (others == 1) & (factor[:, best, None] == 1)
    others[hit] = 1 - overlap[hit]
  return factor


def link_greedily(found: Candidates, num_frames: np.ndarray) -> list[LinkedTube]:
  """Links the detections of one class as ACT and MOC do.

  The ten best detections that start in a frame after `soft_nms` extend the tubes found so far: the tubes take turns
  by their mean score, and each takes the best detection left that overlaps its last one by at least 0.5 in the
  frames they share (where they share none, the last box and the first). A tube that finds nothing for ``T`` frames
  ends, and detections that are left start tubes. Tubes that score less than 0.005 or last less than 15 frames are
  dropped. A frame's box is the mean over the tubelets that cover it.

  Args:
    found: detections of all videos.
    num_frames: ``[V]`` length of each video.

  Returns:
    Tubes, video by video, those that end first in a video first.
  """
  if not len(found.score):
    return []
  length = found.boxes.shape[1]
  group = found.video * (int(num_frames.max(initial=0)) + 1) + found.frame
  found = found._replace(score=soft_nms(group, found.boxes, found.score))
  order = np.lexsort((-found.score, group))
  order = order[positions(group[order]) < MAX_TUBELETS]
  found = Candidates(*(column[order] for column in found))
  tube, rank = _assign_tubes(found, num_frames - length + 1)

  count = np.bincount(tube)
  score = np.bincount(tube, found.score) / count
  first, last = np.full(len(count), np.iinfo(np.int64).max), np.zeros(len(count), np.int64)
  np.minimum.at(first, tube, found.frame)
  np.maximum.at(last, tube, found.frame + length - 1)
  video = np.zeros(len(count), np.int64)
  video[tube] = found.video
  kept = (score >= MIN_SCORE) & (last - first + 1 >= MIN_FRAMES)
  end = np.cumsum(np.where(kept, last - first + 1, 0))  # of a tube's boxes in a table of all
  rows = np.flatnonzero(kept[tube])
  cell = (end[tube] - last[tube] + found.frame - 1)[rows, None] + np.arange(length)
  coverage = np.bincount(cell.reshape(-1))
  mean = [np.bincount(cell.reshape(-1), found.boxes[rows, :, k].reshape(-1)) / coverage for k in range(4)]
  tubes = []
  for k in np.lexsort((rank, video)):
    if kept[k]:
      frames = np.arange(int(first[k]), int(last[k]) + 1)
      part = slice(end[k] - len(frames), end[k])
      tubes.append(LinkedTube(int(video[k]), float(score[k]), np.column_stack([frames, *(m[part] for m in mean)])))
  return tubes


def _assign_tubes(found: Candidates, num_starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Says which tube each detection belongs to.

  Args:
    found: detections, the best of a frame first.
    num_starts: ``[V]`` number of frames in which a detection may start.

  Returns:
    ``[R]`` number of the tube; for each tube a number by which ACT's list of a video's tubes is sorted.
  """
  length = found.boxes.shape[1]
  longest = np.argsort(-num_starts, kind="stable")
  table = _frame_table(found, num_starts)[longest]
  tube_of, num_tubes = np.full(len(found.score), -1), 0
  # By tube; the last entry stands for none. There are not more tubes than detections.
  newest, place = np.zeros((2, len(found.score) + 1), np.int64)  # newest: its last detection
  total, count = np.zeros(len(place)), np.ones(len(place), np.int64)
  live = np.full((len(table), 0), -1)  # the tubes of each video in ACT's order
  for frame in range(table.shape[1]):
    active = int(np.searchsorted(-num_starts[longest], -frame))  # videos that have this frame
    new, live = table[:active, frame], live[:active]
    order = np.argsort(np.where(live >= 0, -total[live] / count[live], np.inf), axis=1, kind="stable")
    live = np.take_along_axis(live, order, axis=1)[:, : (live >= 0).sum(axis=1).max(initial=0)]
    age = frame + 1 - found.frame[newest[live]]
    fits = _overlap_enough(found.boxes[newest[live]], found.boxes[new], age) & (live >= 0)[:, :, None]
    left = new >= 0
    for k in range(live.shape[1]):
      candidates = fits[:, k] & left
      video = np.flatnonzero(candidates.any(axis=1))
      best = np.where(candidates, found.score[new], -np.inf)[video].argmax(axis=1)
      left[video, best] = False
      row, tube = new[video, best], live[video, k]
      newest[tube], tube_of[row] = row, tube
      total[tube] += found.score[row]
      count[tube] += 1
    ended = (live >= 0) & (frame + 1 - found.frame[newest[live]] >= length)
    columns = np.broadcast_to(np.arange(live.shape[1]), live.shape)
    place[live[ended]] = frame * _MANY - columns[ended]  # ACT takes those that end together from the back
    live = np.where(ended, -1, live)
    started = np.where(left, num_tubes + np.cumsum(left).reshape(left.shape) - 1, -1)
    tube, row = started[left], new[left]
    num_tubes += len(tube)
    newest[tube], tube_of[row], total[tube] = row, tube, found.score[row]
    live = np.concatenate([live, started], axis=1)
    columns = np.broadcast_to(np.arange(live.shape[1]), live.shape)
    place[live] = table.shape[1] * _MANY + columns
  return tube_of, place[:num_tubes]


def _overlap_enough(last: np.ndarray, new: np.ndarray, age: np.ndarray) -> np.ndarray:
  """Whether tubelets fit together: ``[A, L, Q]`` bool.

  Args:
    last: ``[A, L, T, 4]`` last tubelets of tubes.
    new: ``[A, Q, T, 4]`` tubelets that might follow.
    age: ``[A, L]`` by how many frames the former began earlier.
  """
  length = new.shape[2]
  shared = np.maximum(length - age, 1)[:, :, None]
  total = np.zeros((*age.shape, new.shape[1]))
  for k in range(length):
    index = np.clip(k + age, 0, length - 1)[:, :, None, None]
    overlap = box_iou(np.take_along_axis(last, index, axis=2), new[:, None, :, k], 1)
    total += np.where(k < shared, overlap, 0)
  return total / shared >= LINK_IOU


def _frame_table(found: Candidates, num_frames: np.ndarray) -> np.ndarray:
  """Detections of each frame of each video, in the given order: ``[V, F, Q]`` row, -1 where there is no more."""
  shape = (len(num_frames), int(num_frames.max(initial=0)))
  slot = positions(found.video * (shape[1] + 1) + found.frame)
  table = np.full((*shape, int(slot.max(initial=-1)) + 1), -1)
  table[found.video, found.frame - 1, slot] = np.arange(len(slot))
  return table


def tube_nms(tubes: list[LinkedTube]) -> list[LinkedTube]:
  """Drops tubes that overlap a better one of their video by more than 0.3 in space and time, as ACT does.

  Args:
    tubes: of one class, video by video. Of equal scores the later counts as the better one.

  Returns:
    The tubes that stay; those of a video best first.
  """
  kept = []
  for _, group in itertools.groupby(tubes, key=lambda tube: tube.video):
    group = sorted(reversed(list(group)), key=lambda tube: -tube.score)
    while group:
      best, *group = group
      kept.append(best)
      if group:
        overlaps = tube_overlaps(best.boxes, [tube.boxes for tube in group], 1)
        group = [tube for tube, overlap in zip(group, overlaps, strict=True) if overlap <= TUBE_NMS_IOU]
  return kept


def tube_overlaps(
  tube: np.ndarray, others: list[np.ndarray], margin: float, *, least_common: int = 1, in_time: bool = True
) -> np.ndarray:
  """Overlap of a tube with others of its video: mean IoU of the boxes in common frames, times IoU of the spans.

  Args:
    tube: ``[n, 5]`` frame, x1, y1, x2, y2; frames ascend.
    others: tubes, at least one.
    margin: as for `box_iou`; holds for the spans in frames as well.
    least_common: tubes that share fewer frames do not overlap.
    in_time: if false, the result is the mean IoU over the frames of the shorter tube, 0 where the other has no box.

  Returns:
    ``[len(others)]`` overlaps in [0, 1].
  """
  lengths = np.array([len(other) for other in others])
  boxes, owner = np.concatenate(others), np.repeat(np.arange(len(others)), lengths)
  place = np.minimum(np.searchsorted(tube[:, 0], boxes[:, 0]), len(tube) - 1)
  common = tube[place, 0] == boxes[:, 0]
  owner = owner[common]
  total = np.bincount(owner, box_iou(tube[place[common], 1:], boxes[common, 1:], margin), len(others))
  count = np.bincount(owner, minlength=len(others))
  if not in_time:
    return total / np.minimum(lengths, len(tube))
  first, last = np.array([(other[0, 0], other[-1, 0]) for other in others]).T
  shared = np.minimum(last, tube[-1, 0]) - np.maximum(first, tube[0, 0]) + margin
  span = np.maximum(last, tube[-1, 0]) - np.minimum(first, tube[0, 0]) + margin
  overlap = total / np.maximum(count, 1) * np.maximum(shared, 0) / np.maximum(span, 1)
  return np.where(count >= least_common, overlap, 0)


def link_by_viterbi(found: Candidates, num_frames: np.ndarray, first_frame: int) -> list[LinkedTube]:
  """Links the detections of one class as the class-query code does.

  A path takes one box in each frame of the video; frames without any borrow those of the nearest frame that has
  some, the earlier of two. The best path has the highest sum, over frames, of IoU(a, b) + s(a) + s(b) + s(a) s(b) / 2
  of the boxes of neighbouring frames. Its boxes are taken away and the next one is looked for, up to three and as
  long as all frames have boxes. Of paths that overlap by more than 0.3 the one with the higher mean score stays, and
  it is cut to the frames in which something happens, with the errors of the original:

  * Let ``L`` be the number of frames that have boxes of their own, and ``s`` the number of the first. If ``s`` is not
    0, what remains are ``L`` frames from index ``s`` on. Where frames count from 1 this loses the first, and does not
    see gaps.
  * If ``s`` is 0, scores become negative at jumps, and the part of the path whose scores exceed their mean most is
    taken, then widened or narrowed at both ends to about ``L``.

  Args:
    found: detections of all videos, ``T`` = 1.
    num_frames: ``[V]`` length of each video.
    first_frame: how the data set's own numbers of frames start: 0 (JHMDB) or 1 (UCF101-24).

  Returns:
    Tubes by video, those of a video best first.
  """
  if not len(found.score):
    return []
  longest = np.unique(found.video)
  longest = longest[np.argsort(-num_frames[longest], kind="stable")]
  lengths = num_frames[longest]
  number = np.zeros(len(num_frames), np.int64)
  number[longest] = np.arange(len(longest))
  table = _frame_table(found._replace(video=number[found.video]), lengths)
  occupied = table[:, :, 0] >= 0
  table = np.take_along_axis(table, _nearest(occupied)[:, :, None], axis=1)
  paths, complete = _best_paths(found, table, lengths)
  tubes = []
  for k in np.argsort(longest):
    rows = paths[complete[:, k], k, : lengths[k]]
    boxes, score = found.boxes[rows, 0], found.score[rows].astype(np.float64)
    own = np.flatnonzero(occupied[k])
    for path in _tube_nms(boxes, score.mean(axis=1)):
      if own[0] + first_frame:
        part = slice(own[0] + first_frame, own[0] + first_frame + len(own))
      else:
        part = _busy_part(boxes[path], score[path], len(own))
      frames = np.arange(1, int(lengths[k]) + 1)[part]
      if len(frames):
        table_of_boxes = np.column_stack([frames, boxes[path, part]])
        tubes.append(LinkedTube(int(longest[k]), float(score[path, part].mean()), table_of_boxes))
  return tubes


def _nearest(occupied: np.ndarray) -> np.ndarray:
  """Index of the nearest true entry of each row, the earlier of two: int of the same shape ``[V, F]``."""
  index = np.broadcast_to(np.arange(occupied.shape[1]), occupied.shape)
  far = 2 * occupied.shape[1]
  before = np.maximum.accumulate(np.where(occupied, index, -far), axis=1)
  after = np.minimum.accumulate(np.where(occupied, index, far)[:, ::-1], axis=1)[:, ::-1]
  return np.where(index - before <= after - index, before, after)


def _best_paths(found: Candidates, table: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Finds the best path of each video, the best one without its boxes, and so on.

  Args:
    found: detections.
    table: ``[V, F, Q]`` their rows by video, longest first, and frame; -1 where there is no more.
    lengths: ``[V]`` frames of each video.

  Returns:
    ``[P, V, F]`` rows of the paths, ``[P, V]`` bool whether there is such a path.
  """
  num_videos, num_frames, _ = table.shape
  active = np.searchsorted(-lengths, -np.arange(num_frames))  # videos that have a frame of this index
  boxes, score = found.boxes[:, 0], found.score.astype(np.float64)
  edges = []
  for frame in range(1, num_frames):
    a, b = table[: active[frame], frame - 1, :, None], table[: active[frame], frame, None, :]
    edge = box_iou(boxes[a], boxes[b], 0) + (score[a] + score[b]) + 0.5 * score[a] * score[b]
    edges.append(edge.astype(np.float32))  # like the sums below: the original's precision decides between near paths
  alive = table >= 0
  exists = np.arange(num_frames) < lengths[:, None]
  paths, complete = [], []
  while len(paths) < MAX_PATHS:
    complete.append((alive.any(axis=2) | ~exists).all(axis=1))
    value = np.zeros(alive[:, 0].shape, np.float32)
    following = []
    for frame in range(num_frames - 1, 0, -1):
      n = active[frame]
      sums = edges[frame - 1] + np.where(alive[:n, frame], value[:n], -np.inf)[:, None, :]
      following.append(sums.argmax(axis=2))
      value[:n] = sums.max(axis=2)
    choice = np.where(alive[:, 0], value, -np.inf).argmax(axis=1)
    path = np.zeros((num_videos, num_frames), np.int64)
    for frame in range(num_frames):
      if frame:
        n = active[frame]
        choice = following[-frame][np.arange(n), choice[:n]]
      path[: len(choice), frame] = table[np.arange(len(choice)), frame, choice]
      alive[np.arange(len(choice)), frame, choice] = False
    paths.append(path)
  return np.stack(paths), np.stack(complete)


def _tube_nms(boxes: np.ndarray, score: np.ndarray) -> list[int]:
  """Full-length tubes ``[P, n, 4]`` that overlap no better one by more than 0.3, best first."""
  kept = []
  for path in np.argsort(score, kind="stable")[::-1]:
    overlaps = box_iou(boxes[kept], boxes[path], 1).mean(axis=1)
    if boxes.shape[1] < 2 or not (overlaps > TUBE_NMS_IOU).any():
      kept.append(int(path))
  return kept


def _busy_part(boxes: np.ndarray, score: np.ndarray, length: int) -> slice:
  """Cuts a path to about `length` boxes; makes the score of jumps negative, in place."""
  jumps = np.flatnonzero(box_iou(boxes[1:], boxes[:-1], 1) < JUMP_IOU) + 1
  score[jumps] *= -1
  begin, end, best, total, start = -1, -1, 0.0, 0.0, 0
  for frame, gain in enumerate(score - score.mean()):
    total += gain
    if total > best:
      begin, end, best = start, frame, total
    if total < 0:
      total, start = 0.0, frame + 1
  change = abs(length - (end - begin)) // 2
  if end - begin > length:
    change = -change
  return slice(max(begin - change, 0), max(end + change, 0))  # a slice may end behind the path
