"""Data sets by name: made or prepared where they have to be, then opened.

sets = load("synthetic", "data", num_train=600, num_val=120, clip=ClipSpec(num_frames=16, frame_stride=2))
sets["train"][0]["video"]  # [T, H, W, 3] uint8
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # so that reading a video does not need all that preparing a set does
  from vad_jax.annotations import Rows
  from vad_jax.datasets.loader import ClipSpec, KeyframeDataset
  from vad_jax.tubes import TubeGroundTruth

SPLITS = ("train", "val")
# Folder of the records of both splits, where they share videos.
TRAINVAL = "trainval"


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
  tubes: bool = False,
  oracle: bool = False,
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
  return open_directory(directory, clip=clip, reader=reader, tubes=tubes, oracle=oracle, workers=workers)


def load_ava(root: Path, **kwargs: Any) -> dict[str, KeyframeDataset]:
  """AVA in ``<root>/ava``, see `vad_jax.datasets.prepare`; arguments as of `open_directory`."""
  return open_directory(_prepared(root, "ava"), **kwargs)


def load_jhmdb(root: Path, *, split: int = 1, **kwargs: Any) -> dict[str, KeyframeDataset]:
  """One of the three splits of JHMDB51-21 in ``<root>/jhmdb``; arguments as of `open_directory`."""
  return open_directory(_prepared(root, "jhmdb"), annotation_dir=f"annotations/split{split}", **kwargs)


def load_ucf101_24(root: Path, **kwargs: Any) -> dict[str, KeyframeDataset]:
  """UCF101-24 in ``<root>/ucf101_24``; arguments as of `open_directory`."""
  return open_directory(_prepared(root, "ucf101_24"), **kwargs)


def load_custom(root: Path, *, directory: str = "custom", **kwargs: Any) -> dict[str, KeyframeDataset]:
  """Videos of one's own in ``<root>/<directory>``; arguments as of `open_directory`."""
  return open_directory(_prepared(root, "custom", directory), **kwargs)


def _prepared(root: Path, name: str, folder: str = "") -> Path:
  directory = root / (folder or name)
  if not (directory / "dataset.json").is_file():
    raise FileNotFoundError(
      f"{directory}: {name} has not been prepared here; run "
      f"`python -m vad_jax.datasets.prepare {name} --source DIR --output {directory}` (see data/README.md)"
    )
  return directory


def open_directory(
  directory: str | Path,
  *,
  annotation_dir: str = "annotations",
  clip: ClipSpec | None = None,
  reader: Literal["records", "video"] = "records",
  tubes: bool = False,
  proposal_threshold: float | None = None,
  oracle: bool = False,
  workers: int | None = None,
) -> dict[str, Any]:
  """Opens a set in the layout of data/README.md: the splits that it has.

  Args:
    directory: the set.
    annotation_dir: folder of the annotations in it, for a set with several divisions into train and val.
    clip: frames around a keyframe; by default those of `ClipSpec`.
    reader: "records" encodes the videos as records first, once, which is faster to train from; "video"
      decodes them each time.
    tubes: give whole videos with their tubes, a `tube_clips.TubeDataset`, instead of keyframes, a `KeyframeDataset`.
    proposal_threshold: least score of given person boxes; None leaves them out.
    oracle: the annotated boxes are the given ones, in evaluation, too: a limit that no detector reaches.
    workers: threads for that encoding; by default one for each core.

  Raises:
    FileNotFoundError: there are no annotations, tubes or proposals.
  """
  if reader not in ("records", "video"):
    raise ValueError(f"reader {reader!r}: expected 'records' or 'video'")
  if oracle and proposal_threshold is not None:
    raise ValueError("given boxes are either annotated ones (oracle) or detected ones (proposal_threshold)")
  if tubes and (oracle or proposal_threshold is not None):
    raise ValueError("tubes come without given boxes: leave oracle and proposal_threshold out")
  from vad_jax import annotations
  from vad_jax.datasets import loader, proposals, records
  from vad_jax.datasets.tube_clips import TubeDataset

  directory = Path(directory)
  folder = directory / annotation_dir
  label_map = annotations.read_label_map(folder / "label_map.pbtxt")
  truth = _read_tubes(directory, folder, label_map) if tubes else None
  clip = clip or loader.ClipSpec()
  datasets: dict[str, Any] = {}
  for split in SPLITS:
    path = folder / f"{split}.csv"
    if not path.is_file():
      continue
    rows = annotations.read_ava_csv(path)
    excluded = folder / f"{split}_excluded.csv"
    if excluded.is_file():
      rows = _without(rows, annotations.read_excluded(excluded))
    if reader == "video":
      frames = loader.VideoFrames(directory / "videos" / split)
    elif (directory / "records" / TRAINVAL).is_dir():
      frames = loader.RecordFrames(directory / "records" / TRAINVAL)
    else:
      frames = loader.RecordFrames(records.build(directory, directory / "records", split, workers=workers))
    if truth:
      datasets[split] = TubeDataset(truth, dict.fromkeys(rows.video), frames, clip)
      continue
    keyframes = annotations.keyframes(rows, max(label_map))
    given = None
    if oracle:  # in training the targets are among the proposals in any case
      given = {(k.video, k.timestamp): k.boxes[: 0 if split == "train" else None] for k in keyframes}
    elif proposal_threshold is not None:
      given = proposals.read(folder / f"{split}_proposals.csv", threshold=proposal_threshold)
    datasets[split] = loader.KeyframeDataset(keyframes, frames, clip, label_map, given)
  if not datasets:
    raise FileNotFoundError(f"{folder}: neither train.csv nor val.csv")
  return datasets


def _read_tubes(directory: Path, folder: Path, label_map: dict[int, str]) -> TubeGroundTruth:
  """The tubes of a set: one file of all, or one of people for each split."""
  from vad_jax.tubes import read_ground_truth, read_person_tubes

  every = directory / "annotations" / "tubes.json"
  of_people = [path if path.is_file() else None for path in (folder / f"{split}_tubes.json" for split in SPLITS)]
  if every.is_file() or not any(of_people):
    return read_ground_truth(every)
  return read_person_tubes(of_people, label_map)


def _without(rows: Rows, keyframes: set[tuple[str, float]]) -> Rows:
  keep = [keyframe not in keyframes for keyframe in zip(rows.video, rows.timestamp.tolist(), strict=True)]
  return rows.select(np.array(keep, bool))


DATASETS = {
  "synthetic": load_synthetic,
  "ava": load_ava,
  "jhmdb": load_jhmdb,
  "ucf101_24": load_ucf101_24,
  "custom": load_custom,
}
