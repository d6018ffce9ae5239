"""The command line that scores files: numbers of the evaluators in use, what it says and what it refuses."""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vad_jax.metrics import score

_ROOT = Path(__file__).parents[2]
_AVA = _ROOT / "tests" / "golden" / "ava_small"
_TUBES = _ROOT / "tests" / "golden" / "tubes_small"
_BOX = "0.1,0.2,0.5,0.9"


def _run(tmp_path: Path, *arguments: Any) -> dict[str, Any]:
  """Numbers that the command line writes."""
  path = tmp_path / "numbers.json"
  assert score.main([*map(str, arguments), "--json", str(path)]) == 0
  return json.loads(path.read_text())


def _write(tmp_path: Path, name: str, text: str) -> Path:
  path = tmp_path / name
  path.write_text(text)
  return path


@pytest.mark.parametrize(
  "protocol, variant",
  [("activitynet", "official_gt.csv"), ("slowfast", "slowfast_excluded"), ("mmaction2", "mmaction2_excluded")],
)
def test_scores_files(protocol: str, variant: str, tmp_path: Path, capsys: Any) -> None:
  files = ["--detections", _AVA / "results.csv", "--ground-truth", _AVA / "gt.csv"]
  excluded = [] if protocol == "activitynet" else ["--excluded", _AVA / "excluded.csv"]
  numbers = _run(tmp_path, *files, *excluded, "--protocol", protocol, "--iou", "0.5,0.75")
  expected = json.loads((_AVA / "expected.json").read_text())["expected"]["results.csv"]
  expected = {iou: expected[iou][variant] for iou in ("0.5", "0.75")}
  assert numbers["mAP_by_iou"] == {iou: pytest.approx(value["mAP"], abs=1e-12) for iou, value in expected.items()}
  assert numbers["mAP"] == pytest.approx(sum(value["mAP"] for value in expected.values()) / 2, abs=1e-12)
  assert len(numbers["AP"]) == 60
  for index, ap in numbers["AP"].items():
    values = [value["ap"].get(index) for value in expected.values()]
    assert ap == (None if None in values else pytest.approx(sum(values) / 2, abs=1e-12))
  assert numbers["protocol"] == protocol
  assert numbers["files"]["detections"] == {
    "path": str(_AVA / "results.csv"),
    "sha256": hashlib.sha256((_AVA / "results.csv").read_bytes()).hexdigest(),
  }
  output = capsys.readouterr()
  assert f"{100 * numbers['mAP']:.2f}" in output.out
  assert "watch (a person)" in output.out
  assert output.err.count("warning: ") == len(numbers["warnings"]) > 8


def test_iou_range_and_80_classes(tmp_path: Path) -> None:
  truth = _write(tmp_path, "truth.csv", f"a,0902,{_BOX},2,0\na,0902,{_BOX},1,0\n")
  found = _write(tmp_path, "found.csv", "a,902,0.1,0.2,0.5,0.7,2,0.9\n")  # IoU 5/7
  arguments = ["--detections", found, "--ground-truth", truth, "--iou", "0.5:0.05:0.95"]
  numbers = _run(tmp_path, *arguments, "--label-map", "ava_80")
  assert list(numbers["mAP_by_iou"]) == ["0.5", "0.55", "0.6", "0.65", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95"]
  assert numbers["AP"]["2"] == 0.5
  assert numbers["mAP"] == 0.25
  assert numbers["classes"]["2"] == "crawl"
  assert _run(tmp_path, *arguments)["mAP"] == 0  # 60 classes, without the second


def test_rows_of_a_keyframe_may_be_anywhere(tmp_path: Path) -> None:
  lines = (_AVA / "results.csv").read_text().splitlines()
  lines.sort(key=lambda line: line.split(",")[:2])
  arguments = ["--ground-truth", _AVA / "gt.csv", "--detections"]
  together = _run(tmp_path, *arguments, _write(tmp_path, "sorted.csv", "\n".join(lines)))
  apart = _run(tmp_path, *arguments, _write(tmp_path, "apart.csv", "\n".join(lines[::2] + lines[1::2])))
  assert together["num_detections"] == apart["num_detections"]
  assert together["mAP"] == pytest.approx(apart["mAP"], abs=0.01)  # but for ties


def test_detections_of_predict(tmp_path: Path) -> None:
  truth = _write(tmp_path, "truth.csv", f"clip,1,{_BOX},12,0\nclip,2,{_BOX},12,0\n")
  actor = {"box": [0.1, 0.2, 0.5, 0.9], "score": 0.8, "actions": [{"id": 12, "name": "stand", "score": 0.7}]}
  frames = [{"time": 1.0, "actors": [actor]}, {"time": 2.0, "actors": []}]
  found = _write(tmp_path, "found.txt", json.dumps({"video": "videos/clip.mp4", "keyframes": frames}))
  numbers = _run(tmp_path, "--detections", found, "--ground-truth", truth)
  assert numbers["mAP"] == numbers["AP"]["12"] == numbers["person_AP"] == 0.5


def test_report(tmp_path: Path) -> None:
  page = tmp_path / "report.html"
  numbers = _run(
    tmp_path,
    *("--detections", _AVA / "results_clean.csv", "--ground-truth", _AVA / "gt.csv", "--report", page),
    *("--compare", _AVA / "results.csv", "--train-annotations", _AVA / "gt.csv"),
  )
  written = json.loads(page.with_suffix(".json").read_text())
  assert written["analysis"]["frame_map"]["mean_ap"] == numbers["mAP"]
  assert written["compared_with"]["name"] == "results.csv"
  assert sum(written["train_counts"].values()) == sum(numbers["num_ground_truth"].values())
  assert "results_clean.csv" in page.read_text()


@pytest.mark.parametrize("name, rules", [("jhmdb_like", "jhmdb"), ("ucf_like", "ucf101_24")])
def test_scores_tubes(name: str, rules: str, tmp_path: Path, capsys: Any) -> None:
  def unpacked(file: str) -> Path:
    return _write(tmp_path, file, gzip.decompress((_TUBES / name / f"{file}.gz").read_bytes()).decode())

  files = ["--ground-truth", unpacked("gt.json"), "--detections", unpacked("dets.csv")]
  numbers = _run(tmp_path, *files, "--protocol", "class_query", "--dataset", rules, "--iou", "0.2,0.5")
  assert numbers["video_mAP_by_iou"] == {iou: numbers["summary"][f"video-mAP@{iou}"] for iou in ("0.2", "0.5")}
  assert numbers["mAP_by_iou"]["0.5"] == numbers["summary"]["frame-mAP@0.5"]
  assert list(numbers["AP"]) == list(numbers["video_AP"]) == list(numbers["classes"]) == ["1", "2", "3", "4", "5"]
  assert f"{100 * numbers['video_mAP']:.2f}" in capsys.readouterr().out
  assert score.main([*map(str, files), "--protocol", "act", "--iou", "0.33"]) == 1
  assert "error: --iou 0.33: tubes are scored at multiples of 0.05 only" in capsys.readouterr().err


def test_starts_without_jax(tmp_path: Path) -> None:
  arguments = ["--detections", str(_AVA / "results.csv"), "--ground-truth", str(_AVA / "gt.csv")]
  command = [sys.executable, "-X", "importtime", "-m", "vad_jax.evaluate", *arguments]
  result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
  modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
  assert "vad_jax.evaluate" in modules or "vad_jax.metrics.score" in modules
  assert not {module for module in modules if module.split(".")[0] in ("jax", "flax", "scipy", "tensorflow")}
  assert "mAP@0.5" in result.stdout


_TRUTH, _FOUND = f"a,0902,{_BOX},12,0\n", f"a,0902,{_BOX},12,0.5\n"


@pytest.mark.parametrize(
  "truth, found, complaint",
  [
    (_TRUTH, "", "found.csv: empty file; expected detections"),
    ("", _FOUND, "truth.csv: empty file; expected annotations"),
    (_TRUTH, f"{_FOUND}a,0902,{_BOX}\n", "found.csv:2: 6 columns"),
    (_TRUTH, f"a,0902,{_BOX},12,nan\n", "found.csv:1: score or person id is not a number"),
    ("a,0902,0.5,0.2,0.1,0.9,12,0\n", _FOUND, "annotation in row 1 (a at 902 s): box [0.5, 0.2, 0.1, 0.9] is inverted"),
    (f"a,0902,{_BOX},2,0\n", _FOUND, "no annotation has a class of the label map"),
    (_TRUTH, '{"video": "a.mp4"}', "found.csv: not detections of vad_jax.predict: 'keyframes' is missing"),
    (_TRUTH, '{"video": \n', "found.csv:2: not valid JSON"),
    (_TRUTH, "\x80", "found.csv:1: 1 columns"),
  ],
)
def test_bad_files(truth: str, found: str, complaint: str, tmp_path: Path, capsys: Any) -> None:
  arguments = [
    "--detections",
    _write(tmp_path, "found.csv", found),
    "--ground-truth",
    _write(tmp_path, "truth.csv", truth),
  ]
  assert score.main(list(map(str, arguments))) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert error.count("\n") == 1
  assert complaint in error


def test_missing_and_wrong_files(tmp_path: Path, capsys: Any) -> None:
  found, truth = _write(tmp_path, "found.csv", _FOUND), _write(tmp_path, "truth.csv", _TRUTH)
  good = ["--detections", str(found), "--ground-truth", str(truth)]
  for arguments, complaint in [
    (["--detections", "none.csv"], "No such file or directory: 'none.csv'"),
    (["--label-map", str(truth)], "truth.csv: no class found"),
    (["--excluded", str(truth)], "truth.csv: a row holds a box"),
    (["--json", str(tmp_path / "none" / "numbers.json")], "No such file or directory"),
  ]:
    assert score.main([*good, *arguments]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, complaint",
  [
    (["--iou", "50"], "'50': expected fractions in (0, 1]"),
    (["--iou", "0.5:0.95"], "expected fractions"),
    (["--iou", "0.5:0:0.95"], "expected fractions"),
    (["--protocol", "class_query"], "--dataset belongs to --protocol class_query"),
    (["--dataset", "jhmdb"], "--dataset belongs to --protocol class_query"),
    (["--protocol", "act", "--label-map", "ava_60"], "are for AVA, not for --protocol act"),
    (["--detections", "a", "b"], "--protocol activitynet takes one file"),
  ],
)
def test_wrong_usage(arguments: list[str], complaint: str, capsys: Any) -> None:
  with pytest.raises(SystemExit) as error:
    score.main(["--detections", "a", "--ground-truth", "b", *arguments])
  assert error.value.code == 2
  assert complaint in capsys.readouterr().err
