"""AVA's CSV, which `vad_jax.predictions.write_csv` writes."""

import collections
from pathlib import Path

import numpy as np

from vad_jax import annotations
from vad_jax.annotations import AnnotationError, PathLike
from vad_jax.interchange.people import UNTRACKED, LabelMap, Person, prediction
from vad_jax.predictions import Action, Prediction


def read_ava(path: PathLike, video: PathLike, label_map: LabelMap | None = None) -> Prediction:
  """Reads an AVA CSV: results, or annotations, of which the last column has whole numbers only.

  A person scores as the best of their actions, and 1 in annotations. Without ids, people are linked by their boxes.

  Args:
    path: the file; may hold other videos as well.
    video: the video, which has to be called like this in the file; times are seconds from its start.
    label_map: names of the actions; by default "class 3" and so on.

  Raises:
    AnnotationError: the file is malformed, does not have the video, or has a class that the label map has not.
    VideoError: the video cannot be read.
  """
  every = annotations.read_ava_csv(path)
  name = Path(video).stem.replace(",", "_")
  rows = every.select(every.video == name)
  if not len(rows.video):
    raise AnnotationError(f"{path}: nothing of {name!r}; it has {', '.join(sorted(set(every.video))[:3]) or 'no row'}")
  names = label_map or {int(index): f"class {index}" for index in rows.action}
  annotated = bool((rows.extra == np.floor(rows.extra)).all())
  with_ids = annotated and rows.extra.max() > 1
  found: dict[float, list[Person]] = collections.defaultdict(list)
  for _, time, box, index, extra in zip(*rows, strict=True):
    people = found[float(time)]
    if not index:
      continue  # the row names a keyframe
    if index not in names:
      raise AnnotationError(f"{path}: class {index} is not in the label map")
    score = 1.0 if annotated else float(extra)
    number = int(extra) if with_ids else UNTRACKED
    people.append(Person(box, score, [Action(int(index), names[index], score)], number))
  return prediction(video, found)
