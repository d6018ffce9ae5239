"""Takes the sound of one video over into another."""

import logging
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import av.container
import av.error
from av.audio.resampler import AudioResampler

logger = logging.getLogger(__name__)


class SoundCopy:
  """The sound of one file on its way into another: packets are copied where mp4 players know the codec, else AAC."""

  def __init__(self, path: str | os.PathLike[str], target: av.container.OutputContainer):
    """Opens the file.

    Args:
      path: the video with the sound; one without any is fine.
      target: where it goes; time zero is the first frame of the source.

    Raises:
      av.error.FFmpegError: the file cannot be read.
    """
    self._path = path
    self._target = target
    self._source: av.container.InputContainer = av.open(os.fspath(path), metadata_errors="replace")
    self._packets: Iterator[av.Packet] = iter(())
    self._next: av.Packet | None = None
    self._next_time = 0.0
    self._resampler = None
    if not self._source.streams.audio:
      return
    stream = self._source.streams.audio[0]
    if stream.codec_context.codec.canonical_name in ("aac", "mp3"):
      self._output = target.add_stream_from_template(stream)
    else:
      rate = min(stream.codec_context.sample_rate, 48_000)
      self._output = target.add_stream("aac", rate=rate, layout="stereo")
      self._output.codec_context.open()
      self._resampler = AudioResampler("fltp", "stereo", rate, self._output.codec_context.frame_size)
    self._time_base = stream.time_base or Fraction(1, av.time_base)
    video = next(iter(self._source.streams.video), None)
    start = video.start_time * video.time_base if video and video.start_time and video.time_base else 0
    self._origin = round(start / self._time_base)
    # Packets without a time stamp, and those before the first picture, have no place.
    self._packets = (p for p in self._source.demux(stream) if p.pts is not None and p.pts >= self._origin)
    self._advance()

  def copy_until(self, time: float) -> None:
    """Moves the sound that starts before a time."""
    while self._next is not None and self._next_time < time:
      try:
        self._move(self._next)
      except av.error.InvalidDataError:
        logger.warning("%s: a damaged piece of sound was left out", self._path)
      self._advance()

  def finish(self) -> None:
    """Writes what the encoder still holds."""
    if self._resampler:
      self._encode(self._resampler.resample(None))
      self._target.mux(self._output.encode(None))

  def close(self) -> None:
    self._source.close()

  def _advance(self) -> None:
    try:
      self._next = next(self._packets, None)
    except av.error.FFmpegError:
      logger.warning("%s: the sound ends early, the file is damaged", self._path)
      self._next = None
    if self._next is not None:
      self._next.pts = (self._next.pts or 0) - self._origin
      self._next.dts = self._next.pts
      self._next_time = float(self._next.pts * self._time_base)

  def _move(self, packet: av.Packet) -> None:
    if self._resampler is None:
      packet.stream = self._output
      self._target.mux(packet)
      return
    for frame in packet.decode():
      self._encode(self._resampler.resample(frame))

  def _encode(self, frames: list) -> None:
    for frame in frames:
      self._target.mux(self._output.encode(frame))
