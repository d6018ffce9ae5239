"""Well-known mistakes in files of detections, how to undo them, and which of them explain a low mAP.

`search` tries to repair video names, timestamps, boxes, class ids and scores on a sample of keyframes, one by one
and together, and keeps the repairs that make the detections fit the ground truth much better. That is judged by
paired tests over people: a model that is merely weak fits no better in another format.
"""

import collections
import itertools
import math
import re
import shlex
from collections.abc import Callable, Iterator

import numpy as np

from vad_jax import annotations, progress
from vad_jax.annotations import Rows
from vad_jax.metrics.trials import Bench, File, Plan, Repair, keyframe_key

_CLIP_START = 900  # second at which the annotated part of AVA's movies begins
_FPS = (30.0, 25.0, 24.0, 30000 / 1001, 24000 / 1001, 60.0, 50.0, 15.0, 10.0)
# Usual widths and heights of frames, and the 100 and 1000 of coordinates in percent and per mille.
_FRAME_SIDES = np.array(
  [
    *(
      100,
      112,
      128,
      144,
      160,
      180,
      192,
      224,
      240,
      256,
      270,
      272,
      288,
      320,
      340,
      352,
      360,
      384,
      400,
      426,
      448,
      455,
      480,
    ),
    *(512, 540, 544, 576, 600, 608, 640, 720, 768, 800, 854, 960, 1000, 1024, 1080, 1280, 1440, 1920, 2160, 2560, 3840),
  ]
)
_LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
  "xyxy": (lambda boxes: boxes, ""),
  "yxyx": (lambda boxes: boxes[:, [1, 0, 3, 2]], "t=$3;$3=$4;$4=t;t=$5;$5=$6;$6=t;"),
  "xywh": (
    lambda boxes: np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]),
    "$5+=$3;$6+=$4;",
  ),
  "cxcywh": (
    lambda boxes: np.hstack([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2]),
    "w=$5;h=$6;$3-=w/2;$4-=h/2;$5=$3+w;$6=$4+h;",
  ),
}


def percent(fraction: float | np.floating) -> str:
  """A fraction as people read it."""
  return f"{100 * fraction:.1f} %"


def search(bench: Bench) -> Plan:
  """Finds the repairs that make the detections fit the ground truth much better; none where all is well."""
  plan = Plan(names=_repair_names(bench))
  clocks, boxes = (None, *_repair_clock(bench, plan)), (None, *_repair_boxes(bench, plan))
  places = [plan._replace(clock=clock, boxes=box) for clock, box in itertools.product(clocks, boxes)]
  plan = _simplest_of_best(sorted(places, key=lambda plan: sum(map(bool, plan))), bench)
  classes = itertools.product((None, *_repair_labels(bench)), (None, *_repair_scores(bench)))
  plan = max(
    (plan._replace(labels=labels, scores=scores) for labels, scores in classes),
    key=lambda plan: bench.result(plan)[0],
  )
  for field in reversed(Plan._fields):
    while (repair := getattr(plan, field)) and not _helps(field, plan, bench):
      plan = plan._replace(**{field: repair.simpler})
  return plan


def _simplest_of_best(plans: list[Plan], bench: Bench) -> Plan:
  """The first plan that no other fits significantly better than."""
  fits = []
  with progress.bar("trying repairs", len(plans)) as advance:
    for plan in plans:
      fits.append(bench.fit(plan))
      advance()
  best = max(fits, key=lambda fit: fit.sum())
  return next(plan for plan, fit in zip(plans, fits, strict=True) if not _fits_better(best, fit))


def _fits_better(fit: np.ndarray, other: np.ndarray) -> bool:
  """A sign test over people: three standard deviations, and more than a small effect."""
  better, worse = np.count_nonzero(fit > other + 0.1), np.count_nonzero(other > fit + 0.1)
  return bool(better > 1.2 * worse and better - worse > 3 * math.sqrt(better + worse))


def _helps(field: str, plan: Plan, bench: Bench) -> bool:
  """Whether a repair of the plan raises mAP, or AP of people, by more than chance would."""
  repair = getattr(plan, field)
  if repair.certain and not repair.simpler:
    return True
  without = plan._replace(**{field: repair.simpler})
  (mean_ap, person), (mean_ap_without, person_without) = bench.result(plan), bench.result(without)
  if field in ("clock", "boxes"):
    # Any boxes may fit better than none or misshapen ones: they must fit the people of their own keyframe best.
    least, shift = (0.02, 7) if field == "clock" else (0.05, len(bench.sample) // 2)
    fits_here = _fits_better(bench.fit(plan), bench.fit(plan, shift=shift))
    return person > person_without + least and fits_here
  if mean_ap < mean_ap_without + max(0.01, 0.8 / math.sqrt(bench.num_independent)):
    return False
  if field == "labels":
    return mean_ap > 2 * mean_ap_without
  # Right detections must have ranked low in their class before, by more than three standard deviations.
  rank, num_right = bench.skill(plan)
  num_right = num_right * bench.num_independent / max(len(bench.person), 1)
  return mean_ap > 1.2 * mean_ap_without and (rank - 0.5) * math.sqrt(12 * num_right) > 3


# --- names of videos ------------------------------------------------------------------------------------------


def _repair_names(bench: Bench) -> Repair | None:
  """Compares names without what is usually added to them; None where that matches no more videos."""
  truth, found = bench.truth, bench.found
  steps: dict[str, Callable[[str], str]] = {
    "case": str.lower,
    "white space": str.strip,
    "directory": lambda name: re.split(r"[/\\]", name)[-1],
    "extension": lambda name: re.sub(r"\.[A-Za-z]\w{1,3}$", "", name),
  }
  affix = _common_affix(_renamed(truth, steps), _renamed(found, steps))
  steps["prefix or suffix"] = lambda name: name.removeprefix(affix[0]).removesuffix(affix[1])

  def num_matches(steps: dict[str, Callable[[str], str]]) -> int:
    known = _renamed(truth, steps)
    distinct = len(set(known)) == len(known)
    return len(set(_renamed(found, steps)) & set(known)) if distinct else -1

  before, best = num_matches({}), num_matches(steps)
  for name in list(steps):
    fewer = {other: step for other, step in steps.items() if other != name}
    if num_matches(fewer) >= best:
      steps, best = fewer, num_matches(fewer)
  if best <= before:
    return None
  index = {name: number for number, name in enumerate(_renamed(truth, steps))}
  numbers = np.array([index.get(name, -1) for name in _renamed(found, steps)], np.int32)
  example = next(i for i, number in enumerate(numbers) if number >= 0 and found.names[i] != truth.names[number])
  return Repair(
    "video names do not match",
    f"{before} of the {len(truth.names)} annotated videos have detections, {best} when {' and '.join(steps)} of their "
    f"names are ignored: {found.names[example]!r} is {truth.names[numbers[example]]!r} in the ground truth",
    lambda rows: rows._replace(video=numbers[rows.video]),
    (_rename_command(found, steps, affix), _rename_command(truth, steps, affix)),
    certain=True,
  )


def _renamed(file: File, steps: dict[str, Callable[[str], str]]) -> list[str]:
  names = list(file.names)
  for step in steps.values():
    names = [step(name) for name in names]
  return names


def _common_affix(truth: list[str], found: list[str]) -> tuple[str, str]:
  """Prefix and suffix that most unmatched names of one list have around those of the other; empty if none."""
  known, new = sorted(set(truth) - set(found))[:200], sorted(set(found) - set(truth))[:1000]
  affixes = collections.Counter(
    (long.partition(short)[0], long.partition(short)[2])
    for short, long in itertools.chain(itertools.product(known, new), itertools.product(new, known))
    if short in long
  )
  affix, count = affixes.most_common(1)[0] if affixes else (("", ""), 0)
  return affix if 2 * count >= min(len(known), len(new)) else ("", "")


def _rename_command(file: File, steps: dict[str, Callable[[str], str]], affix: tuple[str, str]) -> str:
  """Shell filter that takes the steps; empty where they change nothing."""
  prefix, suffix = (re.sub(r"([][\\/.*^$+?(){}|])", r"\\\1", part) for part in affix)
  commands = {
    "case": "awk -F, -v OFS=, '{$1=tolower($1)}1'",
    "white space": "sed -E 's/^ +//; s/^([^,]*[^ ,]) +,/\\1,/'",
    "directory": r"sed -E 's/^[^,]*[\/\\]//'",
    "extension": r"sed -E 's/^([^,]*)\.[A-Za-z][A-Za-z0-9_]{1,3},/\1,/'",
    "prefix or suffix": "sed -E " + shlex.quote(f"s/^{prefix}//; s/^([^,]*){suffix},/\\1,/"),
  }
  names, wanted = list(file.names), []
  for name, step in steps.items():
    renamed = [step(name) for name in names]
    if renamed != names:
      wanted.append(commands[name])
    names = renamed
  return " | ".join(wanted)


# --- timestamps -----------------------------------------------------------------------------------------------


def _repair_clock(bench: Bench, plan: Plan) -> list[Repair]:
  """Other readings of the timestamps that match enough keyframes, the likeliest first."""
  keys, truth = bench.keys(plan), bench.truth.rows
  keys = keys.select(keys.video >= 0)
  num_possible = min(len(keys.video), np.count_nonzero(np.isin(_video(bench.annotated), keys.video)))
  if not num_possible:
    return []
  whole = bool((truth.timestamp == np.rint(truth.timestamp)).all())

  def match(scale: float, offset: float) -> float:
    moved = keyframe_key(_move(keys, scale, offset, whole))
    return len(np.intersect1d(moved, bench.annotated)) / num_possible

  now = match(1, 0)
  trials = []
  for scale in dict.fromkeys((1.0, 0.001, *(1 / fps for fps in (*_FPS, *_guess_fps(keys, truth))))):
    for offset in dict.fromkeys((*_usual_offsets(scale), *_likely_offsets(keys, truth, scale))):
      if (scale, offset) != (1, 0):
        trials.append((match(scale, offset), scale, offset))
  enough = max(now, *(matched for matched, _, _ in trials)) / 2
  trials = [trial for trial in trials if trial[0] >= max(enough, 0.02)]
  trials.sort(key=lambda trial: -round(trial[0], 2))
  return [_clock(scale, offset, whole, now, matched) for matched, scale, offset in trials[:12]]


def _video(key: np.ndarray) -> np.ndarray:
  return np.rint(key / 10**13).astype(np.int64)


def _usual_offsets(scale: float) -> tuple[float, ...]:
  if scale == 1:
    return _CLIP_START, -_CLIP_START, 1, -1, 2, -2
  return 0, _CLIP_START, -scale, _CLIP_START - scale  # frames are counted from 0 or from 1


def _likely_offsets(keys: Rows, truth: Rows, scale: float) -> list[float]:
  """The differences between annotated and detected times that are met most often in some videos."""
  differences = []
  rng = np.random.default_rng(0)
  for video in np.unique(keys.video)[:20]:
    time = keys.timestamp[keys.video == video]
    time = rng.choice(time, min(len(time), 60), replace=False)
    annotated = np.unique(truth.timestamp[truth.video == video])
    differences.append(np.round(annotated[:, None] - scale * time, 3).ravel())
  offsets, counts = np.unique(np.concatenate(differences), return_counts=True)
  return offsets[np.argsort(-counts, kind="stable")[:2]].tolist()


def _guess_fps(keys: Rows, truth: Rows) -> Iterator[float]:
  """The step between the timestamps of the detections, in steps of the ground truth."""
  steps = []
  for rows in (keys, truth):
    order = np.lexsort((rows.timestamp, rows.video))
    step = np.diff(rows.timestamp[order])[np.diff(rows.video[order]) == 0]
    steps.append(np.gcd.reduce(step.astype(np.int64)) if len(step) and (step == np.rint(step)).all() else 0)
  if steps[1] and 5 * steps[1] <= steps[0] <= 240 * steps[1]:
    yield float(steps[0] / steps[1])


def _move(rows: Rows, scale: float, offset: float, whole: bool) -> Rows:
  """Rows at ``scale * timestamp + offset``; where seconds are whole, the frame nearest to one is put there."""
  time = rows.timestamp * scale + offset
  if whole and scale < 1:
    time = np.where(np.abs(time - np.rint(time)) < 0.6 * scale, np.rint(time), time)
  return rows._replace(timestamp=time)


def _clock(scale: float, offset: float, whole: bool, now: float, matched: float) -> Repair:
  if scale == 1:
    name, time = "timestamps are off by a constant", f"$2{offset:+.9g}"
    evidence = f"they are {abs(offset):g} s too {'high' if offset < 0 else 'low'}"
  elif scale == 0.001:
    name, time = "timestamps are in milliseconds", f"$2/1000{offset:+.9g}"
    evidence = f"with 0 at second {offset:g}"
  else:
    first = round((_CLIP_START * (offset > _CLIP_START / 2) - offset) / scale)
    start = offset + first * scale
    name, time = "timestamps are in frames", f"($2-{first})/{1 / scale:.12g}{start:+.9g}"
    evidence = f"with {1 / scale:.5g} of them a second, and number {first} at second {start:g}"
  program = f"$2={time}"
  if whole and scale < 1:
    near = 0.6 * scale
    program = f"t={time};r=int(t+.5);$2=(t-r<{near:.4g}&&r-t<{near:.4g})?r:t"
  return Repair(
    name,
    f"{evidence}; {percent(now)} of the keyframes match, {percent(matched)} with this undone",
    lambda rows: _move(rows, scale, offset, whole),
    (_awk(program), ""),
    certain=now < 0.2 and matched > 0.8 and (scale < 1 or abs(offset) == _CLIP_START),
  )


def _awk(program: str) -> str:
  """Shell filter that edits the rows that hold a box."""
  return f"awk -F, -v OFS=, {shlex.quote(f'NF>2{{{program}}}1')}"


# --- boxes ----------------------------------------------------------------------------------------------------


def _repair_boxes(bench: Bench, plan: Plan) -> Iterator[Repair]:
  """Other layouts and units of boxes that put them into the frame."""
  rows = bench.found.rows
  rows = rows.select(np.arange(0, len(rows.video), max(1, len(rows.video) // 200_000)))
  rows = plan.names.fix(rows) if plan.names else rows._replace(video=bench.same_names[rows.video])
  truth = bench.truth.rows.select(~np.isnan(bench.truth.rows.boxes[:, 0]))
  if not len(rows.video) or not len(truth.video):
    return
  frame = extent(truth.boxes)
  in_pixels = max(frame.max(), extent(rows.boxes).max()) > 2
  frame = np.where(frame > 2, frame, 1.0)  # the ground truth may be in pixels itself
  now = _plausible(rows.boxes / np.tile(frame, 2))
  of_unit: dict[int, Repair] = {}
  for layout, (to_xyxy, program) in _LAYOUTS.items():
    boxes = to_xyxy(rows.boxes)
    sizes = _sizes(rows._replace(boxes=boxes), truth, len(bench.truth.names)) if in_pixels else ()
    for index, size in enumerate((None, *sizes)):
      scaled = boxes if size is None else boxes / np.tile(size[rows.video], 2)
      if program or size is not None:
        repair = _boxes(bench, layout, size, of_unit.get(index))
        if not program:
          of_unit[index] = repair
        if _plausible(scaled / np.tile(frame, 2)) > max(0.9, now - 0.02):
          yield repair
  inverted = np.mean((truth.boxes[:, :2] > truth.boxes[:, 2:]).any(axis=1))
  for layout, (to_xyxy, program) in list(_LAYOUTS.items())[2:]:
    if inverted > 0.01 and _plausible(to_xyxy(truth.boxes) / np.tile(frame, 2)) > 0.9:
      yield Repair(
        f"ground-truth boxes are {layout} instead of xyxy",
        f"{percent(inverted)} of the {len(truth.video):,} annotated boxes have x1 > x2 or y1 > y2",
        lambda rows, to_xyxy=to_xyxy: rows._replace(boxes=to_xyxy(rows.boxes)),
        ("", _awk(program)),
        of_truth=True,
        certain=True,
      )


def extent(boxes: np.ndarray) -> np.ndarray:
  """``[2]`` x2 and y2 that few boxes exceed."""
  return np.quantile(boxes[:, 2:], 0.995, axis=0, method="higher") if len(boxes) else np.ones(2)


def _plausible(boxes: np.ndarray) -> float:
  """Share of boxes with an area that lie in a frame from 0 to 1, or nearly so."""
  inside = (boxes > -0.1).all(axis=1) & (boxes < 1.1).all(axis=1)
  return float(np.mean(inside & (boxes[:, :2] < boxes[:, 2:]).all(axis=1)))


def _sizes(rows: Rows, truth: Rows, num_videos: int) -> Iterator[np.ndarray]:
  """Sizes by which the detections may have to be divided, ``[V + 1, 2]`` width and height; the last for others."""
  whole = extent(rows.boxes) / np.maximum(extent(truth.boxes), 1e-6)
  if ((whole > 0.5) & (whole < 2)).all():
    return
  yield np.tile(_usual(whole), (num_videos + 1, 1))
  each = np.tile(_usual(whole), (num_videos + 1, 1))
  for video in np.intersect1d(rows.video, truth.video):
    here = extent(rows.boxes[rows.video == video]) / np.maximum(extent(truth.boxes[truth.video == video]), 1e-6)
    each[video] = _usual(here)
  if np.abs(np.log(each / each[-1])).max() > 0.05:
    yield each


def _usual(size: np.ndarray) -> np.ndarray:
  """Sides of a frame, or the usual ones if they are nearly these."""
  nearest = _FRAME_SIDES[np.abs(_FRAME_SIDES - size[:, None]).argmin(axis=1)]
  return np.where(np.abs(nearest / size - 1) < 0.04, nearest, size)


def _boxes(bench: Bench, layout: str, sizes: np.ndarray | None, simpler: Repair | None) -> Repair:
  """The repair of a layout, of a unit (where sizes are given), or of both."""
  to_xyxy, program = _LAYOUTS[layout]
  found, truth = (file.rows.boxes[~np.isnan(file.rows.boxes[:, 0])] for file in (bench.found, bench.truth))
  names, evidence, advice, filters = [], [], "", ["", ""]
  if program:
    names.append(f"boxes are {layout} instead of xyxy")
    evidence.append(_describe_layout(found, truth))
    filters[0] = _awk(program)
  if sizes is not None:
    of_truth = bool(extent(found).max() < 2)
    width, height = 1 / sizes[-1] if of_truth else sizes[-1]
    boxes = truth if of_truth else found
    above = percent(np.mean((boxes > 1).any(axis=1)))
    evidence.append(f"{above} of {len(boxes):,} boxes have a coordinate above 1, the largest is {boxes.max():.6g}")
    if not of_truth and extent(truth).max() > 2:
      names.append("boxes are in pixels of other frames than the ground truth")
      advice = f"their frames seem to be {width:.3g} times as wide and {height:.3g} times as high"
    else:
      names.append(f"{'ground-truth ' * of_truth}boxes are in pixels instead of normalised")
      advice = f"frames seem to be {width:.5g} x {height:.5g} pixels; put in their real size where that is wrong"
    if (sizes == sizes[-1]).all():
      divide = _awk(f"$3/={width:.6g};$4/={height:.6g};$5/={width:.6g};$6/={height:.6g}")
      filters[of_truth] = " | ".join(filter(None, (filters[of_truth], divide)))
    else:
      advice = f"divide x and y by width and height of the frames of each video, about {width:.5g} x {height:.5g}"

  def fix(rows: Rows) -> Rows:
    boxes = to_xyxy(rows.boxes)
    return rows._replace(boxes=boxes if sizes is None else boxes / np.tile(sizes[rows.video], 2))

  return Repair(
    " and ".join(names),
    "; ".join(evidence),
    fix,
    (filters[0], filters[1]),
    simpler=simpler,
    certain=sizes is not None,
    advice=advice,
  )


def _describe_layout(boxes: np.ndarray, truth: np.ndarray) -> str:
  """What makes one doubt that boxes are xyxy."""
  inverted = float(np.mean((boxes[:, :2] >= boxes[:, 2:]).any(axis=1)))
  if inverted > 0.05:
    return f"{percent(inverted)} of {len(boxes):,} boxes have x1 >= x2 or y1 >= y2"
  aspects = [np.median((b[:, 2] - b[:, 0]) / np.maximum(b[:, 3] - b[:, 1], 1e-9)) for b in (boxes, truth)]
  return f"detected boxes are {aspects[0]:.2f} times as wide as high (median), annotated ones {aspects[1]:.2f} times"


# --- class ids and scores -------------------------------------------------------------------------------------


def _repair_labels(bench: Bench) -> Iterator[Repair]:
  """Other readings of the class ids that lead to ids that exist."""
  found, truth = (np.unique(file.rows.action[~np.isnan(file.rows.boxes[:, 0])]) for file in (bench.found, bench.truth))
  if not len(found) or not len(truth):
    return
  classes = np.array(sorted(bench.label_map))
  num, last = len(classes), max(classes[-1], truth[-1])
  ranges = f"detections have ids {found[0]} to {found[-1]}, annotations {truth[0]} to {truth[-1]}"
  contiguous = {index + 1: int(index_of) for index, index_of in enumerate(classes)}
  off, mixed = "class ids are off by one", "80 and 60 classes are mixed up"
  if found[-1] < last:
    yield _labels(off, f"they count from 0 instead of 1: {ranges}", 1)
  if found[0] >= 2:
    yield _labels(off, f"they are one too high: {ranges}", -1)
  if truth[0] == 0:
    yield _labels(off, f"those of the ground truth count from 0 instead of 1: {ranges}", 1, of_truth=True)
  if num < classes[-1]:
    ranges += f"; the label map has {num} classes with ids up to {classes[-1]}"
    if found[-1] <= num:
      yield _labels(mixed, f"detections count the {num} classes from 1: {ranges}", contiguous)
    if found[-1] < num:
      shifted = {index - 1: index_of for index, index_of in contiguous.items()}
      yield _labels(mixed, f"detections count the {num} classes from 0: {ranges}", shifted)
    if truth[-1] <= num < found[-1]:
      yield _labels(mixed, f"annotations count the {num} classes from 1: {ranges}", contiguous, of_truth=True)
  scored = sorted(annotations.read_label_map("ava_60"))
  if last <= len(scored) < found[-1] <= 80:
    ranks = {index_of: index + 1 for index, index_of in enumerate(scored)}
    yield _labels(mixed, f"detections have AVA's ids of 80 classes, annotations count the 60 scored: {ranges}", ranks)


def _labels(name: str, evidence: str, change: int | dict[int, int], *, of_truth: bool = False) -> Repair:
  """A repair that adds to the ids, or looks them up (ids that are not there belong to no class)."""
  if isinstance(change, int):
    program = f"$7+={change}"
    move = lambda action: action + change  # noqa: E731
  else:
    pairs = "".join(f"m[{old}]={new};" for old, new in change.items())
    program = f"if(!n++){{{pairs}}}if(!($7 in m))next;$7=m[$7]"
    table = np.full(2 + max(change), -1, np.int32)
    table[list(change)] = list(change.values())
    move = lambda action: table[np.clip(action, -1, len(table) - 1)]  # noqa: E731

  def fix(rows: Rows) -> Rows:
    return rows._replace(action=np.where(np.isnan(rows.boxes[:, 0]), 0, move(rows.action)))

  return Repair(name, evidence, fix, ("", _awk(program)) if of_truth else (_awk(program), ""), of_truth)


def _repair_scores(bench: Bench) -> Iterator[Repair]:
  scores = bench.found.rows.extra
  if len(scores) and np.nanmin(scores) < np.nanmax(scores):
    yield Repair(
      "scores are inverted",
      f"the best detections have the lowest ones; they run from {np.nanmin(scores):.4g} to {np.nanmax(scores):.4g}",
      lambda rows: rows._replace(extra=-rows.extra),
      (_awk("$8=-$8"), ""),
      advice="scores may be distances, losses or 1 - probability",
    )
