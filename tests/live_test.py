"""Live sources: streams of this machine, a camera that is not there, and a model that is too slow for them."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import threading
import time

import av
import numpy as np
import pytest

from tests.clip_readers import LABEL_MAP, LOADED, ClipReaderOfPeople, TubeReader
from vad_jax import checkpoint, live, predict
from vad_jax.datasets.video import VideoError, VideoReader
from vad_jax.detect import Detector
from vad_jax.predictions import Selection

FPS = 30
SELECTION = Selection(LABEL_MAP, 0.5, 0.3, 3, 0.7)


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
  """MPEG-TS of four seconds that brighten by 1 / 128 a frame."""
  path = tmp_path_factory.mktemp("videos") / "ramp.ts"
  with av.open(str(path), "w", format="mpegts") as target:
    stream = target.add_stream("libx264", rate=FPS, options={"g": "10", "bf": "0"})
    stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
    for index in range(120):
      frame = av.VideoFrame.from_ndarray(np.full((64, 80, 3), 2 * index, np.uint8), "rgb24")
      target.mux(stream.encode(frame))
    target.mux(stream.encode(None))
  return path.read_bytes()


@contextlib.contextmanager
def served(data, seconds, *, linger=0.0, scheme="tcp"):
  """A URL that sends this evenly over so many seconds, and keeps silent for a while before it hangs up."""

  def serve():
    with contextlib.suppress(OSError), listener.accept()[0] as client:
      if scheme == "rtsp":
        agree(client)
      begun = time.monotonic()
      for sent in range(0, len(data), 188):
        time.sleep(max(begun + seconds * sent / len(data) - time.monotonic(), 0))
        packet = data[sent : sent + 188]
        client.sendall(interleaved(packet, sent // 188, begun) if scheme == "rtsp" else packet)
      time.sleep(linger)

  with socket.create_server(("127.0.0.1", 0)) as listener:
    thread = threading.Thread(target=serve)
    thread.start()
    yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
  thread.join()


def agree(client):
  """What a camera answers to RTSP requests (RFC 2326) until one is PLAY: there is MPEG-TS, on this connection."""
  session = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:video\r\n"
  answers = {
    "OPTIONS": ("Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n", ""),
    "DESCRIBE": (f"Content-Type: application/sdp\r\nContent-Length: {len(session)}\r\n", session),
    "SETUP": ("Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n", ""),
    "PLAY": ("Session: 1\r\n", ""),
  }
  method, reader = "", client.makefile("r", newline="\r\n")
  while method != "PLAY":
    method, *lines = itertools.takewhile(str.strip, reader)
    method = method.split()[0]
    sequence = next(line for line in lines if line.startswith("CSeq"))
    headers, body = answers[method]
    client.sendall(f"RTSP/1.0 200 OK\r\n{sequence}{headers}\r\n{body}".encode())


def interleaved(packet, number, begun):
  """A packet of MPEG-TS in one of RTP (RFC 3550, payload type 33), in channel 0 of an RTSP connection."""
  clock = int(90_000 * (time.monotonic() - begun))
  header = struct.pack("!BBHII", 0x80, 33, number % 2**16, clock % 2**32, 1)
  return struct.pack("!cBH", b"$", 0, len(header) + len(packet)) + header + packet


def slow(monkeypatch, seconds):
  """Makes every model take so long for a clip."""
  answer = Detector.answer

  def answer_late(*arguments):
    time.sleep(seconds)
    return answer(*arguments)

  monkeypatch.setattr(Detector, "answer", answer_late)


def frame_numbers(keyframe):
  """Which frames of the ramp were first, in the middle and last in the clip."""
  return keyframe.action_score[0] * 255 / 2


def check_files(report, answers):
  keyframes = [keyframe for answer in answers for keyframe in answer.keyframes]
  lines = [json.loads(line) for line in report.json.read_text().splitlines()]
  assert len(lines) == len(keyframes) == report.keyframes
  for line, keyframe in zip(lines, keyframes, strict=True):
    assert line["time"] == pytest.approx(keyframe.time, abs=1e-5)
    assert [actor["person"] for actor in line["actors"]] == keyframe.person.tolist()
  with VideoReader(report.video) as reader:
    times = [time for time, _ in reader]
    assert len(times) == report.drawn and reader.size[0] >= 360
  assert (np.diff(times) > 0.5 / FPS).all()


@pytest.mark.parametrize("scheme", ["tcp", "rtsp"])
def test_a_stream(ramp, tmp_path, scheme):
  answers = []
  with served(ramp, 4.0, scheme=scheme) as url:
    report = live.watch(LOADED, url, tmp_path, SELECTION, stride=0.25, on_answer=answers.append)
  check_files(report, answers)
  assert report.frames >= 119 and report.lost is None  # RTSP ends without saying that the last frame is whole
  (first, *_), *others = [answer.keyframes for answer in answers]
  assert first.time == 0 and len(others) >= 2
  start = frame_numbers(first)[1] / FPS
  for (keyframe,) in others:
    assert keyframe.person.tolist() == [1, 2]
    numbers = frame_numbers(keyframe)
    np.testing.assert_allclose(numbers[1] / FPS - start, keyframe.time, atol=2 / FPS)
    np.testing.assert_allclose(np.diff(numbers), [12, 9], atol=3)  # no clip has gaps


@pytest.mark.parametrize("seconds", [0.3, 3.0])
def test_delay_is_bounded_where_the_model_is_too_slow(ramp, tmp_path, monkeypatch, seconds):
  """Whether the source sends in real time or much faster."""
  slow(monkeypatch, 0.4)
  answers = []
  with served(ramp, seconds) as url:
    report = live.watch(LOADED, url, tmp_path, SELECTION, stride=0.05, on_answer=answers.append)
  check_files(report, answers)
  assert report.frames == 120
  assert report.delay < 2.0
  gaps = np.diff([answer.keyframes[0].time for answer in answers])
  assert report.skipped == (np.round(gaps / 0.05) - 1).sum()
  if seconds > 1:
    assert len(answers) > 1 and report.skipped > 10


def test_memory_is_bounded(ramp, monkeypatch):
  with served(10 * ramp, 0.5) as url, live.LiveSource(url) as source:
    source.start(1.0, 1)
    most, count = 0, 0
    while source.wait(count):
      count, most = source.count, max(most, len(source.after(-np.inf)))
  assert count > 600 and most <= FPS + 2


def test_tubes_take_frames_in_a_row(ramp, tmp_path, monkeypatch):
  slow(monkeypatch, 0.8)
  info = {**LOADED.info, "label_map": {1: "bright", 2: "dark"}}
  answers = []
  with served(ramp, 4.0) as url:
    model = checkpoint.Loaded(TubeReader(), info)
    report = live.watch(model, url, tmp_path, SELECTION._replace(label_map=info["label_map"]), on_answer=answers.append)
  check_files(report, answers)
  clips = [[round(float(k.action_score[0, 0]) * 255 / 2) for k in answer.keyframes] for answer in answers]
  assert len(clips) > 1
  for clip in clips:
    np.testing.assert_allclose(clip, clip[0] + np.arange(8), atol=1)
  holes = sum(after[0] - before[-1] - 1 for before, after in itertools.pairwise(clips))
  assert report.skipped == pytest.approx(holes, abs=len(clips)) and holes > 0


def test_people_are_found_by_another_model(ramp, tmp_path):
  answers = []
  with served(ramp, 2.0) as url:
    model = LOADED._replace(model=ClipReaderOfPeople())
    live.watch(model, url, tmp_path, SELECTION, people_from=LOADED, draw=False, on_answer=answers.append)
  assert answers
  for answer in answers:
    np.testing.assert_allclose(answer.keyframes[0].boxes, [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.6, 0.7]], atol=1e-6)


def test_the_video_is_playable_at_any_time(ramp, tmp_path):
  counts = []

  def play(answer):
    for path in tmp_path.glob("*.mp4"):
      with contextlib.suppress(VideoError), VideoReader(shutil.copy(path, tmp_path / "copy.mkv")) as reader:
        counts.append(sum(1 for _ in reader))

  with served(ramp, 4.0) as url:
    live.watch(LOADED, url, tmp_path, SELECTION, stride=0.25, on_answer=play)
  assert counts and counts[-1] > 0


def run(monkeypatch, tmp_path, *arguments):
  monkeypatch.setattr(predict, "load", lambda name: LOADED)
  return predict.main(["--checkpoint", "any", "--output-dir", str(tmp_path), *map(str, arguments)])


def test_a_lost_source(ramp, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(live, "_SILENCE", 0.5)
  with served(ramp, 1.0, linger=3.0) as url:
    assert run(monkeypatch, tmp_path, "--video", url) == 1
  out, err = capsys.readouterr()
  assert err.startswith("error: lost after") and "nothing came for 0.5 seconds; what was written is complete" in err
  assert "person 1: " in out and len(err.splitlines()) == 1
  (video,) = tmp_path.glob("*.mp4")
  with VideoReader(video) as reader:
    assert sum(1 for _ in reader) > 5


def test_ctrl_c_ends_it(ramp, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(predict, "_print_answer", lambda answer: os.kill(os.getpid(), signal.SIGINT))
  before = signal.getsignal(signal.SIGINT)  # nothing, where the tests run in the background of a shell
  with served(5 * ramp, 20.0) as url:
    begun = time.monotonic()
    assert run(monkeypatch, tmp_path, "--video", url) == 0
    assert time.monotonic() - begun < 10
  assert "1 keyframes in" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGINT) is before


def test_seconds(ramp, tmp_path, monkeypatch):
  with served(5 * ramp, 20.0) as url:
    begun = time.monotonic()
    assert run(monkeypatch, tmp_path, "--video", url, "--seconds", 0.5, "--no-video") == 0
    assert time.monotonic() - begun < 10
  assert [path.suffix for path in tmp_path.iterdir()] == [".jsonl"]


class Camera:
  """Gives twenty blue pictures."""

  def __init__(self, index):
    self._left = 20

  def isOpened(self):
    return True

  def read(self):
    time.sleep(1 / FPS)
    self._left -= 1
    return self._left >= 0, np.full((64, 80, 3), (255, 0, 0), np.uint8)

  def release(self):
    pass


def test_a_camera(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(live.cv2, "VideoCapture", Camera)
  assert run(monkeypatch, tmp_path, "--video", "3") == 1
  assert "camera 3: gives no more pictures; what was written is complete" in capsys.readouterr().err
  (video,) = tmp_path.glob("camera_3_*.mp4")
  with VideoReader(video) as reader:
    _, frame = next(iter(reader))
  red, _, blue = frame[-20:, -20:].mean((0, 1))
  assert blue > 200 > 50 > red


def test_no_such_camera(tmp_path, monkeypatch, capfd):
  assert run(monkeypatch, tmp_path, "--video", "987") == 1
  assert capfd.readouterr().err == "error: camera 987: there is none, or another program uses it\n"


def test_no_such_address(tmp_path, monkeypatch, capsys):
  assert run(monkeypatch, tmp_path, "--video", "tcp://user:secret@127.0.0.1:1") == 1
  assert capsys.readouterr().err == "error: tcp://127.0.0.1:1: Connection refused\n"


def test_times_go_on_where_a_source_begins_anew(monkeypatch):
  stamps = [5.0, 5.1, 5.2, 1.0, 1.1, None, 1.3, 9e9]
  monkeypatch.setattr(live, "_camera", lambda index: ((stamp, np.zeros((2, 2, 3), np.uint8)) for stamp in stamps))
  with live.LiveSource("0") as source:
    source.start(9.0, 1)
    while source.wait(source.count):
      pass
    times = [frame.time for frame in source.after(-1)]
  np.testing.assert_allclose(np.diff(times), [0.1, 0.1, 1 / 30, 0.1, 1 / 30, 1 / 30, 1 / 30])


@pytest.mark.parametrize(
  ("video", "expected"),
  [("0", True), ("rtsp://cam/1", True), ("http://a/b.mp4", True), ("a.mp4", False), ("file:///a.mp4", False)],
)
def test_what_is_live(video, expected):
  assert live.is_live(video) == expected


def test_passwords_are_not_shown():
  assert live.shown_name("rtsp://me:secret@cam:554/stream?key=secret") == "rtsp://cam:554/stream"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--video", "0", "a.mp4"], "a live source is watched alone"),
    (["--video", "0", "--save-maps"], "--save-maps is for files"),
    (["--video", "a.mp4", "--seconds", "3"], "--seconds is for live sources"),
  ],
)
def test_bad_options(arguments, message, capsys):
  with pytest.raises(SystemExit):
    predict.main(["--checkpoint", "quickstart", *arguments])
  assert message in capsys.readouterr().err
