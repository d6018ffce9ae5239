"""How fast are clips loaded, and how much of a batch is padding?

    python benchmarks/data.py

makes up videos of 30 frames a second and a short side of 340 pixels, as mp4, as extracted frames (as `ffmpeg -q:v 1`
writes them) and as records, and reads random clips of 16 frames, every fourth, at a short side of 288. Beside them run
the plain loops that most people start from. All rates are clips for each second of processor time, which is clips a
second on one core. Takes two minutes.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import rich.console
import rich.table

from vad_jax import progress
from vad_jax.annotations import Keyframe
from vad_jax.datasets import records
from vad_jax.datasets.augment import choose_canvas, place_on_canvas
from vad_jax.datasets.loader import ClipSpec, FrameSource, KeyframeDataset, RecordFrames, VideoFrames, train_batches
from vad_jax.datasets.video import VideoReader, VideoWriter

FPS, SECONDS, SIZE = 30, 10, (340, 604)
SHORT_SIDE, CANVAS = 288, (288, 512)
CLIP = ClipSpec(num_frames=16, frame_stride=4, fps=FPS)
# Of films and of videos from the net; the last one is a telephone held upright.
SHAPES = {"4:3": 4 / 3, "1.66": 1.66, "16:9": 16 / 9, "1.85": 1.85, "2.35": 2.35, "9:16": 9 / 16}
CANVASES = {
  "288x512": [(288, 512)],
  "288x384, 288x512": [(288, 384), (288, 512)],
  "288x384, 288x512, 288x704, 512x288": [(288, 384), (288, 512), (288, 704), (512, 288)],
}

Read = Callable[[str, np.ndarray], np.ndarray]  # video and times to [T, H, W, 3] RGB


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--videos", type=int, default=4, help="default: %(default)s")
  parser.add_argument("--clips", type=int, default=30, help="for each way and round; default: %(default)s")
  parser.add_argument(
    "--rounds", type=int, default=3, help="of which the fastest counts, clip by clip; default: %(default)s"
  )
  options = parser.parse_args()
  cv2.setNumThreads(0)
  console = rich.console.Console()
  console.print(padding_table())
  with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    make_videos(root, options.videos)
    ways = make_ways(root)
    console.print(speed_table(ways, options))
    console.print(memory_table(root, options.clips * options.rounds))


def make_videos(root: Path, count: int) -> None:
  """Writes ``videos/train/<video>.mp4``, a texture that moves with some noise, and ``frames/<video>/000001.jpg``."""
  rng = np.random.default_rng(0)
  height, width = SIZE
  noise = rng.normal(0, 3, (4, height, width, 3))
  with progress.bar("making videos", count * FPS * SECONDS) as advance:
    for video in (f"video{number}" for number in range(count)):
      texture = np.full((height + 40, width + 100, 3), 110.0)
      for k in range(1, 8):
        octave = rng.normal(0, 60 / 2 ** (0.8 * k), (2 ** (k + 1), 2 ** (k + 2), 3))
        texture += cv2.resize(octave, (width + 100, height + 40))
      path = root / "videos" / "train" / f"{video}.mp4"
      with VideoWriter(path, size=SIZE, fps=FPS) as writer:
        for index in range(FPS * SECONDS):
          top, left = index // 5 % 40, index % 100
          shown = texture[top : top + height, left : left + width] + noise[index % 4]
          writer.write(np.clip(shown, 0, 255).astype(np.uint8))
          advance()
      extract(path, root / "frames" / video)


def extract(path: Path, folder: Path) -> None:
  """What ``ffmpeg -i path -q:v 1 folder/%06d.jpg`` does."""
  folder.mkdir(parents=True)
  encoder: Any = av.CodecContext.create("mjpeg", "w")
  encoder.height, encoder.width = SIZE
  encoder.pix_fmt, encoder.color_range, encoder.time_base = "yuvj420p", 2, Fraction(1, FPS)
  encoder.options = {"qmin": "1", "qmax": "1"}
  with av.open(str(path)) as container:
    for index, frame in enumerate(container.decode(video=0), 1):
      (packet,) = encoder.encode(frame.reformat(format="yuvj420p"))
      (folder / f"{index:06d}.jpg").write_bytes(bytes(packet))


def make_ways(root: Path) -> dict[str, Read]:
  """The ways to read a clip, by name."""
  folders = {path.name: records.Source(path, fps=FPS) for path in sorted((root / "frames").iterdir())}
  return {
    "plain loop: extracted frames": lambda video, times: plain_images(root / "frames" / video, times),
    "plain loop: mp4": lambda video, times: plain_video(root / "videos" / "train" / f"{video}.mp4", times),
    "records of the extracted frames": placed(RecordFrames(records.build_from(folders, root / "copied", "train"))),
    "records of mp4": placed(RecordFrames(records.build(root, root / "records", "train"))),
    f"the same, --short-side {SHORT_SIDE}": placed(
      RecordFrames(records.build(root, root / "small", "train", short_side=SHORT_SIDE))
    ),
    f"the same, --short-side {SHORT_SIDE} --quality 85": placed(
      RecordFrames(records.build(root, root / "light", "train", short_side=SHORT_SIDE, quality=85))
    ),
    "mp4": placed(VideoFrames(root / "videos" / "train")),
    f"mp4, {os.cpu_count()} decoding threads": lambda video, times: many_threads(
      root / "videos" / "train" / f"{video}.mp4", times
    ),
  }


def placed(frames: FrameSource) -> Read:
  return lambda video, times: place_on_canvas(frames.frames(video, times), CANVAS, SHORT_SIDE)[0]


def many_threads(path: Path, times: np.ndarray) -> np.ndarray:
  with VideoReader(path) as reader:
    return place_on_canvas(reader.frames_at(times), CANVAS, SHORT_SIDE)[0]


def plain_images(folder: Path, times: np.ndarray) -> np.ndarray:
  frames = []
  for index in np.clip(np.rint(times * FPS), 0, FPS * SECONDS - 1).astype(int):
    image = cv2.imread(str(folder / f"{index + 1:06d}.jpg"))
    assert image is not None
    image = cv2.resize(image, (round(SIZE[1] * SHORT_SIDE / SIZE[0]), SHORT_SIDE))
    frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
  return np.stack(frames)


def plain_video(path: Path, times: np.ndarray) -> np.ndarray:
  wanted = np.clip(np.rint(times * FPS), 0, FPS * SECONDS - 1).astype(int)
  frames = {}
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    time_base = stream.time_base or Fraction(1, FPS)
    container.seek(int(wanted[0] / FPS / time_base), stream=stream)
    for frame in container.decode(stream):
      index = round(float((frame.pts or 0) * time_base) * FPS)
      if index in wanted:
        image = frame.to_ndarray(format="rgb24")
        frames[index] = cv2.resize(image, (round(SIZE[1] * SHORT_SIDE / SIZE[0]), SHORT_SIDE))
      if index >= wanted[-1]:
        break
  return np.stack([frames[index] for index in wanted])


def speed_table(ways: dict[str, Read], options: argparse.Namespace) -> rich.table.Table:
  """Clips for each second of processor time; all ways take turns, and of each clip the fastest round counts."""
  rng = np.random.default_rng(1)
  videos = rng.integers(options.videos, size=options.clips)
  times = rng.integers(1, SECONDS - 1, options.clips).tolist()
  seconds = np.empty((options.rounds, options.clips, len(ways)))
  with progress.bar("reading", options.rounds * options.clips) as advance:
    for turn, clip in np.ndindex(seconds.shape[:2]):
      for way, read in enumerate(ways.values()):
        begun = time.process_time()
        read(f"video{videos[clip]}", CLIP.times(times[clip]))
        seconds[turn, clip, way] = time.process_time() - begun
      advance()
  rates = 1 / seconds.min(axis=0).mean(axis=0)
  title = f"16 x {SHORT_SIDE} x {CANVAS[1]} from {SIZE[0]} x {SIZE[1]}"
  table = rich.table.Table("frames from", "clips/s per core", "x extracted", "x mp4", title=title)
  for name, rate in zip(ways, rates, strict=True):
    table.add_row(name, f"{rate:.1f}", f"{rate / rates[0]:.2f}", f"{rate / rates[1]:.2f}")
  return table


def memory_table(root: Path, num_keyframes: int) -> rich.table.Table:
  """Memory of this process during three epochs of training batches from records."""
  nobody = (np.zeros((0, 4), np.float32), np.zeros((0, 1), np.float32), np.zeros(0, np.int64))
  rng = np.random.default_rng(2)
  keyframes = [Keyframe("video0", float(rng.uniform(1, SECONDS - 1)), *nobody) for _ in range(num_keyframes)]
  dataset = KeyframeDataset(keyframes, RecordFrames(root / "small" / "train"), CLIP, {1: "any"})
  batches = train_batches(dataset, batch_size=2, canvas=CANVAS, short_side=SHORT_SIDE, max_boxes=1, seed=0)
  steps = num_keyframes // 2
  table = rich.table.Table("epoch", "memory, MB", "clips/s", title=f"training batches, {os.cpu_count()} cores")
  with progress.bar("loading", 3 * steps) as advance:
    for epoch in range(3):
      begun = time.perf_counter()
      for _ in range(steps):
        next(batches)
        advance()
      table.add_row(str(epoch + 1), f"{resident():.0f}", f"{2 * steps / (time.perf_counter() - begun):.1f}")
  return table


def resident() -> float:
  """Memory of this process now, in MB."""
  return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def padding_table() -> rich.table.Table:
  """Share of a batch that is padding, by the shape of the video, and how large its frames become."""
  table = rich.table.Table("canvases", *SHAPES, title=f"padding (and height of the frames) at short side {SHORT_SIDE}")
  for name, canvases in CANVASES.items():
    table.add_row(name, *(padding(canvases, shape) for shape in SHAPES.values()))
  return table


def padding(canvases: Sequence[tuple[int, int]], shape: float) -> str:
  size = (480, round(480 * shape))
  canvas = choose_canvas(size, canvases, SHORT_SIDE)
  _, (height, width) = place_on_canvas(np.zeros((1, *size, 3), np.uint8), canvas, SHORT_SIDE)
  return f"{100 * (1 - height * width / (canvas[0] * canvas[1])):.0f} % ({height})"


if __name__ == "__main__":
  main()
