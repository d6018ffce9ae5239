"""Looking at a data set: the counts are those of the files, the picture shows them."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests import numbered_video
from vad_jax.datasets import inspect, records

SAMPLE = Path(__file__).parents[2] / "data" / "sample"


def numbers(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
  inspect.main([*arguments, "--json"])
  return json.loads(capsys.readouterr().out)


def test_sample(capsys, tmp_path):
  sheet = tmp_path / "sheet.png"
  found = numbers(capsys, str(SAMPLE), "--sheet", str(sheet))["splits"]
  assert list(found) == ["train", "val"]
  val = found["val"]
  assert (val["videos"], val["keyframes"], val["boxes"], val["actions"]) == (3, 15, 25, 35)
  assert {name: count for name, count in val["classes"].items() if count} == {
    "stand": 10, "throw": 5, "carry/hold (an object)": 5, "jump/leap": 5, "sit": 5, "run/jog": 5,
  }  # fmt: skip
  assert (val["fps"], val["sizes"]) == ({"25.00": 3}, {"320 x 240": 3})
  assert val["seconds"]["sum"] == pytest.approx(18, abs=0.01)
  assert val["box_area"]["max"] == pytest.approx(0.1922, abs=1e-4)
  assert val["boxes_per_keyframe"] == {"min": 1, "median": 2, "mean": pytest.approx(5 / 3), "max": 2}
  picture = cv2.imread(str(sheet))
  assert picture is not None and picture.shape[1] > 4 * 320 and picture.shape[0] > 3 * 240


def test_sheet_has_boxes_where_people_are():
  sets = inspect.open_set(SAMPLE, "train")
  dataset = sets["train"]
  keyframe = dataset.keyframes[0]
  plain = dataset.frames.frames(keyframe.video, [keyframe.timestamp])[0]
  picture = inspect._picture(dataset, 0, "train")[22:]
  changed = np.argwhere((picture != plain).any(axis=-1))
  x1, y1 = keyframe.boxes[:, :2].min(axis=0) * (319, 239)
  x2, y2 = keyframe.boxes[:, 2:].max(axis=0) * (319, 239)
  # Captions may stand above and reach to the right.
  assert abs(changed[:, 1].min() - x1) < 4 and abs(changed[:, 0].max() - y2) < 4
  assert changed[:, 0].min() <= y1 + 1 and changed[:, 1].max() >= x2 - 4
  first, second, again = (inspect.contact_sheet(sets, seed) for seed in (0, 1, 0))
  assert first.shape == second.shape and (first != second).any() and (first == again).all()


def test_records_tell_the_same_as_videos(tmp_path, capsys):
  shutil.copytree(SAMPLE / "annotations", tmp_path / "annotations")
  for split in ("train", "val"):
    records.build(SAMPLE, tmp_path / "records", split)
  notes = {"videos that cannot be read, left out": {"x": "x.mp4: the file is empty"}}
  counts = {"boxes empty or inverted, left out": {"a.csv": 1200, "b.csv": 34}}
  (tmp_path / "problems.json").write_text(json.dumps({"counts": counts, "notes": notes}))
  from_records, from_videos = numbers(capsys, str(tmp_path)), numbers(capsys, str(SAMPLE))
  assert from_records["problems"] == {
    "boxes empty or inverted, left out": "1,234 in 2 places",
    "videos that cannot be read, left out": "x.mp4: the file is empty",
  }
  for split in ("train", "val"):
    one, two = from_records["splits"][split], from_videos["splits"][split]
    assert one.pop("seconds") == pytest.approx(two.pop("seconds"), abs=1e-3)
    assert one == two
  inspect.main([str(tmp_path)])
  out = capsys.readouterr().out
  assert "hand shake" in out and "boxes empty or inverted, left out: 1,234 in 2 places" in out


def test_sets_of_several_divisions(tmp_path, capsys):
  (tmp_path / "videos").mkdir()
  numbered_video.write(tmp_path / "videos" / "a.mp4", 20)
  records.build_from({"a": records.Source(tmp_path / "videos" / "a.mp4")}, tmp_path / "records", "trainval")
  for number in (1, 2):
    folder = tmp_path / "annotations" / f"split{number}"
    folder.mkdir(parents=True)
    (folder / "label_map.pbtxt").write_text('item {name: "run" id: 1}')
    for split in ("train", "val"):
      (folder / f"{split}.csv").write_text("a,1,0,0,0.5,0.5,1,0\na,0\n" * number)
  assert list(numbers(capsys, str(tmp_path))["splits"]) == ["split1/train", "split1/val", "split2/train", "split2/val"]
  found = numbers(capsys, str(tmp_path), "--split", "split2/val")["splits"]
  assert list(found) == ["split2/val"] and found["split2/val"]["keyframes_with_nobody"] == 1
  assert found["split2/val"]["box_area"]["max"] == 0.25
  sheet = inspect.contact_sheet(inspect.open_set(tmp_path, "split2/val"))
  assert sheet.shape[1] < 2 * 400  # one picture: nobody is to be seen on the other


def test_mistakes_are_told(tmp_path, capsys):
  for arguments, message in (
    ([str(tmp_path)], f"error: {tmp_path}: no annotations/label_map.pbtxt; expected a set in the layout"),
    ([str(SAMPLE), "--split", "test"], f"error: {SAMPLE}: no split 'test'; there are: train, val"),
    ([str(SAMPLE), "--sheet", str(tmp_path / "none" / "a.png")], f"error: {tmp_path}/none/a.png: cannot be written"),
    ([str(SAMPLE), "--sheet", str(tmp_path / "sheet")], "error: "),
  ):
    with pytest.raises(SystemExit) as stop:
      inspect.main(arguments)
    assert str(stop.value.code).startswith(message) and "\n" not in str(stop.value.code)
