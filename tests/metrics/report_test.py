"""The report holds the numbers and needs nothing but itself."""

import base64
import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from vad_jax.annotations import Rows
from vad_jax.metrics import report
from vad_jax.metrics.analysis import analyse
from vad_jax.metrics.tube_report import write_tube_report
from vad_jax.metrics.video_map import video_map
from vad_jax.tubes import Tube, TubeDetections, TubeGroundTruth, Video

_LABELS = {1: "stand", 2: "walk <fast>", 5: "sleep"}


def _rows(*rows):
  timestamp, boxes, action, extra = zip(*rows, strict=True) if rows else ((), (), (), ())
  return Rows(
    np.array(["a&b"] * len(rows), object),
    np.array(timestamp, float),
    np.array(boxes, float).reshape(-1, 4),
    np.array(action, np.int32),
    np.array(extra, float),
  )


_LEFT, _RIGHT = [0, 0, 0.4, 1], [0.5, 0, 0.9, 1]
_TRUTH = _rows((1, _LEFT, 1, 0), (1, _RIGHT, 1, 1), (2, _LEFT, 2, 2), (3, _LEFT, 2, 2))
_FOUND = _rows((1, _LEFT, 1, 0.9), (2, _LEFT, 2, 0.8), (3, _LEFT, 2, 0.7), (1, _RIGHT, 2, 0.75))


class _Page(HTMLParser):
  """Collects tags with their attributes, checks that they nest, and the text outside of style."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.text = [], [], ""
    self.feed(text)
    self.text = " ".join(self.text.split())
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ("meta", "link", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] != ["style"]:
      self.text += data + " "

  def find(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def _write(tmp_path, truth=_TRUTH, found=_FOUND, label_map=_LABELS, **kwargs):
  path = tmp_path / "report.html"
  arguments = {
    "title": "A run & more",
    "label_map": label_map,
    "metrics": {"frame_map_50": 0.5678, "person_ap_50": 0.912, "wall_seconds": 588.2, "num_steps": 12000},
    "train_counts": {1: 34, 2: 1234},
    "config": {"model": {"name": "evad", "rate": 0.7}, "text": "<script>alert(1)</script>"},
  }
  report.write_report(path, analyse(truth, found, label_map), **(arguments | kwargs))
  return _Page(path.read_text(encoding="utf-8"))


def test_holds_the_numbers(tmp_path):
  page = _write(tmp_path, facts={"label map": "mine"}, warnings=["3 rows are <odd>"])
  for text in (
    "A run & more",
    "frame-mAP@0.5 66.7 %",
    "person AP@0.5 91.2 %",
    "wall time 9 min 48 s",
    "num_steps 12,000",
    "by the protocol activitynet at IoU 0.5: 2 classes, 3 keyframes, 4 annotated people",
    "label map mine",
    "3 rows are <odd>",
    "scored detections 4",
    "confusion on a person who does something else 1 1",
    "a&b at 1 s",
    '"rate": 0.7',
  ):
    assert text in page.text, text
  assert "does not hold them: sleep." in page.text


def test_classes_are_sorted_by_training_boxes(tmp_path):
  kinds = r"correct (\d+), localisation 0, confusion (\d+), duplicate 0, background 0"
  rows = re.findall(rf"([A-Za-z<> ]+) ([\d.]+) % {kinds} (\d+) ([\d,]+)", _write(tmp_path).text)
  # Name, AP, correct and confused ones among the best detections, annotated, in training.
  assert [(name.split("bar ")[-1].strip(), *numbers) for name, *numbers in rows] == [
    ("All classes", "66.7", "2", "1", "4", "1,268"),
    ("walk <fast>", "83.3", "1", "1", "2", "1,234"),
    ("stand", "50.0", "1", "0", "2", "34"),
  ]


def test_numbers_as_json(tmp_path):
  before = analyse(_TRUTH, _FOUND.select(slice(1, None)), _LABELS).frame_map
  page = _write(tmp_path, before=("old", before))
  numbers = json.loads((tmp_path / "report.json").read_text())
  assert numbers["analysis"]["frame_map"]["mean_ap"] == pytest.approx(2 / 3)
  assert numbers["analysis"]["frame_map"]["ap"] == {"1": 0.5, "2": pytest.approx(5 / 6), "5": None}
  assert numbers["analysis"]["errors"]["best_counts"]["confusion"]["2"] == 1
  assert len(numbers["analysis"]["precision"]["1"]) == 101
  assert numbers["label_map"]["2"] == "walk <fast>"
  (change, same) = numbers["compared_with"]["changes"]
  assert change == {"action": 1, "before": 0.0, "after": 0.5, "gain": 0.5}
  assert same["gain"] == 0
  assert "Compared with old" in page.text
  assert "stand 0.0 % 50.0 % +50.0" in page.text


def test_is_whole_in_itself(tmp_path):
  image = np.zeros((40, 60, 3), np.uint8)
  image[..., 0] = 250
  video = tmp_path / "video.mp4"
  video.write_bytes(b"not much of a video")
  asked = []
  page = _write(tmp_path, frames=lambda *keyframe: asked.append(keyframe) or image, video=video)
  assert set(asked) == {("a&b", 1.0), ("a&b", 2.0), ("a&b", 3.0)}
  assert not page.find("script")
  for _, attributes in page.tags:
    for name in ("src", "href"):
      assert attributes.get(name, "data:").startswith("data:") or attributes[name] == "report.json"
  text = (tmp_path / "report.html").read_text()
  assert "http" not in re.sub(r"base64,[\w+/=]*", "", text)
  assert "@import" not in text
  assert "url(" not in text
  picture = page.find("image")[0]
  assert int(picture["width"]) * 40 == pytest.approx(int(picture["height"]) * 60, abs=60)
  data = np.frombuffer(base64.b64decode(str(picture["href"]).partition(",")[2]), np.uint8)
  decoded = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
  assert decoded is not None
  assert np.abs(decoded.astype(int) - [250, 0, 0]).max() < 12  # also says that red is red
  assert base64.b64decode(page.find("video")[0]["src"].partition(",")[2]) == video.read_bytes()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "video.mp4"]


def test_boxes_stand_where_they_are(tmp_path):
  page = _write(tmp_path, frames=lambda *_: np.zeros((100, 200, 3), np.uint8))
  boxes = {
    (r["class"], r["x"], r["width"], r["height"]) for r in page.find("rect") if r["class"] in ("person", "right")
  }
  assert boxes == {
    *(("person", "0.0", "224.0", "280.0"), ("person", "280.0", "224.0", "280.0")),
    ("right", "0.0", "224.0", "280.0"),
  }
  wrong = [r for r in page.find("rect") if r["class"] == "wrong-box"]
  assert {(r["x"], r["y"]) for r in wrong} == {("280.0", "0.0")}
  assert "A stand missed B stand 0.90 1 walk <fast> 0.75, confusion" in page.text


def test_maps_are_part_of_the_page(tmp_path):
  picture = tmp_path / "map.png"
  picture.write_bytes(b"picture")
  shown = [image["src"] for image in _write(tmp_path, maps=[picture, picture]).find("img") if "map" in image["class"]]
  assert shown == [f"data:image/png;base64,{base64.b64encode(b'picture').decode()}"] * 2


def test_large_video_is_linked(tmp_path, monkeypatch):
  monkeypatch.setattr("vad_jax.metrics.page._INLINE_VIDEO_BYTES", 10)
  video = tmp_path / "videos" / "a clip#1.mp4"
  video.parent.mkdir()
  video.write_bytes(bytes(11))
  page = _write(tmp_path, video=video)
  assert page.find("video")[0]["src"] == "videos/a%20clip%231.mp4"


def test_least_report(tmp_path):
  page = _write(tmp_path, metrics={}, train_counts=None, config=None)
  assert not page.find("details")
  assert not page.find("image")
  assert "In training" not in page.text
  assert "stand 50.0 %" in page.text
  assert len(page.find("dt")) == 2


@pytest.mark.parametrize("num_classes", [1, 24, 80])
@pytest.mark.parametrize("num_found", [0, 300])
def test_any_number_of_classes(tmp_path, num_classes, num_found):
  rng = np.random.default_rng(0)
  label_map = {index: f"class {index}" for index in range(1, num_classes + 1)}

  def draw(count):
    corner = rng.uniform(0, 0.5, (count, 2))
    boxes = np.hstack([corner, corner + rng.uniform(0.1, 0.5, (count, 2))])
    times, action = rng.integers(0, 50, count), rng.integers(1, num_classes // 2 + 2, count)
    return _rows(*zip(times, boxes, action, rng.random(count), strict=True))

  page = _write(tmp_path, draw(300), draw(num_found), label_map)
  scored = min(num_classes, num_classes // 2 + 1)
  curves = [s for s in page.find("svg") if s.get("aria-label", "").startswith("Precision over recall")]
  assert len(curves) == scored
  assert "nan" not in re.sub(r"base64,[\w+/=]*", "", (tmp_path / "report.html").read_text()).lower()
  assert ("Which class is taken for which" in page.text) == (num_found > 0 and num_classes > 1)
  shares = [float(s["style"].removeprefix("width: ").removesuffix("%")) for s in page.find("span") if "style" in s]
  assert all(0 <= share <= 100 for share in shares)


def test_missing_video_leaves_no_page(tmp_path):
  with pytest.raises(FileNotFoundError):
    _write(tmp_path, video=tmp_path / "none.mp4")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (60, "1 min 0 s"), (7260, "2 h 1 min")])
def test_wall_time(tmp_path, seconds, text):
  assert f"wall time {text}" in _write(tmp_path, metrics={"wall_seconds": seconds}).text


def test_scalars():
  found = report.scalars(analyse(_TRUTH, _FOUND, _LABELS))
  assert found["mean_ap/iou_0.50"] == found["oracle/detections"] == pytest.approx(2 / 3)
  assert found["gain/missed"] == pytest.approx(0.25)
  assert found["mean_ap_by_actors/1"] == 1.0
  assert all(isinstance(value, float) and np.isfinite(value) for value in found.values())


def test_tubes(tmp_path):
  """Both kinds of mAP over IoUs and by class; a class that the protocol leaves out is not made up."""
  boxes = np.column_stack([np.arange(1, 21), np.tile([10.0, 10, 50, 90], (20, 1))])
  truth = TubeGroundTruth(
    ["stand", "walk <fast>", "sleep"],
    {name: Video(20, (100, 100), [Tube(label, boxes)], 25.0) for label, name in enumerate("ab")},
    [([], ["a", "b"])],
  )
  scores = np.repeat([[0.9, 0.1, 0.1], [0.8, 0.2, 0.1]], 20, axis=0).astype(np.float32)
  frame = np.tile(np.arange(1, 21, dtype=np.int32), 2)
  found = TubeDetections(
    *(["a", "b"], np.repeat([0, 1], 20), frame), np.tile(boxes[:, 1:], (2, 1))[:, None], np.ones(40), scores
  )
  result = video_map(truth, found, protocol="class_query", dataset="jhmdb")
  kwargs = {"metrics": {"wall_seconds": 75.0, "step": 12}, "train_counts": {1: 3, 2: 1234, 3: 5}}
  write_tube_report(tmp_path / "tubes.html", result, title="A run & more", facts={"data set": "mine"}, **kwargs)
  page = _Page((tmp_path / "tubes.html").read_text(encoding="utf-8"))
  for text in ("A run & more", "class_query, rules of jhmdb", "1 min 15 s", "walk <fast> 100.0 % 100.0 % 20 1 2 1,234"):
    assert text in page.text.replace("\N{NO-BREAK SPACE}", " ")
  assert re.search(r"sleep –\s+0\.0 %\s+0 0 \d 5", page.text.replace("\N{NO-BREAK SPACE}", " "))
  assert page.text.index("walk <fast>") < page.text.index("stand")  # by training tubes
  numbers = json.loads((tmp_path / "tubes.json").read_text())
  assert numbers["result"]["summary"] == result.summary
  assert numbers["result"]["frame_ap"]["0.5"][2] is None
