"""The report holds the numbers and needs nothing but itself."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from vad_jax.annotations import Rows
from vad_jax.metrics import report
from vad_jax.metrics.frame_map import frame_map

_LABELS = {1: "stand", 2: "walk <fast>", 5: "sleep"}


def _scores():
  boxes = np.array([[0, 0, 0.4, 1], [0.5, 0, 0.9, 1], [0, 0, 0.4, 1]])
  truth = Rows(np.array(["a"] * 3, object), np.array([1.0, 1, 2]), boxes, np.array([1, 1, 2], np.int32), np.arange(3.0))
  return frame_map(truth, truth.select(np.array([0, 2]))._replace(extra=np.array([0.9, 0.8])), _LABELS)


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
    if tag not in ("meta", "link", "img", "br"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] != ["style"]:
      self.text += data + " "

  def find(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def _write(tmp_path, **kwargs):
  path = tmp_path / "report.html"
  arguments = {
    "title": "A run & more",
    "metrics": {"frame_map_50": 0.5678, "person_ap_50": 0.912, "wall_seconds": 588.2, "num_steps": 12000},
    "frame_map": _scores(),
    "label_map": _LABELS,
    "train_counts": {1: 1234},
    "config": {"model": {"name": "evad", "rate": 0.7}, "text": "<script>alert(1)</script>"},
  }
  report.write_report(path, **(arguments | kwargs))
  return _Page(path.read_text(encoding="utf-8"))


def test_holds_the_numbers(tmp_path):
  page = _write(tmp_path)
  for text in (
    "A run & more",
    "56.8 %",
    "91.2 %",
    "9 min 48 s",
    "num_steps 12,000",
    "2 keyframes",
    '"rate": 0.7',
  ):
    assert text in page.text, text
  # Sorted by AP: the class that was found comes first. Name, AP, annotated, detected, in training.
  assert re.search(r"walk <fast> 100\.0 % 1 1 0 stand 50\.0 % 2 1 1,234 ", page.text)
  assert "does not hold them: sleep." in page.text
  widths = [attributes["style"] for attributes in page.find("span")]
  assert widths == ["width: 100.00%", "width: 50.00%"]


def test_is_whole_in_itself(tmp_path):
  image = np.zeros((40, 60, 3), np.uint8)
  image[..., 0] = 250
  video = tmp_path / "video.mp4"
  video.write_bytes(b"not much of a video")
  page = _write(tmp_path, examples=[('clip "a" at 3 s', image)], video=video)
  assert not page.find("script")
  for _, attributes in page.tags:
    for name in ("src", "href"):
      assert attributes.get(name, "data:").startswith("data:")
  text = (tmp_path / "report.html").read_text()
  assert "http" not in re.sub(r"base64,[\w+/=]*", "", text)
  assert "@import" not in text
  assert "url(" not in text
  (picture,) = page.find("img")
  assert picture["alt"] == 'clip "a" at 3 s'
  assert (picture["width"], picture["height"]) == ("60", "40")
  data = np.frombuffer(base64.b64decode(str(picture["src"]).partition(",")[2]), np.uint8)
  decoded = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
  assert decoded is not None
  assert np.abs(decoded.astype(int) - image).max() < 12  # also says that red is red
  assert base64.b64decode(page.find("video")[0]["src"].partition(",")[2]) == video.read_bytes()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "video.mp4"]


def test_large_video_is_linked(tmp_path, monkeypatch):
  monkeypatch.setattr(report, "_INLINE_VIDEO_BYTES", 10)
  video = tmp_path / "videos" / "a clip#1.mp4"
  video.parent.mkdir()
  video.write_bytes(bytes(11))
  page = _write(tmp_path, video=video)
  assert page.find("video")[0]["src"] == "videos/a%20clip%231.mp4"


def test_least_report(tmp_path):
  page = _write(tmp_path, metrics={}, train_counts=None, config=None)
  assert not page.find("dl")
  assert not page.find("details")
  assert not page.find("img")
  assert "In training" not in page.text
  assert "stand 50.0 %" in page.text


def test_missing_video_leaves_no_page(tmp_path):
  with pytest.raises(FileNotFoundError):
    _write(tmp_path, video=tmp_path / "none.mp4")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (60, "1 min 0 s"), (7260, "2 h 1 min")])
def test_wall_time(tmp_path, seconds, text):
  assert f"wall time {text}" in _write(tmp_path, metrics={"wall_seconds": seconds}).text
