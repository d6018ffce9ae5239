"""Small videos whose frames carry their number in black and white bars, so that tests can tell them apart."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vad_jax.datasets.video import VideoWriter

_BITS = 10


def picture(number: int, size: tuple[int, int] = (48, 80)) -> np.ndarray:
  """An orange frame; the upper half shows the number in bars, most significant bit first."""
  height, width = size
  frame = np.full((height, width, 3), (180, 120, 60), np.uint8)
  for bit in range(_BITS):
    left, right = bit * width // _BITS, (bit + 1) * width // _BITS
    frame[: height // 2, left:right] = 255 if number >> (_BITS - 1 - bit) & 1 else 0
  return frame


def number(frame: np.ndarray) -> int:
  """Reads the number of a frame, whatever size it was brought to."""
  height, width = frame.shape[:2]
  centres = (np.arange(_BITS) * 2 + 1) * width // (2 * _BITS)
  bits = frame[height // 4, centres].mean(axis=-1) > 128
  return int(bits @ (1 << np.arange(_BITS)[::-1]))


def numbers(frames: np.ndarray) -> list[int]:
  return [number(frame) for frame in frames]


def write(path: Path, count: int, fps: float = 10, size: tuple[int, int] = (48, 80)) -> Path:
  with VideoWriter(path, size=size, fps=fps) as writer:
    for index in range(count):
      writer.write(picture(index, size))
  return path


def encode(
  path: Path,
  times: np.ndarray,
  *,
  codec: str,
  options: dict[str, str] | None = None,
  size: tuple[int, int] = (48, 80),
  pixels: str = "yuv420p",
  pixel_aspect: Fraction | None = None,
  rotation: int = 0,
  audio: str | None = None,
  title: str = "",
) -> Path:
  """Writes frames at given times with any codec; with `audio` a tone from time zero on, its packets first.

  Args:
    path: the file; its suffix tells the container.
    times: seconds, exact for steps of 1/25 s; of 1/1000 s where the codec can.
    codec: name of an encoder.
    options: for it.
    size: height and width.
    pixels: how they are stored.
    pixel_aspect: width of a pixel by its height.
    rotation: degrees that a player turns the picture by.
    audio: name of an encoder of sound.
    title: what the file says of itself.
  """
  with av.open(str(path), "w") as container:
    container.metadata["title"] = title
    stream = container.add_stream(codec, rate=25, options=options or {})
    stream.height, stream.width, stream.pix_fmt = *size, pixels
    stream.codec_context.time_base = Fraction(1, 25 if codec.startswith("mpeg") else 1000)
    if pixel_aspect:
      stream.codec_context.sample_aspect_ratio = pixel_aspect
    if rotation:
      stream.set_display_rotation(rotation)
    if audio:
      sound = container.add_stream(audio, rate=48_000, layout="mono")
      sound.codec_context.open()
      step = sound.codec_context.frame_size or 1024
      for start in range(0, int((times[-1] + 0.5) * 48_000), step):
        tone = 0.3 * np.sin(np.arange(start, start + step) * (2 * np.pi * 440 / 48_000))
        kind = sound.codec_context.format.name
        tone = tone.astype(np.float32) if kind.startswith("flt") else (tone * 32767).astype(np.int16)
        chunk = av.AudioFrame.from_ndarray(tone[None], format=kind, layout="mono")
        chunk.sample_rate, chunk.pts, chunk.time_base = 48_000, start, Fraction(1, 48_000)
        container.mux(sound.encode(chunk))
      container.mux(sound.encode(None))
    for index, time in enumerate(times):
      frame = av.VideoFrame.from_ndarray(picture(index, size), format="rgb24")
      frame.time_base = stream.codec_context.time_base
      frame.pts = round(time / frame.time_base)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def at_rate(path: Path, rate: Fraction, count: int, codec: str = "libx264") -> Path:
  """Writes frames of a constant rate, with B-frames where the codec has them, in the container's own time stamps."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate, options={"g": "12", "bf": "2", "cpu-used": "8"})
    stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
    for index in range(count):
      frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
      frame.pts, frame.time_base = index, 1 / rate
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def remux(source: Path, path: Path, change: Callable[[int, av.Packet], av.Packet | None]) -> Path:
  """Copies a video packet by packet; `change` gets each with its number, and gives what is written, None for none."""
  with av.open(str(source)) as read, av.open(str(path), "w") as written:
    stream = written.add_stream_from_template(read.streams.video[0])
    for index, packet in enumerate(packet for packet in read.demux(video=0) if packet.size):
      changed = change(index, packet)
      if changed is not None:
        changed.stream = stream
        written.mux(changed)
  return path
