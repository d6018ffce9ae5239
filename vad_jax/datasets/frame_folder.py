"""A video that somebody took apart: a folder of numbered images, read as `video.VideoReader` reads a file.

The number in a file's name says when its picture is shown: numbers count from 1 (from 0 where there is an image 0), and
number ``n`` is ``n - 1`` frames after the start. So an image that is missing moves no other.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from vad_jax.datasets.video import PathLike, VideoError

IMAGE_NUMBER = r"(\d+)\.(jpg|jpeg|png)"  # how the names end


def numbered_images(folder: PathLike, prefix: str = "") -> dict[int, str]:
  """File names of a folder by their number, ascending.

  Args:
    folder: where to look.
    prefix: what stands before the number in a name: ``img_`` for ``img_00001.jpg``.

  Raises:
    VideoError: the folder cannot be read.
  """
  pattern = re.compile(re.escape(prefix) + IMAGE_NUMBER, re.IGNORECASE)
  try:
    matches = (pattern.fullmatch(entry.name) for entry in os.scandir(folder))
    return dict(sorted((int(match[1]), match[0]) for match in matches if match))
  except OSError as error:
    raise VideoError(f"{folder}: not a readable folder of images ({error.strerror})") from None


class FrameFolder:
  """Reads one folder of numbered images.

  Attributes:
    path: the folder.
    fps: images a second.
    size: height and width of the first image that can be decoded, in pixels.
    num_frames: length of the video, images that are missing included.
    duration: the same in seconds.
    broken: images that were found missing until now.
  """

  def __init__(self, path: PathLike, *, fps: float, prefix: str = ""):
    """Lists the folder and decodes an image.

    Raises:
      VideoError: there is no image, or none can be decoded.
    """
    self.path = Path(path)
    self.fps = fps
    self.broken = 0
    self._names = numbered_images(path, prefix)
    if not self._names:
      raise VideoError(f"{path}: no images {prefix}<number>.jpg or .png")
    self._first = min(1, next(iter(self._names)))
    self.num_frames = next(reversed(self._names)) - self._first + 1
    self.duration = self.num_frames / fps
    images = (decode(self._read(name)) for name in self._names.values())
    image = next((image for image in images if image is not None), None)
    if image is None:
      raise VideoError(f"{path}: none of its {len(self._names)} images can be decoded")
    self.size: tuple[int, int] = image.shape[:2]

  def __enter__(self) -> "FrameFolder":
    return self

  def __exit__(self, *exc_info) -> None:
    pass

  def read(self, start: float = 0.0, stop: float = math.inf) -> Iterator[tuple[float, bytes]]:
    """Times ``start <= time < stop`` in seconds, and the files of their images, as they are."""
    for index in range(max(int(start * self.fps) - 1, 0), self.num_frames):
      time = index / self.fps
      if time < start:
        continue
      if time >= stop:
        return
      name = self._names.get(index + self._first)
      if name is None:
        self.broken += 1
      else:
        yield time, self._read(name)

  def _read(self, name: str) -> bytes:
    try:
      return (self.path / name).read_bytes()
    except OSError:
      return b""  # counts as an image that cannot be decoded


def decode(data: bytes) -> np.ndarray | None:
  """The picture of an image file, ``[H, W, 3]`` uint8 in OpenCV's order BGR; None where it is damaged."""
  cut_short = data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-1024:]  # OpenCV would make up the rest
  return None if cut_short or not data else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def baseline_size(data: bytes) -> tuple[int, int] | None:
  """Height and width of a JPEG that every decoder reads fast and alike; None for any other file.

  That is one of 8 bits a channel, in colour, not progressive, complete, and without EXIF data, which could turn it.
  """
  if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
    return None
  position = 2
  while position + 9 < len(data) and data[position] == 0xFF:
    marker, length, precision = data[position + 1], data[position + 2 : position + 4], data[position + 4]
    if marker == 0xC0:
      height, width = (int.from_bytes(data[at : at + 2]) for at in (position + 5, position + 7))
      return (height, width) if (precision, data[position + 9]) == (8, 3) else None
    if (0xC1 <= marker <= 0xCF and marker != 0xC4) or marker == 0xE1:
      return None
    position += 2 + int.from_bytes(length)
  return None
