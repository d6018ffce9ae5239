"""The doctor names what is wrong with files, cures it, and leaves weak models alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vad_jax import doctor
from vad_jax.annotations import Rows, read_ava_csv, read_label_map, write_label_map
from vad_jax.metrics import trials

GOLDEN = Path(__file__).parent / "golden/ava_small"
LABEL_MAP = read_label_map("ava_60")
IDS = np.array(sorted(LABEL_MAP))
PIXELS = np.array([1280, 720, 1280, 720])


def make_rows(columns: list[tuple]) -> Rows:
  video, timestamp, boxes, action, extra = zip(*columns, strict=True)
  return Rows(
    np.array(video, object), np.array(timestamp, float), np.array(boxes), np.array(action, np.int32), np.array(extra)
  )


def make_movies(
  seed: int = 0, *, num_videos: int = 4, num_seconds: int = 35, jitter: float = 0.02, skill: float = 3.0
) -> tuple[Rows, Rows]:
  """Annotations of people who walk about, and detections whose boxes and actions are as good as asked for."""
  rng = np.random.default_rng(seed)
  truth, found = [], []
  frequency = 1 / np.arange(1, 61)
  frequency = rng.permutation(frequency / frequency.sum())
  for name in ("-a0Bq1_Kx9z", "Zq-8kfM2s_E", "0mTiC77vPqw", "xY4rL_h-9Gd", "T3_mNbV-c2K", "kk8Wd2-fSaR")[:num_videos]:
    people: list[tuple] = []
    for second in range(902, 902 + num_seconds):
      if rng.random() < 0.15 or not people:
        sides = rng.uniform([0.12, 0.35], [0.4, 0.85], (rng.integers(1, 4), 2))
        people = [
          (rng.uniform(0, 1 - size), size, rng.choice(IDS, 3, False, frequency), rng.integers(1000)) for size in sides
        ]
      for corner, size, actions, person in people:
        corner += rng.normal(0, 0.02, 2)
        np.clip(corner, 0, 1 - size, out=corner)
        box = np.round([*corner, *(corner + size)], 3)
        truth += [(name, second, box, action, float(person)) for action in actions[: rng.integers(1, 4)]]
        guess = np.clip(box + rng.normal(0, jitter, 4), 0, 1)
        guess[2:] = np.maximum(guess[:2] + 0.01, guess[2:])
        logits = rng.normal(-3, 1, 80)
        logits[actions - 1] += skill
        scores = 1 / (1 + np.exp(-logits))
        found += [(name, second, guess, index + 1, scores[index]) for index in np.argsort(-scores)[:12]]
  return make_rows(truth), make_rows(found)


def save(path: Path, rows: Rows) -> Path:
  """Writes rows whatever they hold, as tools do."""
  lines = [
    f"{video},{timestamp:g},{','.join(f'{value:.6g}' for value in box)},{action},{extra:.6g}\n"
    for video, timestamp, box, action, extra in zip(*rows, strict=True)
  ]
  path.write_text("".join(lines))
  return path


def examine(truth: Rows, found: Rows, label_map: dict[int, str] = LABEL_MAP, **kwargs) -> doctor.Diagnosis:
  files = []
  for path, rows in (("truth.csv", truth), ("found.csv", found)):
    names, video = np.unique(rows.video.astype(str), return_inverse=True)
    files.append(trials.File(path, names.astype(object), rows._replace(video=video.astype(np.int32))))
  return doctor.diagnose(files[0], files[1], label_map, **kwargs)


def wrong(diagnosis: doctor.Diagnosis) -> list[str]:
  return [finding.name for finding in diagnosis.findings if not finding.note]


def boxes(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rows], Rows]:
  return lambda rows: rows._replace(boxes=change(rows.boxes))


def times(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rows], Rows]:
  return lambda rows: rows._replace(timestamp=change(rows.timestamp))


def names(change: Callable[[str], str]) -> Callable[[Rows], Rows]:
  return lambda rows: rows._replace(video=np.array([change(name) for name in rows.video], object))


def ids(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rows], Rows]:
  return lambda rows: rows._replace(action=change(rows.action).astype(np.int32))


def scores(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rows], Rows]:
  return lambda rows: rows._replace(extra=change(rows.extra))


def ranks(rows: Rows) -> Rows:
  """Class ids from 1 to 60, as of a model that was trained on the 60 scored classes alone."""
  rows = rows.select(np.isin(rows.action, IDS))
  return rows._replace(action=(np.searchsorted(IDS, rows.action) + 1).astype(np.int32))


def same(rows: Rows) -> Rows:
  return rows


def both(*changes: Callable[[Rows], Rows]) -> Callable[[Rows], Rows]:
  def change(rows: Rows) -> Rows:
    for one in changes:
      rows = one(rows)
    return rows

  return change


yxyx = boxes(lambda b: b[:, [1, 0, 3, 2]])
xywh = boxes(lambda b: np.hstack([b[:, :2], b[:, 2:] - b[:, :2]]))
cxcywh = boxes(lambda b: np.hstack([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]]))
pixels = boxes(lambda b: b * PIXELS)
zero_based = ids(lambda i: i - 1)
frames = times(lambda t: (t - 900) * 30)

NAMES, CONSTANT, FRAMES = "video names do not match", "timestamps are off by a constant", "timestamps are in frames"
IN_PIXELS, OFF_BY_ONE = "boxes are in pixels instead of normalised", "class ids are off by one"
MIXED = "80 and 60 classes are mixed up"

# What is done to the ground truth and to the detections, and the mistakes that are to be named.
REPAIRABLE = {
  "pixels": (same, pixels, {IN_PIXELS}),
  "yxyx": (same, yxyx, {"boxes are yxyx instead of xyxy"}),
  "xywh": (same, xywh, {"boxes are xywh instead of xyxy"}),
  "cxcywh": (same, cxcywh, {"boxes are cxcywh instead of xyxy"}),
  "cxcywh in pixels": (same, both(cxcywh, pixels), {f"boxes are cxcywh instead of xyxy and {IN_PIXELS}"}),
  "annotations in pixels": (pixels, same, {f"ground-truth {IN_PIXELS}"}),
  "annotations as xywh": (xywh, same, {"ground-truth boxes are xywh instead of xyxy"}),
  "ids from 0": (same, zero_based, {OFF_BY_ONE}),
  "ids from 2": (same, ids(lambda i: i + 1), {OFF_BY_ONE}),
  "annotated ids from 0": (zero_based, same, {OFF_BY_ONE}),
  "60 classes from 1": (same, ranks, {MIXED}),
  "60 classes from 0": (same, both(ranks, zero_based), {MIXED}),
  "60 classes annotated": (ranks, same, {MIXED}),
  "a second late": (same, times(lambda t: t + 1), {CONSTANT}),
  "time of the clip": (same, times(lambda t: t - 900), {CONSTANT}),
  "half a minute early": (same, times(lambda t: t - 30.5), {CONSTANT}),
  "frames of the clip": (same, frames, {FRAMES}),
  "frames from 1": (same, times(lambda t: (t - 900) * 30 + 1), {FRAMES}),
  "frames at 29.97 fps": (same, times(lambda t: np.rint(t * 30000 / 1001)), {FRAMES}),
  "frames at 12 fps": (same, times(lambda t: t * 12), {FRAMES}),
  "milliseconds": (same, times(lambda t: t * 1000), {"timestamps are in milliseconds"}),
  "extension": (same, names(lambda n: f"{n}.mp4"), {NAMES}),
  "annotated extension": (names(lambda n: f"{n}.webm"), same, {NAMES}),
  "prefix": (same, names(lambda n: f"v_{n}"), {NAMES}),
  "directory": (same, names(lambda n: f"data/videos/{n}"), {NAMES}),
  "case": (same, names(str.lower), {NAMES}),
  "inverted scores": (same, scores(lambda s: 1 - s), {"scores are inverted"}),
  "names and pixels": (same, both(names(lambda n: f"a/{n}.MP4"), pixels), {NAMES, IN_PIXELS}),
  "ids and layout": (same, both(zero_based, yxyx), {OFF_BY_ONE, "boxes are yxyx instead of xyxy"}),
  "four at once": (same, both(names(lambda n: f"{n}.avi"), pixels, frames, ranks), {NAMES, IN_PIXELS, FRAMES, MIXED}),
}


@pytest.mark.parametrize("case", REPAIRABLE)
def test_mistake_is_named_and_the_commands_repair_it(case, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  change_truth, change_found, mistakes = REPAIRABLE[case]
  truth, found = make_movies()
  healthy = examine(truth, found)
  save(tmp_path / "truth.csv", change_truth(truth))
  save(tmp_path / "found.csv", change_found(found))
  diagnosis = doctor.diagnose(trials.read("truth.csv"), trials.read("found.csv"), LABEL_MAP)
  assert set(wrong(diagnosis)) == mistakes
  assert diagnosis.mean_ap < 0.8 * healthy.mean_ap
  assert diagnosis.repaired == pytest.approx(healthy.mean_ap, abs=0.02)
  for finding in diagnosis.findings[: len(mistakes)]:
    assert finding.before is not None and finding.before < 0.8 * healthy.mean_ap
    assert finding.after == diagnosis.repaired
  if shutil.which("awk") and shutil.which("sed"):
    for command in diagnosis.commands:
      subprocess.run(command, shell=True, check=True)
    repaired = [
      name if Path(name).exists() else name.replace("_repaired", "")
      for name in ("truth_repaired.csv", "found_repaired.csv")
    ]
    assert len(diagnosis.commands) == sum("repaired" in name for name in repaired) > 0
    again = doctor.diagnose(trials.read(repaired[0]), trials.read(repaired[1]), LABEL_MAP)
    assert wrong(again) == []
    assert again.mean_ap == pytest.approx(healthy.mean_ap, abs=0.02)


def test_each_video_may_have_its_own_size():
  truth, found = make_movies()
  sizes = dict(zip(dict.fromkeys(found.video), (PIXELS, PIXELS / 2, PIXELS[[1, 0, 1, 0]], PIXELS / 3), strict=True))
  found = found._replace(boxes=found.boxes * np.array([sizes[name] for name in found.video]))
  diagnosis = examine(truth, found)
  assert wrong(diagnosis) == [IN_PIXELS]
  assert diagnosis.repaired > 0.4 and diagnosis.commands == ()


def keep(mask: Callable[[Rows], np.ndarray]) -> Callable[[Rows], Rows]:
  return lambda rows: rows.select(mask(rows))


def mirror_first_video(rows: Rows) -> Rows:
  first = rows.video == rows.video[0]
  return rows._replace(boxes=np.where(first[:, None], 1 - rows.boxes[:, [2, 3, 0, 1]] ** 3, rows.boxes))


def annotated_people(truth: Rows, found: Rows) -> Rows:
  """Detections made on most annotated boxes, the others slightly off, as on those of another version."""
  rng = np.random.default_rng(0)
  shifted = truth.boxes + 0.1 * (rng.random((len(truth.video), 1)) < 0.1)
  return truth._replace(boxes=shifted, extra=rng.random(len(truth.video)))


def without_frequent_class(truth: Rows, found: Rows) -> tuple[Rows, Rows]:
  return truth.select(truth.action != np.bincount(truth.action).argmax()), found


UNREPAIRABLE = {
  "scores are NaN": lambda t, f: (t, f._replace(extra=np.where(np.arange(len(f.extra)) % 7, f.extra, np.nan))),
  "all scores are equal": lambda t, f: (t, f._replace(extra=np.full(len(f.extra), 0.5))),
  "all scores are very low": lambda t, f: (t, f._replace(extra=f.extra * 1e-3)),
  "there are no detections": lambda t, f: (t, f.select(f.extra > 2)),
  "there are no annotations": lambda t, f: (t.select(t.action > 100), f),
  "detections stand in the file more than once": lambda t, f: (t, Rows(*map(np.concatenate, zip(f, f, strict=True)))),
  "annotations stand in the file more than once": lambda t, f: (Rows(*map(np.concatenate, zip(t, t, strict=True))), f),
  "person ids stand where scores belong": lambda t, f: (t, t),
  "the ground truth holds detections": lambda t, f: (f, f),
  "videos without detections": lambda t, f: (t, f.select(f.video != f.video[0])),
  "the files have no video in common": lambda t, f: (t, names(lambda n: n[::-1])(f)),
  "annotated keyframes without detections": lambda t, f: (t, f.select(f.timestamp % 4 == 0)),
  "boxes do not fit in some videos": lambda t, f: (t, mirror_first_video(f)),
  "the ground truth is of another version": lambda t, f: (t, annotated_people(t, f)),
  "frequently detected classes are empty in the ground truth": without_frequent_class,
  "classes that are never detected": lambda t, f: (t, f.select(np.isin(f.action, IDS[::4]))),
  "classes of detections are missing in the label map": lambda t, f: (t, ids(lambda i: i + 1000)(f)),
  "no annotation has a class of the label map": lambda t, f: (ids(lambda i: i + 1000)(t), f),
  "detection boxes are inverted": lambda t, f: (t, boxes(lambda b: b[:, [2, 1, 0, 3]])(f)),
}


@pytest.mark.parametrize("name", UNREPAIRABLE)
def test_mistake_is_named(name):
  diagnosis = examine(*UNREPAIRABLE[name](*make_movies()))
  assert name in wrong(diagnosis)
  for finding in diagnosis.findings:
    assert finding.evidence and finding.cure
    if finding.after is not None and finding.before is not None and not finding.note:
      assert finding.after > finding.before


def test_what_costs_most_comes_first_and_notes_come_last():
  truth, found = make_movies()
  diagnosis = examine(truth, Rows(*map(np.concatenate, zip(yxyx(found), yxyx(found), strict=True))))
  assert wrong(diagnosis) == ["boxes are yxyx instead of xyxy", "detections stand in the file more than once"]
  assert [finding.note for finding in diagnosis.findings] == sorted(finding.note for finding in diagnosis.findings)


def test_swapped_files_are_judged_the_right_way_round():
  truth, found = make_movies()
  diagnosis = examine(found, truth)
  assert wrong(diagnosis) == ["files are swapped"]
  assert diagnosis.findings[0].after == examine(truth, found).mean_ap > diagnosis.mean_ap


def test_more_rows_than_the_protocol_scores():
  truth, found = make_movies()
  rng = np.random.default_rng(0)
  crowd = Rows(*map(np.concatenate, zip(*[found] * 5, strict=True)))
  anywhere = np.sort(rng.uniform(size=(len(crowd.video), 2, 2)), axis=1).reshape(-1, 4)
  crowd = crowd._replace(boxes=anywhere, action=np.full_like(crowd.action, IDS[0]), extra=crowd.extra + 1)
  diagnosis = examine(truth, Rows(*map(np.concatenate, zip(found, crowd, strict=True))))
  assert wrong(diagnosis) == ["more than 50 detections in a keyframe"]
  assert diagnosis.findings[0].after == pytest.approx(examine(truth, found).mean_ap, abs=0.03)


def test_order_of_rows_is_a_note():
  truth, found = make_movies()
  worse = found._replace(boxes=found.boxes * 0.98, extra=found.extra * 0.5)
  diagnosis = examine(truth, Rows(*map(np.concatenate, zip(worse, found, strict=True))))
  noted = {finding.name: finding for finding in diagnosis.findings}
  finding = noted["detections of a keyframe are not in order of their scores"]
  assert finding.note and finding.before is not None and finding.before < (finding.after or 0)
  assert wrong(diagnosis) == []


def test_excluded_keyframes():
  truth, found = make_movies()
  excluded = {(str(video), float(second)) for video in set(truth.video) for second in range(905, 920)}
  lost = np.array([(video, second) in excluded for video, second in zip(found.video, found.timestamp, strict=True)])
  diagnosis = examine(truth, found.select(~lost), excluded=excluded)
  assert wrong(diagnosis) == ["excluded keyframes are scored"]
  finding = diagnosis.findings[0]
  assert finding.before is not None and finding.after is not None and finding.after > finding.before + 0.1
  assert wrong(examine(truth, found, excluded=excluded)) == []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  seed=st.integers(0, 10**6),
  jitter=st.sampled_from((0.02, 0.1, 0.3)),
  skill=st.sampled_from((0.0, 0.5, 3.0)),
  num_seconds=st.sampled_from((5, 25)),
  spoil=st.sampled_from(("nothing", "boxes anywhere", "wide boxes", "classes", "scores", "few rows", "logits")),
)
def test_weak_models_have_no_format_errors(seed, jitter, skill, num_seconds, spoil):
  truth, found = make_movies(seed, num_videos=3, num_seconds=num_seconds, jitter=jitter, skill=skill)
  rng = np.random.default_rng(seed)
  size = len(found.video)
  if spoil == "boxes anywhere":
    found = found._replace(boxes=np.sort(rng.uniform(size=(size, 2, 2)), axis=1).reshape(-1, 4))
  elif spoil == "wide boxes":
    corner = rng.uniform(0, [0.5, 0.65], (size, 2))
    found = found._replace(boxes=np.hstack([corner, corner + np.array([0.45, 0.3])]))
  elif spoil == "classes":
    found = found._replace(action=rng.permutation(80)[found.action - 1].astype(np.int32) + 1)
  elif spoil == "scores":
    found = found._replace(extra=rng.random(size))
  elif spoil == "few rows":
    found = found.select(found.extra > np.quantile(found.extra, 0.7))
  elif spoil == "logits":
    found = found._replace(extra=np.log(found.extra))
  assert not set(wrong(examine(truth, found))) - {"classes that are never detected"}


def test_golden_files_are_fine(capsys):
  files = [f"--detections={GOLDEN / 'results_clean.csv'}", f"--ground-truth={GOLDEN / 'gt_with_empty_rows.csv'}"]
  assert doctor.main([*files, f"--label-map={GOLDEN / 'labelmap.pbtxt'}"]) == 0
  assert "Everything fine" in capsys.readouterr().out


def test_command_line(tmp_path, capsys):
  truth, found = make_movies()
  label_map = tmp_path / "own.pbtxt"
  write_label_map(label_map, LABEL_MAP)
  files = [f"--detections={save(tmp_path / 'found.csv', pixels(found))}"]
  files += [f"--ground-truth={save(tmp_path / 'truth.csv', truth)}", f"--label-map={label_map}"]
  assert doctor.main(files) == 1
  printed = capsys.readouterr().out
  assert "1. boxes are in pixels" in printed and "mAP:" in printed and "awk" in printed and "-> " in printed
  assert doctor.main([*files, "--json"]) == 1
  content = json.loads(capsys.readouterr().out)
  assert content["findings"][0]["name"] == IN_PIXELS and content["mean_ap"] == 0 and content["repaired"] > 0.4


@pytest.mark.parametrize("option", ["detections", "ground-truth", "label-map"])
def test_unusable_file_is_an_error_of_one_line(option, tmp_path, capsys):
  truth, found = make_movies(num_videos=1, num_seconds=5)
  files = {"detections": save(tmp_path / "found.csv", found), "ground-truth": save(tmp_path / "truth.csv", truth)}
  broken = tmp_path / "broken"
  broken.write_bytes(b"\x80\x04}q\x00")
  for path in (broken, tmp_path / "missing"):
    assert doctor.main([f"--{name}={value}" for name, value in (files | {option: path}).items()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(path) in error and error.count("\n") == 1


def test_rows_that_make_no_sense_are_counted_and_the_rest_is_examined(tmp_path):
  truth, found = make_movies()
  path = save(tmp_path / "found.csv", found)
  path.write_text("video_id,timestamp,x1,y1,x2,y2,action_id,score\n" + path.read_text() + "a,1,nan,0,1,1,2,0.5\na,b\n")
  file = trials.read(path)
  assert file.skipped == 3 and len(file.rows.video) == len(found.video)
  assert f"{path}:1" in file.complaint
  diagnosis = doctor.diagnose(trials.read(save(tmp_path / "truth.csv", truth)), file, LABEL_MAP)
  assert wrong(diagnosis) == ["rows cannot be read"]


def test_lenient_reading_agrees_with_the_strict_one(tmp_path):
  for name in ("gt_with_empty_rows.csv", "results.csv"):
    path = tmp_path / name
    path.write_text((GOLDEN / name).read_text() + "x,1,0,0,1,1,0,nan\nx,1,0,0,1,1,7\n")
    file, strict = trials.read(path), read_ava_csv(GOLDEN / name)
    assert file.names[file.rows.video].tolist() == [*strict.video, "x", "x"]
    for ours, theirs in zip(file.rows[1:], strict[1:], strict=True):
      np.testing.assert_array_equal(ours[:-2], theirs)
    assert file.rows.action[-2:].tolist() == [0, 7] and file.rows.extra[-1] == 1 and np.isnan(file.rows.extra[-2])


def test_starts_without_jax():
  code = "import sys, vad_jax.doctor; sys.exit('jax' in sys.modules or 'cv2' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
