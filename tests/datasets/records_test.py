"""Videos become records once, and clips come back out of them at the right times."""

import json
import logging
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest

from tests import numbered_video
from vad_jax.datasets import records
from vad_jax.datasets.records import RecordFrames, build
from vad_jax.datasets.video import VideoError, VideoReader


@pytest.fixture
def source(tmp_path):
  """Two videos, one at 10 frames a second and one whose frame times vary, with a gap of two seconds."""
  folder = tmp_path / "set" / "videos" / "train"
  numbered_video.write(folder / "steady.mp4", 45)
  steps = np.random.default_rng(0).integers(10, 180, 40) / 1000
  steps[20] = 2.5
  numbered_video.encode(folder / "varying.mp4", np.cumsum(steps), codec="libx264", options={"g": "8"})
  return tmp_path / "set"


def test_clips_are_those_of_the_video(source, tmp_path):
  frames = RecordFrames(build(source, tmp_path / "out", "train"))
  for video in ("steady", "varying"):
    with VideoReader(source / "videos" / "train" / f"{video}.mp4") as reader:
      wanted = np.random.default_rng(1).uniform(-1, reader.duration + 1, 150)
      expected = reader.frames_at(wanted)
    found = frames.frames(video, wanted)
    assert numbered_video.numbers(found) == numbered_video.numbers(expected)
    assert np.abs(found.astype(int) - expected).mean() < 3


def test_one_record_a_second_in_order(source, tmp_path):
  folder = build(source, tmp_path / "out", "train")
  assert json.loads((folder / "index.json").read_text())["seconds"]["steady"] == [0, 1, 2, 3, 4]
  frames = RecordFrames(folder)
  record = frames._read(3)
  assert (record["video"], record["second"], record["height"], record["width"]) == (b"steady", 3, 48, 80)
  np.testing.assert_allclose(record["times"], np.arange(30, 40) / 10)
  images = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR) for jpeg in record["frames"]]
  assert numbered_video.numbers(images) == list(range(30, 40))


def test_a_time_is_covered_where_its_second_has_frames(source, tmp_path):
  frames = RecordFrames(build(source, tmp_path / "out", "train"))
  covered = [frames.covers("steady", time) for time in (-0.5, 0, 4.9, 5.0, 5.1)]
  assert covered == [False, True, True, True, False]
  seconds = frames._seconds["varying"]
  hole = next(second for second in range(seconds[-1]) if second not in seconds)
  assert not frames.covers("varying", hole + 0.5)
  assert not frames.covers("other", 0)
  with pytest.raises(VideoError, match="no records of a video 'other'"):
    frames.frames("other", [0.0])


def test_pieces_of_a_long_video_join_without_a_seam(source, tmp_path, monkeypatch):
  whole = build(source, tmp_path / "whole", "train", workers=1)
  monkeypatch.setattr(records, "_SECONDS_PER_FILE", (1, 1))
  parts = build(source, tmp_path / "parts", "train", workers=3)
  assert (whole / "index.json").read_text() == (parts / "index.json").read_text()
  one, two = RecordFrames(whole), RecordFrames(parts)
  for number in range(sum(map(len, one._seconds.values()))):
    assert one._read(number)["frames"] == two._read(number)["frames"]


def test_complete_records_are_left_alone_and_stale_ones_replaced(source, tmp_path, caplog):
  folder = build(source, tmp_path / "out", "train")
  written = (folder / "index.json").stat().st_mtime_ns
  build(source, tmp_path / "out", "train")
  assert (folder / "index.json").stat().st_mtime_ns == written
  numbered_video.write(source / "videos" / "train" / "more.mp4", 12)
  with caplog.at_level(logging.WARNING):
    build(source, tmp_path / "out", "train")
  assert "building the records again" in caplog.text
  assert numbered_video.numbers(RecordFrames(folder).frames("more", [1.0])) == [10]
  # Records outlive the videos that they were made from.
  (source / "videos").rename(source / "elsewhere")
  assert build(source, tmp_path / "out", "train") == folder


def test_frames_are_shrunk_but_never_enlarged(source, tmp_path):
  small = RecordFrames(build(source, tmp_path / "small", "train", short_side=24)).frames("steady", [1.2])
  assert small.shape == (1, 24, 40, 3)
  assert numbered_video.numbers(small) == [12]
  same = RecordFrames(build(source, tmp_path / "same", "train", short_side=500)).frames("steady", [1.2])
  assert same.shape == (1, 48, 80, 3)


def test_no_more_than_needed_is_decoded(source, tmp_path):
  frames = RecordFrames(build(source, tmp_path / "out", "train"))
  times = [1.2, 3.7, 1.2]
  whole = frames.frames("steady", times)
  for short_side, factor in ((48, 1), (25, 1), (24, 2), (13, 2), (12, 4), (3, 8)):
    part = frames.frames("steady", times, short_side)
    assert part.shape == (3, 48 // factor, 80 // factor, 3)
    small = [cv2.resize(frame, (80 // factor, 48 // factor), interpolation=cv2.INTER_AREA) for frame in whole]
    assert np.abs(part.astype(int) - small).mean() < 2


def test_unreadable_videos_are_listed_and_left_out(source, tmp_path, caplog):
  folder = source / "videos" / "train"
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.mp4").write_text("no video")
  whole = numbered_video.write(folder / "cut.mp4", 50)
  content = whole.read_bytes()
  whole.write_bytes(content[: -len(content) // 4])
  with caplog.at_level(logging.WARNING):
    made = build(source, tmp_path / "out", "train")
  problems = json.loads((made / "problems.json").read_text())
  assert sorted(problems["unreadable"]) == ["empty", "text"]
  assert "empty.mp4" in problems["unreadable"]["empty"] and "text.mp4" in caplog.text
  assert list(problems["broken_frames"]) == ["cut"]
  assert 1 <= problems["broken_frames"]["cut"] < 50
  assert set(RecordFrames(made)._seconds) == {"steady", "varying", "cut"}


def test_a_split_without_readable_videos_is_an_error(source, tmp_path):
  with pytest.raises(VideoError, match="val: no videos here"):
    build(source, tmp_path / "out", "val")
  (source / "videos" / "val").mkdir()
  (source / "videos" / "val" / "text.mp4").write_text("no video")
  with pytest.raises(VideoError, match=r"val/text\.mp4: .* \(as all 1 videos of the split 'val'\)"):
    build(source, tmp_path / "out", "val")
  with pytest.raises(VideoError, match="no records here; make them with"):
    RecordFrames(tmp_path / "out")


def content(folder):
  """All that a folder of records holds but times of writing."""
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"} | {
    "index": (folder / "index.json").read_text()
  }


def test_a_build_that_was_stopped_goes_on(source, tmp_path, monkeypatch):
  monkeypatch.setattr(records, "_SECONDS_PER_FILE", (1, 1))
  expected = content(build(source, tmp_path / "whole", "train"))
  encode, encoded = records._Encoder.jpeg, []

  def stop_after_30(self, picture, size):
    if len(encoded) == 30:
      raise KeyboardInterrupt
    encoded.append(picture)
    return encode(self, picture, size)

  with monkeypatch.context() as patch:
    patch.setattr(records._Encoder, "jpeg", stop_after_30)
    with pytest.raises(KeyboardInterrupt):
      build(source, tmp_path / "out", "train", workers=1)
  assert not (tmp_path / "out" / "train").exists()
  written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".train.part").glob("*array_record*")}
  with monkeypatch.context() as patch:
    patch.setattr(records, "_end", lambda source: pytest.fail("videos are checked again"))
    folder = build(source, tmp_path / "out", "train")
  assert content(folder) == expected
  kept = [
    name for name, time in written.items() if (folder / name).exists() and (folder / name).stat().st_mtime_ns == time
  ]
  assert len(kept) == 3  # the seconds 0 to 2 of the first video
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


def test_a_stopped_build_with_other_settings_starts_anew(source, tmp_path, monkeypatch):
  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(records, "_write_file", stop)
    with pytest.raises(KeyboardInterrupt):
      build(source, tmp_path / "out", "train")
  frames = RecordFrames(build(source, tmp_path / "out", "train", short_side=24)).frames("steady", [1.2])
  assert frames.shape == (1, 24, 40, 3)


def test_records_travel_to_other_processes(source, tmp_path):
  frames = RecordFrames(build(source, tmp_path / "out", "train"))
  expected = frames.frames("steady", [2.0])
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(frames)).frames("steady", [2.0]), expected)


@pytest.mark.parametrize("jpeg", [b"damaged", cv2.imencode(".jpg", numbered_video.picture(0, (24, 40)))[1].tobytes()])
def test_a_damaged_record_is_named(source, tmp_path, monkeypatch, jpeg):
  frames = RecordFrames(build(source, tmp_path / "out", "train"))
  read = frames._read
  monkeypatch.setattr(frames, "_read", lambda number: {**read(number), "frames": [jpeg] * 10})
  with pytest.raises(VideoError, match=r"the frame of steady, 2\.000 s is damaged"):
    frames.frames("steady", [2.0])


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blot(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
  path.write_bytes(content)


@pytest.mark.parametrize(
  ("pattern", "damage", "message"),
  [
    ("*array_record*", cut, r"out/train: record \d+ cannot be read \(.*\); delete the folder and build it again"),
    ("*array_record*", blot, r"out/train: record \d+ cannot be read \(.*hash mismatch"),
    ("*array_record*", lambda path: path.unlink(), r"out/train: record 0 cannot be read \(.*No such file"),
    ("dataset_info.json", lambda path: path.unlink(), r"out/train: record 0 cannot be read \(.*dataset_info\.json"),
    ("index.json", cut, r"out/train/index\.json: damaged; delete the folder and build it again"),
    ("index.json", lambda path: path.write_text("[]"), r"index\.json: damaged"),
  ],
)
def test_damaged_files_of_records_are_named(source, tmp_path, pattern, damage, message):
  folder = build(source, tmp_path / "out", "train")
  damage(next(folder.glob(pattern)))
  with pytest.raises(VideoError, match=message) as caught:
    frames = RecordFrames(folder)
    for video in frames._seconds:
      frames.frames(video, np.arange(0, 5, 0.3))
  assert "\n" not in str(caught.value)


def test_tensorflow_is_not_needed(source, tmp_path):
  script = (
    "import sys; from vad_jax.datasets.records import RecordFrames, build;"
    f"frames = RecordFrames(build({str(source)!r}, {str(tmp_path / 'out')!r}, 'train'));"
    "print(frames.frames('steady', [1.0]).shape, 'tensorflow' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
  assert done.stdout == "(1, 48, 80, 3) False\n"
  assert "Encoding train records" in done.stderr and "ETA" in done.stderr
  assert "Traceback" not in done.stderr
