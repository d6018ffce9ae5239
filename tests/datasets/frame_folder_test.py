"""Folders of images: what a number in a name says, and what becomes of files that are no JPEGs."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import numbered_video
from vad_jax.datasets.frame_folder import FrameFolder, baseline_size, decode, numbered_images
from vad_jax.datasets.video import VideoError

JPEG = cv2.imencode(".jpg", numbered_video.picture(5)[..., ::-1])[1].tobytes()


def test_numbers_are_times_and_a_missing_image_moves_no_other(tmp_path):
  for number in (1, 2, 4, 5):
    (tmp_path / f"img_{number:05d}.jpg").write_bytes(JPEG if number != 2 else b"damaged")
  (tmp_path / "img_00003.txt").touch()
  (tmp_path / "00003.jpg").touch()
  with FrameFolder(tmp_path, fps=10, prefix="img_") as folder:
    assert (folder.num_frames, folder.duration, folder.size) == (5, 0.5, (48, 80))
    times, images = zip(*folder.read(), strict=True)
    np.testing.assert_allclose(times, [0, 0.1, 0.3, 0.4])
    assert [image == JPEG for image in images] == [True, False, True, True]
    assert folder.broken == 1
    assert [time for time, _ in folder.read(0.1, 0.4)] == [0.1, 0.3]


def test_numbers_may_start_at_zero(tmp_path):
  for number in (0, 1, 2):
    (tmp_path / f"{number}.JPG").write_bytes(JPEG)
  with FrameFolder(tmp_path, fps=2) as folder:
    assert [time for time, _ in folder.read()] == [0, 0.5, 1.0]


def test_folders_without_images_are_named(tmp_path):
  with pytest.raises(VideoError, match="not a readable folder of images"):
    numbered_images(tmp_path / "nowhere")
  with pytest.raises(VideoError, match=r"no images <number>\.jpg or \.png"):
    FrameFolder(tmp_path, fps=10)
  (tmp_path / "1.jpg").write_bytes(JPEG[:-30])
  with pytest.raises(VideoError, match="none of its 1 images can be decoded"):
    FrameFolder(tmp_path, fps=10)


def test_what_is_copied_as_it_is():
  picture = numbered_video.picture(5)
  assert baseline_size(JPEG) == (48, 80)
  progressive = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
  grey, png = cv2.imencode(".jpg", picture[..., 0])[1].tobytes(), cv2.imencode(".png", picture)[1].tobytes()
  turned = JPEG[:2] + b"\xff\xe1\x00\x08Exif\x00\x00" + JPEG[2:]
  for other in (progressive, grey, png, turned, JPEG[:-30], JPEG[:2], b""):
    assert baseline_size(other) is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
  changes=st.lists(st.tuples(st.integers(0, len(JPEG) - 1), st.integers(0, 255)), max_size=6),
  header=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
  kept=st.integers(0, 2 * len(JPEG)),
)
def test_any_bytes_are_an_image_or_none(changes, header, kept):
  content = bytearray(JPEG)
  for position, value in changes + header:
    content[position] = value
  data = bytes(content[:kept])
  size, image = baseline_size(data), decode(data)
  if image is not None:
    assert image.dtype == np.uint8 and image.ndim == 3
    assert size in (None, image.shape[:2])
