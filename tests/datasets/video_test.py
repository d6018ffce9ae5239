"""Which frame comes when, from what kinds of files, and what is said about broken ones."""

import logging
import random
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import numbered_video
from vad_jax.datasets import video
from vad_jax.datasets.video import VideoError, VideoFrames, VideoReader, VideoWriter, nearest

CONSTANT = np.arange(60) / 25
VARIABLE = np.cumsum(np.random.default_rng(0).integers(5, 200, 60)) / 1000
FILES = {
  "h264_b_frames": ("a.mp4", CONSTANT, {"codec": "libx264", "options": {"g": "20", "bf": "3"}}),
  "h264_open_gop": (
    "a.mkv",
    CONSTANT,
    {"codec": "libx264", "options": {"g": "20", "x264-params": "open-gop=1"}},
  ),
  "variable_rate": ("a.mp4", VARIABLE, {"codec": "libx264", "options": {"g": "15", "bf": "2"}}),
  "late_start": ("a.mp4", 3 + CONSTANT, {"codec": "libx264", "options": {"g": "20"}}),
  "transport_stream": ("a.ts", CONSTANT, {"codec": "libx264", "options": {"g": "20", "bf": "2"}}),
  "hevc": ("a.mp4", CONSTANT, {"codec": "libx265", "options": {"x265-params": "keyint=20:log-level=none"}}),
  "vp9": ("a.webm", CONSTANT, {"codec": "libvpx-vp9", "options": {"g": "20", "cpu-used": "8"}}),
  "mpeg4": ("a.avi", CONSTANT, {"codec": "mpeg4", "options": {"g": "12"}}),
  "mpeg2_b_frames": ("a.mpg", CONSTANT, {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}}),
  "mpeg2_open_gop": ("a.ts", CONSTANT, {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}}),
  "mpeg4_b_frames": ("a.mkv", CONSTANT, {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}),
  "no_container": ("a.h264", CONSTANT, {"codec": "libx264", "options": {"g": "12", "bf": "0"}}),
  "av1": ("a.mp4", CONSTANT, {"codec": "libsvtav1", "options": {"g": "20", "preset": "12"}, "size": (64, 80)}),
  "vp9_late_start": ("a.webm", 7 + CONSTANT, {"codec": "libvpx-vp9", "options": {"g": "20", "cpu-used": "8"}}),
  "hevc_variable_rate": (
    "a.mkv",
    VARIABLE,
    {"codec": "libx265", "options": {"x265-params": "keyint=20:bframes=3:log-level=none"}},
  ),
  "audio_first": ("a.mp4", CONSTANT, {"codec": "libx264", "audio": "aac"}),
}


@pytest.fixture
def example(tmp_path):
  """60 frames at 10 a second."""
  return numbered_video.write(tmp_path / "example.mp4", 60)


@pytest.mark.parametrize("kind", FILES)
def test_frames_come_by_presentation_time(tmp_path, kind):
  name, times, options = FILES[kind]
  path = numbered_video.encode(tmp_path / name, times, **options)
  expected = times - times[0]
  with VideoReader(path) as reader:
    found, frames = zip(*reader, strict=True)
    assert numbered_video.numbers(frames) == list(range(len(times)))
    np.testing.assert_allclose(found, expected, atol=0.001)
    assert reader.broken == 0
    if name not in ("a.mpg", "a.h264"):  # they do not tell
      assert reader.duration == pytest.approx(expected[-1] + 0.04, abs=0.2)
    if kind != "hevc_variable_rate":  # a variable rate of which Matroska tells a guess
      assert reader.fps == pytest.approx(1 / np.diff(expected).mean(), rel=0.1)

    wanted = np.random.default_rng(1).uniform(-1, expected[-1] + 1, 40)
    wanted = np.concatenate([wanted, wanted[:3]])
    right = np.stack([frames[nearest(np.array(found), time)] for time in wanted])
    np.testing.assert_array_equal(reader.frames_at(wanted), right)
    for time, frame in zip(wanted[:15], right, strict=False):  # each with its own seek
      np.testing.assert_array_equal(reader.frames_at([time])[0], frame)


def test_frames_between_those_of_a_clip_are_skipped_and_change_nothing(tmp_path):
  gaps = np.full(200, 0.04)
  gaps[[60, 63, 66, 130, 131, 132, 133]] = 1.5  # after which a frame that nothing needs may be the nearest one
  options = {"g": "100", "bf": "3", "b_strategy": "0"}
  path = numbered_video.encode(tmp_path / "a.mp4", np.cumsum(gaps), codec="libx264", options=options)
  with VideoReader(path) as reader:
    found, frames = zip(*reader, strict=True)
    for start in np.arange(0, found[-1], 0.31):
      wanted = start + np.arange(8) * 0.16
      right = np.stack([frames[nearest(np.array(found), time)] for time in wanted])
      np.testing.assert_array_equal(reader.frames_at(wanted), right)
    assert numbered_video.numbers(reader.frames_at(np.array(found)[20:40:4])) == [*range(20, 40, 4)]
    assert len(reader._skipped) > 5
    assert reader.broken == 0


@pytest.mark.parametrize("rate", ["24000/1001", "25", "30000/1001", "30", "50", "60"])
@pytest.mark.parametrize(
  ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("avi", "mpeg4")]
)
def test_frames_of_every_usual_rate_are_found(tmp_path, rate, suffix, codec):
  rate = Fraction(rate)
  path = numbered_video.at_rate(tmp_path / f"a.{suffix}", rate, 40, codec)
  with VideoReader(path) as reader:
    found, frames = zip(*reader, strict=True)
    assert numbered_video.numbers(frames) == list(range(40))
    np.testing.assert_allclose(found, np.arange(40) / float(rate), atol=0.00051)  # Matroska has milliseconds
    assert reader.fps == pytest.approx(float(rate), rel=1e-3) and reader.broken == 0
    for index in (31, 0, 17, 39, 5):
      assert numbered_video.numbers(reader.frames_at([index / float(rate)])) == [index]


@pytest.mark.parametrize(
  ("name", "codec", "pixels"),
  [("a.mp4", "libx264", "yuv444p"), ("a.webm", "libvpx-vp9", "yuv420p"), ("a.avi", "mpeg4", "yuv420p")],
)
@pytest.mark.parametrize("size", [(49, 81), (47, 80)])
def test_odd_sizes(tmp_path, name, codec, pixels, size):
  path = numbered_video.encode(tmp_path / name, CONSTANT[:9], codec=codec, size=size, pixels=pixels)
  with VideoReader(path) as reader:
    assert reader.size == size
    frames = [frame for _, frame in reader]
    assert numbered_video.numbers(frames) == list(range(9)) and frames[0].shape == (*size, 3)


def test_pixels_that_are_not_square_are_left_as_they_are(tmp_path):
  path = numbered_video.encode(tmp_path / "a.mp4", CONSTANT[:9], codec="libx264", pixel_aspect=Fraction(4, 3))
  with av.open(str(path)) as container:
    assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
  with VideoReader(path) as reader:
    assert reader.size == (48, 80)
    assert numbered_video.numbers(reader.frames_at([0.2])) == [5]


def test_a_part_of_a_video_is_what_the_whole_has_there(example):
  with VideoReader(example) as reader:
    part = list(reader.read(2.05, 3.1))
  assert [numbered_video.number(frame) for _, frame in part] == list(range(21, 31))
  assert part[0][0] == pytest.approx(2.1)


def test_nearest_frame_at_the_ends_and_in_the_middle():
  times = np.array([0.0, 1.0, 3.0])
  assert [nearest(times, t) for t in (-5, 0, 0.5, 0.51, 1.9, 2.0, 2.1, 9)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_rotation_that_a_file_asks_for_is_applied(tmp_path):
  upright = numbered_video.picture(5)
  for turns in (1, 2, 3):
    path = numbered_video.encode(tmp_path / f"{turns}.mp4", CONSTANT[:6], codec="libx264", rotation=90 * turns)
    with VideoReader(path) as reader:
      expected = np.rot90(upright, turns)
      assert reader.size == expected.shape[:2]
      for frame in (list(reader)[5][1], reader.frames_at([0.2])[0]):
        assert np.abs(frame.astype(int) - expected).mean() < 12


def test_reading_needs_memory_for_a_few_frames_only(tmp_path):
  path = numbered_video.write(tmp_path / "long.mp4", 200, size=(120, 160))
  with VideoReader(path) as reader:
    tracemalloc.start()
    assert sum(1 for _ in reader) == 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
  assert peak < 20 * 120 * 160 * 3


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "no such file"),
    (b"", r"not a readable video \(the file is empty\)"),
    (b"this is not a video\n" * 50, "not a readable video .*replace or re-encode it"),
  ],
)
def test_unreadable_files_are_named(tmp_path, content, message):
  path = tmp_path / "bad.mp4"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(VideoError, match=f"bad.mp4: {message}"):
    VideoReader(path)


def test_a_file_without_video_is_named(tmp_path):
  path = tmp_path / "sound.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=48_000, layout="mono")
    chunk = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    chunk.sample_rate = 48_000
    container.mux(stream.encode(chunk))
    container.mux(stream.encode(None))
  with pytest.raises(VideoError, match=r"sound\.mp4: holds no video stream"):
    VideoReader(path)


def test_a_truncated_file_gives_what_it_has(example, caplog):
  whole = example.read_bytes()
  pictures = whole.index(b"mdat")
  example.write_bytes(whole[: pictures + (len(whole) - pictures) * 7 // 10])
  with caplog.at_level(logging.WARNING), VideoReader(example) as reader:
    frames = [frame for _, frame in reader]
    assert 10 < len(frames) < 60
    assert numbered_video.numbers(frames) == list(range(len(frames)))
    assert len(frames) + reader.broken == pytest.approx(60, abs=2)
    beyond = reader.frames_at([5.9])[0]
    np.testing.assert_array_equal(beyond, frames[-1])
  assert "example.mp4" in caplog.text
  assert "damaged or missing frames" in caplog.text
  assert len(caplog.records) == 1


def test_a_file_cut_before_its_first_frame_is_named(example):
  whole = example.read_bytes()
  example.write_bytes(whole[: whole.index(b"mdat") + 20])
  with pytest.raises(VideoError, match=r"example\.mp4: .*damaged"):
    VideoReader(example)


def test_damage_in_the_middle_costs_only_the_frames_there(tmp_path):
  path = numbered_video.encode(tmp_path / "hit.mp4", CONSTANT, codec="libx264", options={"g": "10", "bf": "0"})
  content = bytearray(path.read_bytes())
  pictures = content.index(b"mdat") + 4
  middle = pictures + int.from_bytes(content[pictures - 8 : pictures - 4]) // 2
  content[middle : middle + 100] = bytes(100)
  path.write_bytes(content)
  with VideoReader(path) as reader:
    found = [(time, numbered_video.number(frame)) for time, frame in reader]
  assert reader.broken > 0
  assert 40 <= len(found) <= 60
  right = [time == pytest.approx(index / 25) for time, index in found]
  assert all(right[:10]) and all(right[-10:])  # nothing moves in time


@pytest.mark.parametrize(
  ("name", "codec", "options"),
  [
    ("a.mp4", "libx264", {"g": "20", "bf": "2"}),
    ("a.mkv", "libx264", {"g": "20", "bf": "0"}),
    ("a.webm", "libvpx-vp9", {"g": "20", "cpu-used": "8"}),
    ("a.mp4", "libx265", {"x265-params": "keyint=20:log-level=none"}),
    ("a.avi", "mpeg4", {"g": "12"}),
  ],
)
def test_missing_frames_are_counted_and_move_no_other(tmp_path, name, codec, options):
  whole = numbered_video.encode(tmp_path / f"whole_{name}", CONSTANT, codec=codec, options=options)
  path = numbered_video.remux(whole, tmp_path / name, lambda index, packet: None if 25 <= index < 30 else packet)
  with VideoReader(path) as reader:
    found = {round(time * 25): numbered_video.number(frame) for time, frame in reader}
    assert reader.broken == 60 - len(found) >= 5
    # What follows the next keyframe is as before, in time and content.
    assert all(found[index] == index for index in (*range(25), *range(40, 60)) if index in found)
    assert set(range(41, 60)) | set(range(24)) <= found.keys()
    assert numbered_video.numbers(reader.frames_at([0.4, 2.0])) == [10, 50]


def test_a_damaged_packet_is_counted(tmp_path):
  whole = numbered_video.encode(tmp_path / "whole.mp4", CONSTANT, codec="libx264", options={"g": "20", "bf": "0"})

  def damage(index, packet):
    if index != 25:
      return packet
    content = bytes(packet)
    wrong = av.Packet(content[: len(content) // 3] + bytes(len(content) - len(content) // 3))
    wrong.pts, wrong.dts, wrong.time_base, wrong.duration = packet.pts, packet.dts, packet.time_base, packet.duration
    return wrong

  with VideoReader(numbered_video.remux(whole, tmp_path / "a.mp4", damage)) as reader:
    found = {round(time * 25): numbered_video.number(frame) for time, frame in reader}
    assert reader.broken > 0
  assert all(found[index] == index for index in (*range(25), *range(40, 60)))


def test_a_truncated_matroska_file_tells_how_much_is_lost(tmp_path):
  path = numbered_video.encode(tmp_path / "a.mkv", CONSTANT, codec="libx264", options={"g": "20"}, audio="aac")
  content = path.read_bytes()
  path.write_bytes(content[: len(content) * 6 // 10])
  with VideoReader(path) as reader:
    assert 20 < sum(1 for _ in reader) == 60 - reader.broken < 60


def test_a_variable_rate_is_no_damage(tmp_path):
  times = np.cumsum([0.04] * 5 + [0.08, 0.04, 0.12] * 6 + [0.04] * 6)
  path = numbered_video.encode(tmp_path / "a.mp4", times, codec="libx264", options={"g": "20"})
  with VideoReader(path) as reader:
    assert sum(1 for _ in reader) == len(times) and reader.broken == 0


def test_a_title_in_an_old_encoding_is_no_matter(tmp_path):
  path = numbered_video.encode(tmp_path / "a.avi", CONSTANT[:9], codec="mpeg4", title="caf-")
  path.write_bytes(path.read_bytes().replace(b"caf-", b"caf\xe9"))
  with VideoReader(path) as reader:
    assert sum(1 for _ in reader) == 9


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
  folder = tmp_path_factory.mktemp("originals")
  kinds = {"a.mp4": "libx264", "b.mkv": "libx264", "c.avi": "mpeg4", "d.webm": "libvpx-vp9", "e.ts": "libx264"}
  return [numbered_video.encode(folder / name, CONSTANT[:20], codec=codec) for name, codec in kinds.items()]


@settings(
  max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kind=st.integers(0, 4), seed=st.integers(0, 10**6), changes=st.integers(0, 30), kept=st.floats(0, 1))
def test_no_damage_does_worse_than_an_error_that_names_the_file(tmp_path, originals, kind, seed, changes, kept):
  content = bytearray(originals[kind].read_bytes())
  rng = random.Random(seed)
  for _ in range(changes):
    content[rng.randrange(len(content))] = rng.randrange(256)
  path = tmp_path / originals[kind].name
  path.write_bytes(content[: round(len(content) * kept)] if kept < 0.8 else content)
  try:
    with VideoReader(path) as reader:
      times = [time for time, frame in reader if frame.shape == (*reader.size, 3)]
      assert times == sorted(times) and reader.broken >= 0
      assert len(reader.frames_at([0.0, 0.3, 9.0])) == 3
  except VideoError as error:
    assert path.name in str(error) and "\n" not in str(error)


def test_written_files_play_everywhere(tmp_path):
  path = numbered_video.write(tmp_path / "new" / "a.mp4", 10, fps=30_000 / 1001, size=(49, 81))
  content = path.read_bytes()
  assert content.index(b"moov") < content.index(b"mdat")
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert stream.average_rate == pytest.approx(30_000 / 1001)
    assert stream.frames == 10
  with VideoReader(path) as reader:
    assert reader.size == (50, 82)  # H.264 has even sizes only
    assert reader.duration == pytest.approx(10 * 1001 / 30_000, abs=0.002)
  assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_writing_keeps_colours_and_is_repeatable(tmp_path):
  colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 180, 40]], np.uint8)
  frame = np.repeat(np.repeat(colours[None], 64, 0), 32, 1)
  for name in ("a.mp4", "b.mp4"):
    with VideoWriter(tmp_path / name, size=(64, 128), fps=25) as writer:
      for _ in range(3):
        writer.write(frame)
  with VideoReader(tmp_path / "a.mp4") as reader:
    got = reader.frames_at([0.04])[0]
  assert np.abs(got[32, 16::32].astype(int) - colours).max() <= 6
  assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_frames_are_shown_at_the_times_given(tmp_path):
  times = [0.0, 0.1, 0.5, 0.55]
  with VideoWriter(tmp_path / "a.mp4", size=(48, 80), fps=25) as writer:
    for index, time in enumerate(times):
      writer.write(numbered_video.picture(index), time)
    with pytest.raises(ValueError, match="times must grow"):
      writer.write(numbered_video.picture(9), 0.55)
  with VideoReader(tmp_path / "a.mp4") as reader:
    assert [time for time, _ in reader] == pytest.approx(times, abs=1e-4)


def test_nothing_is_left_of_a_file_that_failed(tmp_path):
  message = r"a\.mp4: a frame is uint8 \(48, 81, 3\); expected uint8 \(48, 80, 3\)"
  writer = VideoWriter(tmp_path / "a.mp4", size=(48, 80), fps=25)
  with pytest.raises(ValueError, match=message), writer:
    writer.write(numbered_video.picture(0))
    writer.write(np.zeros((48, 81, 3), np.uint8))
  with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", size=(48, 80), fps=25):
    raise KeyboardInterrupt
  with (
    pytest.raises(VideoError, match="no frame was written"),
    VideoWriter(tmp_path / "a.mp4", size=(8, 8), fps=9),
  ):
    pass
  with pytest.raises(VideoError, match=r"lost\.mp4: its sound cannot be read \(No such file"):
    VideoWriter(tmp_path / "a.mp4", size=(48, 80), fps=25, audio_from=tmp_path / "lost.mp4")
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(VideoError, match=r"file/a\.mp4: cannot be written"):
    VideoWriter(tmp_path / "file" / "a.mp4", size=(48, 80), fps=25)


@pytest.mark.parametrize(("name", "codec", "copied"), [("in.mp4", "aac", True), ("in.mkv", "pcm_s16le", False)])
def test_sound_is_taken_over(tmp_path, name, codec, copied):
  source = numbered_video.encode(tmp_path / name, 1 + CONSTANT, codec="libx264", audio=codec)
  with VideoWriter(tmp_path / "out.mp4", size=(48, 80), fps=25, audio_from=source) as writer:
    for index in range(60):
      writer.write(numbered_video.picture(index))
  with av.open(str(tmp_path / "out.mp4")) as container:
    stream = container.streams.audio[0]
    assert stream.codec_context.name == "aac"
    packets = [(bytes(p), float(p.pts * p.time_base)) for p in container.demux(stream) if p.size]
  # The picture starts a second after the sound: that second goes, and the sound ends with the picture.
  assert packets[0][1] == pytest.approx(0, abs=0.05)
  assert packets[-1][1] == pytest.approx(60 / 25, abs=0.06)
  with av.open(str(source)) as container:
    original = [(bytes(p), float(p.pts * p.time_base) - 1) for p in container.demux(audio=0) if p.size]
  if copied:
    at = [time for content, time in original if content == packets[5][0]]
    assert at == [pytest.approx(packets[5][1], abs=0.001)]
  # No packet waits for the other kind: a player need not jump around in the file.
  with av.open(str(tmp_path / "out.mp4")) as container:
    times = [float(p.pts * p.time_base) for p in container.demux() if p.size]
  assert np.all(np.abs(np.diff(times)) < 1)


def test_sound_of_a_silent_video_is_nothing(tmp_path, example):
  with VideoWriter(tmp_path / "out.mp4", size=(48, 80), fps=25, audio_from=example) as writer:
    writer.write(numbered_video.picture(0))
  with av.open(str(tmp_path / "out.mp4")) as container:
    assert not container.streams.audio


def test_folder_of_videos(tmp_path, caplog):
  numbered_video.write(tmp_path / "one.mp4", 30)
  (tmp_path / "broken.mp4").write_text("no video")
  (tmp_path / "notes.txt").write_text("no video either")
  with caplog.at_level(logging.WARNING):
    frames = VideoFrames(tmp_path)
  assert "broken.mp4: not a readable video" in caplog.text
  assert frames.covers("one", 0) and frames.covers("one", 3)
  assert not frames.covers("one", 3.2) and not frames.covers("one", -0.1) and not frames.covers("broken", 0)
  assert numbered_video.numbers(frames.frames("one", [2.0, -9.0, 99.0])) == [20, 0, 29]
  with pytest.raises(VideoError, match="no video 'two'"):
    frames.frames("two", [0.0])


def test_folders_without_videos_are_named(tmp_path):
  with pytest.raises(VideoError, match="nowhere: no such folder"):
    VideoFrames(tmp_path / "nowhere")
  (tmp_path / "a.mp4").write_text("")
  with pytest.raises(VideoError, match="none of 1 video files can be read"):
    VideoFrames(tmp_path)
  (tmp_path / "a.mkv").write_text("")
  with pytest.raises(VideoError, match=r"the video 'a' is also there as a\.mkv"):
    video.video_files(tmp_path)
