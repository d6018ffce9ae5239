"""Data sets by name: made or prepared where they have to be, then opened.

sets = load("synthetic", "data", num_train=600, num_val=120, clip=ClipSpec(num_frames=16, frame_stride=2))
sets["train"][0]["video"]  # [T, H, W, 3] uint8
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # so that reading a video does not need all that preparing a set does
  from vad_jax.datasets.loader import ClipSpec, KeyframeDataset

SPLITS = ("train", "val")


def load(name: str, root: str | os.PathLike[str], **kwargs: Any) -> dict[str, KeyframeDataset]:
  """Opens a data set, after making or preparing what is not there yet.

  Args:
    name: one of `DATASETS`.
    root: folder of all prepared sets.
    **kwargs: for the set's function in this module.

  Returns:
    The splits, ``{"train": ..., "val": ...}``.

  Raises:
    ValueError: there is no such set.
  """
  if name not in DATASETS:
    raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)} (see data/README.md)")
  return DATASETS[name](Path(root), **kwargs)


def load_synthetic(
  root: Path,
  *,
  level: str = "easy",
  num_train: int = 600,
  num_val: int = 120,
  size: tuple[int, int] = (160, 120),
  seconds: int = 6,
  fps: float = 25,
  seed: int = 0,
  clip: ClipSpec | None = None,
  reader: Literal["records", "video"] = "records",
  workers: int | None = None,
) -> dict[str, KeyframeDataset]:
  """The rendered set, see `vad_jax.datasets.synthetic.make` and `open_directory` for the arguments."""
  from vad_jax.datasets import synthetic

  width, height = size
  videos = f"{num_train}+{num_val}x{seconds}s"
  directory = root / f"synthetic-{level}-{width}x{height}-{fps:g}fps-{videos}-seed{seed}"
  synthetic.make(
    directory,
    level=level,
    num_train=num_train,
    num_val=num_val,
    size=(width, height),
    seconds=seconds,
    fps=fps,
    seed=seed,
    workers=workers,
  )
  return open_directory(directory, clip=clip, reader=reader, workers=workers)


def open_directory(
  directory: Path,
  *,
  clip: ClipSpec | None = None,
  reader: Literal["records", "video"] = "records",
  workers: int | None = None,
) -> dict[str, KeyframeDataset]:
  """Opens a set in the layout of data/README.md.

  Args:
    directory: the set.
    clip: frames around a keyframe; by default those of `ClipSpec`.
    reader: "records" encodes the videos as records first, once, which is faster to train from; "video"
      decodes them each time.
    workers: threads for that encoding; by default one for each core.
  """
  if reader not in ("records", "video"):
    raise ValueError(f"reader {reader!r}: expected 'records' or 'video'")
  from vad_jax import annotations
  from vad_jax.datasets import loader, records

  label_map = annotations.read_label_map(directory / "annotations" / "label_map.pbtxt")
  datasets = {}
  for split in SPLITS:
    rows = annotations.read_ava_csv(directory / "annotations" / f"{split}.csv")
    keyframes = annotations.keyframes(rows, max(label_map))
    if reader == "records":
      frames = loader.RecordFrames(records.build(directory, directory / "records", split, workers=workers))
    else:
      frames = loader.VideoFrames(directory / "videos" / split)
    datasets[split] = loader.KeyframeDataset(keyframes, frames, clip or loader.ClipSpec(), label_map)
  return datasets


DATASETS = {"synthetic": load_synthetic}
