"""What can be wrong with files of detections and ground truth: one check for each kind of mistake."""

import difflib
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vad_jax.annotations import Rows
from vad_jax.metrics.frame_map import MAX_ROWS, best_overlaps, keyframe_ids
from vad_jax.metrics.repairs import extent, percent
from vad_jax.metrics.trials import Bench, File, Plan, best_of_box, keyframe_key


class Finding(NamedTuple):
  """Something that is wrong, or worth knowing.

  Attributes:
    name: what.
    evidence: the numbers that show it.
    cure: what to do, with the command where there is one.
    before: mAP with all other repairs but not this one; fraction, None where it was not tried.
    after: mAP with this repaired as well.
    note: it explains something and need not be wrong.
  """

  name: str
  evidence: str
  cure: str
  before: float | None = None
  after: float | None = None
  note: bool = False


class Case(NamedTuple):
  """What checks look at.

  Attributes:
    bench: the files.
    plan: the repairs that were found to help.
    truth, found: annotations and detections of the sample, repaired.
    mean_ap: mAP of these, a fraction.
    excluded: video and timestamp of keyframes to leave out.
  """

  bench: Bench
  plan: Plan
  truth: Rows
  found: Rows
  mean_ap: float
  excluded: set[tuple[str, float]]


def edit_command(file: File, *filters: str) -> str:
  """Shell command that writes the file anew, passed through filters."""
  repaired = f"{file.path.removesuffix('.csv')}_repaired.csv"
  return f"< {shlex.quote(file.path)} {' | '.join(filters)} > {shlex.quote(repaired)}"


def _some(values: Any, num: int = 5) -> str:
  values = list(map(str, values))
  return ", ".join(values[:num]) + (", ..." if len(values) > num else "")


def check_reading(file: File) -> Iterator[Finding]:
  """Rows that were left out."""
  if file.skipped:
    yield Finding(
      "rows cannot be read",
      f"{file.skipped:,} of {file.skipped + len(file.rows.video):,} rows of {file.path} make no sense; the first "
      f"complaint: {file.complaint}",
      "correct these rows (they are left out here)",
    )


def _check_repairs(case: Case) -> Iterator[Finding]:
  """What the search found."""
  for field, repair in zip(Plan._fields, case.plan, strict=True):
    if repair:
      commands = [
        edit_command(file, command)
        for file, command in zip((case.bench.found, case.bench.truth), repair.filters, strict=True)
        if command
      ]
      without = case.bench.result(case.plan._replace(**{field: None}))[0]
      cure = "; ".join(filter(None, (" && ".join(commands), repair.advice)))
      yield Finding(repair.name, repair.evidence, cure, without, case.mean_ap)


def _check_last_column(case: Case) -> Iterator[Finding]:
  if _holds_person_ids(case.bench.found.rows):
    yield Finding(
      "person ids stand where scores belong",
      f"the last column of the detections holds whole numbers up to {case.bench.found.rows.extra.max():g}",
      "give detections, not annotations, or write the score into column 8",
    )
  elif holds_scores(case.bench.truth.rows):
    yield Finding(
      "the ground truth holds detections",
      "its last column holds fractions (scores) instead of person ids",
      "give the annotations as --ground-truth",
    )


def _holds_person_ids(rows: Rows) -> bool:
  """Whether the last column holds whole numbers above 1 that do not depend on the action."""
  rows = rows.select(np.arange(min(len(rows.extra), 100_000)))
  rows = rows.select(~np.isnan(rows.boxes[:, 0]) & ~np.isnan(rows.extra))
  extra = rows.extra
  if not len(extra) or extra.max() <= 1 or not (extra == np.rint(extra)).all():
    return False
  best, worst = best_of_box(rows), best_of_box(rows._replace(extra=-extra))
  return len(best) < len(extra) and bool((extra[best] == extra[worst]).all())


def holds_scores(rows: Rows) -> bool:
  """Whether the last column holds fractions."""
  return bool(np.mean(rows.extra != np.rint(rows.extra)) > 0.5) if len(rows.extra) else False


def _check_videos(case: Case) -> Iterator[Finding]:
  """Annotated videos without detections, and the other way round."""
  bench = case.bench
  names, other_names = bench.truth.names, bench.found.names
  keys = bench.keys(case.plan)
  covered = np.unique(keys.video[keys.video >= 0])
  missing = np.setdiff1d(np.unique(bench.video_of_person), covered)
  share = float(np.isin(bench.video_of_person, missing).mean()) if len(missing) else 0.0
  if share < 0.05:
    return
  unknown = other_names[np.unique(bench.keyframes.video[keys.video < 0])].tolist()
  evidence = f"{len(missing)} of {len(names)} annotated videos, with {percent(share)} of the people, have no detections"
  evidence += f": {_some(names[missing], 3)}"
  if unknown:
    missed = str(names[missing[0]])
    evidence += (
      f"; {len(unknown)} of {len(other_names)} videos of the detections are not annotated: {_some(unknown, 3)}"
    )
    close = difflib.get_close_matches(missed, unknown[:1000], 1)
    evidence += f" ({close[0]!r} may be {missed!r})" if close else ""
  if not len(covered):
    yield Finding(
      "the files have no video in common",
      evidence,
      "give the ground truth of the same split and version as the detections, with the same names",
    )
    return
  after = bench.score(case.truth.select(np.isin(case.truth.video, covered)), case.found)[0]
  yield Finding("videos without detections", evidence, "run the detector on them", case.mean_ap, after)


def _check_keyframes(case: Case) -> Iterator[Finding]:
  """Annotated keyframes without detections in videos that have some."""
  bench = case.bench
  keys = bench.keys(case.plan)
  keys = keys.select(keys.video >= 0)
  people = case.truth.select(np.isin(case.truth.video, keys.video) & (case.truth.action != 0))
  covered = np.isin(keyframe_key(people), keyframe_key(keys))
  if not len(covered) or np.mean(~covered) < 0.5:
    return
  ours, theirs = map(_describe_times, (bench.truth.rows, bench.keyframes))
  absent = percent(float(np.mean(~np.isin(keyframe_key(keys), bench.annotated))))
  truth = case.truth.select(np.isin(keyframe_key(case.truth), keyframe_key(keys)))
  yield Finding(
    "annotated keyframes without detections",
    f"{percent(float(np.mean(~covered)))} of the annotations of these videos are on keyframes without detections, and "
    f"{absent} of the keyframes of the detections are not annotated; annotations are {ours}, detections {theirs}",
    "compare the timestamps of both files: another version or split, other keyframes (as every fourth second), an "
    "unfinished run or a high threshold",
    case.mean_ap,
    bench.score(truth, case.found)[0],
  )


def _describe_times(rows: Rows) -> str:
  time = np.unique(rows.timestamp)
  return f"at {time[0]:g} to {time[-1]:g}, mostly {np.median(np.diff(time)) if len(time) > 1 else 0:g} apart"


def _check_version(case: Case) -> Iterator[Finding]:
  """Boxes that are those of the ground truth in part, or fit in part of the videos."""
  fit, videos = case.bench.fit(case.plan), case.bench.video_of_person
  if not len(fit):
    return
  cure = "score with the version of the ground truth (such as AVA v2.1 or v2.2) that the detections were made with"
  covered = fit[np.isin(videos, case.found.video)]
  same = np.count_nonzero(covered > 0.999) / max(len(covered), 1)
  if 0.3 < same < 0.99:
    yield Finding(
      "the ground truth is of another version",
      f"{percent(same)} of the annotated boxes are in the detections exactly, the others fit with an IoU of "
      f"{np.mean(covered[covered <= 0.999]):.2f} on average",
      cure,
    )
  fits = np.bincount(videos, fit > 0.3, len(case.bench.truth.names))
  counts = np.bincount(videos, minlength=len(fits))
  people = np.unique(np.column_stack([videos, case.bench.person]), axis=0)[:, 0].astype(np.int64)
  enough = (np.bincount(people, minlength=len(fits)) >= 8) | (counts >= 200)
  bad = np.flatnonzero(enough & (fits < 0.1 * fits.sum() / counts.sum() * counts))
  bad = bad[np.isin(bad, case.found.video)]
  if fits.sum() > 0.5 * counts.sum() and len(bad):
    truth, found = (rows.select(~np.isin(rows.video, bad)) for rows in (case.truth, case.found))
    yield Finding(
      "boxes do not fit in some videos",
      f"in {len(bad)} of {np.count_nonzero(counts)} videos hardly any annotated box has a detection at IoU 0.3, in all "
      f"together {percent((fit > 0.3).mean())} have: {_some(case.bench.truth.names[bad], 3)}",
      f"look whether these videos are cut or scaled differently, or {cure}",
      case.mean_ap,
      case.bench.score(truth, found)[0],
    )


def _check_boxes(case: Case) -> Iterator[Finding]:
  """Boxes that are wrong in themselves where no repair of boxes fits."""
  if case.plan.boxes:
    return
  found, truth = (rows.boxes[~np.isnan(rows.boxes[:, 0])] for rows in (case.bench.found.rows, case.bench.truth.rows))
  for what, boxes, others in (("detection", found, truth), ("annotated", truth, found)):
    pixels = float(np.mean((boxes > 1.5).any(axis=1)))
    inverted = float(np.mean((boxes[:, :2] > boxes[:, 2:]).any(axis=1)))
    if pixels > 0.05 and extent(boxes).max() > 2 * max(1, extent(others).max()):
      yield Finding(
        f"{what} boxes are in pixels instead of normalised",
        f"{percent(pixels)} of {len(boxes):,} boxes have a coordinate above 1.5, the largest is {boxes.max():.6g}",
        "divide x by the width and y by the height of the frame",
      )
    if inverted > 0.01:
      yield Finding(
        f"{what} boxes are inverted",
        f"{percent(inverted)} of {len(boxes):,} boxes have x1 > x2 or y1 > y2",
        "write x1,y1,x2,y2 with x1 < x2 and y1 < y2 (not x,y,width,height)",
      )


def _check_ids(case: Case) -> Iterator[Finding]:
  """Class ids that no class has."""
  classes = case.bench.label_map
  for what, file in (("detections", case.bench.found), ("annotations", case.bench.truth)):
    action = file.rows.action[~np.isnan(file.rows.boxes[:, 0])]
    zeros = float(np.mean(action < 1))
    if zeros and not case.plan.labels:
      yield Finding(
        "class ids are off by one",
        f"{percent(zeros)} of {len(action):,} {what} have an id below 1",
        "ids count from 1; remove these rows where they are background, else add 1 to all: "
        + edit_command(file, "awk -F, -v OFS=, 'NF>2{$7+=1}1'"),
      )
    outside = ~np.isin(action, list(classes)) & (action > 0)
    ids = np.unique(action[outside])
    if not len(ids) or case.plan.labels:
      continue
    # AVA has 80 classes, of which 60 are scored; models and annotations of all 80 are as they should be.
    is_ava = max(classes) > 60 and ids[-1] <= 80 and (action.max() > 60 or len(np.unique(action)) < 30)
    if not is_ava or outside.mean() > 0.4:
      yield Finding(
        f"classes of {what} are missing in the label map",
        f"{percent(outside.mean())} of {len(action):,} rows have ids that the label map lacks, and are not scored: "
        f"{_some(ids)}",
        "give the label map of this data set with --label-map",
      )


def _check_classes(case: Case) -> Iterator[Finding]:
  """Classes that only one of the files knows."""
  label_map = case.bench.label_map
  name = lambda index: f"{index} ({label_map[index]})"  # noqa: E731
  best, on_person, right = _best_actions(case)
  video, best = best.video[on_person], best.action[on_person]
  scored = case.truth.action[np.isin(case.truth.action, list(label_map))]
  annotated, detected = (set(np.unique(file.rows.action).tolist()) for file in (case.bench.truth, case.bench.found))
  if not case.plan.labels:
    empty = [index for index in sorted(label_map) if index not in annotated]
    # A good model would not see a class in video after video that is not there.
    is_good = right.sum() > 0.3 * np.isin(best, sorted(annotated)).sum()
    videos = {c: len(np.unique(video[best == c])) for c in empty if np.count_nonzero(best == c) > 0.1 * len(best)}
    frequent = [c for c in videos if is_good and videos[c] >= max(3, len(np.unique(video)) / 2)]
    if not scored.size:
      yield Finding(
        "no annotation has a class of the label map",
        f"annotations have ids {_some(sorted(annotated))}, the label map {_some(sorted(label_map))}",
        "give the label map of this data set with --label-map",
      )
    elif frequent:
      yield Finding(
        "frequently detected classes are empty in the ground truth",
        f"no annotation has class {', '.join(map(name, frequent))}, the best one for "
        f"{percent(np.isin(best, frequent).mean())} of the boxes on people",
        "check that the ground truth is complete and of the same classes; else leave them out of the label map",
      )
    elif empty and any(index in detected for index in empty):
      yield Finding(
        "classes without ground truth",
        f"{len(empty)} of {len(label_map)} classes have no annotation and do not count: {_some(map(name, empty))}",
        "nothing, if that is how the data are",
        note=True,
      )
  lost = sorted(set(scored.tolist()) - set(np.unique(case.found.action).tolist()))
  if lost and len(case.found.action):
    share = float(np.isin(scored, lost).mean())
    num = len(np.unique(scored))
    yield Finding(
      "classes that are never detected",
      f"{len(lost)} of {num} annotated classes, with {percent(share)} of the annotations, have AP 0 "
      f"for want of any detection: {_some(map(name, lost))}",
      "check the number of outputs of the model, its label map, and the thresholds",
      case.mean_ap,
      case.mean_ap * num / (num - len(lost)) if len(lost) < num else None,
      note=share < 0.5,
    )


def _best_actions(case: Case) -> tuple[Rows, np.ndarray, np.ndarray]:
  """For each box the row of the best score, whether it is on a person, and whether that person does this."""
  best = case.found.select(best_of_box(case.found))
  truth_keyframe, keyframe = keyframe_ids(case.truth, best)
  factor = 1 + max(case.truth.action.max(), best.action.max(initial=0))

  def overlaps(truth_action: np.ndarray | int, action: np.ndarray | int) -> np.ndarray:
    truth_group, group = truth_keyframe * factor + truth_action, keyframe * factor + action
    return best_overlaps(truth_group, case.truth.boxes, group, best.boxes)[0] >= 0.5

  return best, overlaps(0, 0), overlaps(case.truth.action, best.action)


def _check_scores(case: Case) -> Iterator[Finding]:
  scores = case.bench.found.rows.extra
  missing = np.isnan(scores)
  if missing.any():
    yield Finding(
      "scores are NaN",
      f"{percent(missing.mean())} of {len(scores):,} detections; they are left out here, an evaluation refuses them",
      "look for the NaN in the model; to drop these rows: "
      + edit_command(case.bench.found, """awk -F, 'tolower($8)!~/nan/'"""),
    )
  scores = scores[~missing]
  if not len(scores) or _holds_person_ids(case.bench.found.rows):
    return
  low, high = float(scores.min()), float(scores.max())
  if len(scores) > 1 and low == high and case.mean_ap < 0.95:
    yield Finding(
      "all scores are equal",
      f"each of {len(scores):,} detections has score {high:g}, so that their order is arbitrary",
      "write the score of the action into column 8",
    )
  elif 0 <= high < 0.05:
    yield Finding(
      "all scores are very low",
      f"the best of {len(scores):,} scores is {high:.3g}: usual thresholds (0.3 for actions to be shown, 0.002 for "
      "results of mmaction2 to be written) leave little or nothing",
      "lower the thresholds, or look whether a sigmoid is applied twice or logits are softmax outputs; mAP itself "
      "only depends on the order",
    )
  elif high > 1.5 or low < -0.5:
    kind = "logits" if low < -0.5 else "percent" if high <= 100 else "unbounded"
    yield Finding(
      f"scores seem to be {kind}",
      f"they run from {low:.4g} to {high:.4g}",
      "nothing for mAP, which only depends on the order; thresholds expect probabilities",
      note=True,
    )


def _check_duplicates(case: Case) -> Iterator[Finding]:
  for what, rows in (("detections", case.found), ("annotations", case.truth)):
    rows = rows.select(~np.isnan(rows.boxes[:, 0]))
    table = np.column_stack([keyframe_key(rows), rows.boxes, rows.action, rows.extra])
    order = np.lexsort(table.T)
    again = np.zeros(len(order), bool)
    again[1:] = (np.diff(table[order], axis=0) == 0).all(axis=1)
    if not again.any():
      continue
    rows = rows.select(np.sort(order[~again]))
    after = case.bench.score(*((case.truth, rows) if what == "detections" else (rows, case.found)))[0]
    file = case.bench.found if what == "detections" else case.bench.truth
    yield Finding(
      f"{what} stand in the file more than once",
      f"{again.sum():,} of {len(order):,} are the same as another one",
      edit_command(file, "awk '!seen[$0]++'"),
      case.mean_ap,
      after,
      note=bool(again.mean() < 0.01),
    )


def _check_order(case: Case) -> Iterator[Finding]:
  """What the limit of rows, and the order of rows in the file, cost."""
  found = case.found.select(np.isin(case.found.action, list(case.bench.label_map)))
  keyframe = keyframe_ids(case.truth, found)[1]
  # Without a limit, this protocol lets detections claim boxes in the order of the file.
  as_is, ranked = (
    case.bench.score(case.truth, rows, protocol="slowfast")[0]
    for rows in (found, found.select(np.lexsort((-found.extra, keyframe))))
  )
  count = np.bincount(keyframe, minlength=1)
  if count.max() > MAX_ROWS:
    yield Finding(
      f"more than {MAX_ROWS} detections in a keyframe",
      f"{np.count_nonzero(count > MAX_ROWS):,} of {len(count):,} keyframes have up to {count.max():,} rows; the "
      f"official evaluator scores the best {MAX_ROWS}, all classes together",
      "drop boxes and actions of low score, or suppress overlapping boxes; other protocols have no such limit",
      case.mean_ap,
      ranked,
      note=ranked < 1.25 * case.mean_ap + 0.03,
    )
  if as_is < ranked - 0.01:
    yield Finding(
      "detections of a keyframe are not in order of their scores",
      "the slowfast protocol goes by the order in the file",
      "sort them: "
      + edit_command(case.bench.found, "sort -t, -k1,1 -k2,2n -k8,8gr")
      + "; other protocols do that themselves",
      as_is,
      ranked,
      note=True,
    )


def _check_excluded(case: Case) -> Iterator[Finding]:
  if not case.excluded:
    return
  numbers = {name: index for index, name in enumerate(case.bench.truth.names)}
  listed = [(numbers[video], time) for video, time in case.excluded if video in numbers]
  video, time = (np.array(column) for column in zip(*listed, strict=True)) if listed else (np.zeros(0), np.zeros(0))
  excluded = keyframe_key(case.truth._replace(video=video, timestamp=time))
  in_truth = np.isin(keyframe_key(case.bench.truth.rows), excluded) & (case.bench.truth.rows.action > 0)
  keys = case.bench.keys(case.plan)
  detected = np.isin(keyframe_key(keys), excluded)
  num_found = int(case.bench.rows_of_keyframe[detected].sum())
  num_annotated = len(np.intersect1d(case.bench.annotated, excluded))
  if not in_truth.any() and not num_found:
    return
  truth, found = (rows.select(~np.isin(keyframe_key(rows), excluded)) for rows in (case.truth, case.found))
  after = case.bench.score(truth, found)[0]
  yield Finding(
    "excluded keyframes are scored",
    f"{in_truth.sum():,} annotations and {num_found:,} detections are on the {len(case.excluded):,} excluded keyframes",
    "give the list to the evaluation: python -m vad_jax.evaluate --excluded",
    case.mean_ap,
    after,
    # The mAP of other keyframes is another one in any case: a detector that skipped these is what gives it away.
    note=after < case.mean_ap + 0.01 or 2 * int(detected.sum()) > num_annotated,
  )


def _check_model(case: Case) -> Iterator[Finding]:
  """How good boxes and actions are, which explains the mAP where the files are as they should be."""
  _, on_person, right = _best_actions(case)
  if not len(right):
    return
  covered = case.bench.fit(case.plan) >= 0.5
  yield Finding(
    "how good the detections are",
    f"{percent(np.mean(covered))} of the annotated people are found (IoU 0.5), {percent(np.mean(on_person))} of the "
    f"{len(right):,} detected boxes are on people, and of these the best action is right for "
    f"{percent(right.sum() / max(on_person.sum(), 1))}",
    "the lowest of the three is what to work at",
    note=True,
  )


CHECKS = (
  *(_check_repairs, _check_last_column, _check_videos, _check_keyframes, _check_version, _check_boxes, _check_ids),
  *(_check_classes, _check_scores, _check_duplicates, _check_order, _check_excluded, _check_model),
)
