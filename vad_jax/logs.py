"""What a run writes to TensorBoard: CLU's writer, hyperparameters, pictures of what was found."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vad_jax import visualize
from vad_jax.annotations import Rows
from vad_jax.tubes import TubeDetections

_NUM_PICTURES = 4
_NUM_BOXES = 5  # on a picture, those with the highest scores
_NUM_ACTIONS = 2  # of a box


@contextlib.contextmanager
def open_writer(directory: Path, hyperparameters: Mapping[str, Any]) -> Iterator[Any]:
  """CLU's writer, which writes files in the first process only; TensorFlow, which it needs, is kept off accelerators.

  Args:
    directory: of the logs.
    hyperparameters: are written first; numbers and strings as they are, anything else as text.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf
  from clu import metric_writers

  tf.config.set_visible_devices([], "GPU")
  writer = metric_writers.create_default_writer(str(directory), just_logging=jax.process_index() > 0)
  try:
    writer.write_hparams({k: v if isinstance(v, int | float | str) else str(v) for k, v in hyperparameters.items()})
    yield writer
  finally:
    writer.close()


def read_scalars(directory: str | Path) -> dict[str, list[tuple[int, float]]]:
  """Reads what a run has logged so far, to draw it without TensorBoard (and without TensorFlow).

  Args:
    directory: ``logs`` in the run's working directory.

  Returns:
    Steps and values by name, such as ``eval/frame_map_50`` and ``train/loss``, in order of the steps; what a run that
    was killed did again counts once.

  Raises:
    FileNotFoundError: there are no logs.
  """
  from tensorboard.compat.proto import event_pb2
  from tensorboard.compat.tensorflow_stub import errors
  from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
  from tensorboard.util import tensor_util

  files = sorted(Path(directory).glob("events.out.tfevents.*"))
  if not files:
    raise FileNotFoundError(f"{directory}: no logs of a run there")
  values: dict[str, dict[int, float]] = {}
  for file in files:
    reader = PyRecordReader_New(str(file))
    # The last record may be cut short where a run was killed, or is still being written.
    with contextlib.suppress(errors.OutOfRangeError, errors.DataLossError):
      while True:
        reader.GetNext()
        event = event_pb2.Event.FromString(reader.record())  # pyright: ignore[reportAttributeAccessIssue]
        for value in event.summary.value:
          if value.metadata.plugin_data.plugin_name == "scalars":
            values.setdefault(value.tag, {})[event.step] = float(tensor_util.make_ndarray(value.tensor))
  return {name: sorted(steps.items()) for name, steps in values.items()}


def picture(dataset: Any, found: Rows | TubeDetections, label_map: Mapping[int, str]) -> np.ndarray:
  """Some keyframes, evenly over the set, with what was annotated (dashed) and found there.

  Args:
    dataset: a `vad_jax.datasets.loader.ClipDataset`; of tubes, middle frames of clips are shown.
    found: detections in it.
    label_map: class id to name.

  Returns:
    ``[1, H, W, 3]`` uint8 RGB.
  """
  frames = []
  for index in np.linspace(0, len(dataset) - 1, min(_NUM_PICTURES, len(dataset))).astype(int):
    example = dataset.example(index)
    middle = len(example["video"]) // 2
    boxes, mask = (example[name][middle] if dataset.tubes else example[name] for name in ("boxes", "box_mask"))
    frame = visualize.upscale(example["video"][middle])
    frame = visualize.draw_detections(frame, boxes[mask], [()] * mask.sum(), dashed=True)
    if isinstance(found, Rows):
      video, time = dataset.place(index)
      here = found.select((found.video == video) & (found.timestamp == time))
      boxes, captions = _best(here.boxes, here.action, here.extra, label_map)
    else:
      boxes, captions = _best(*_of_frame(found, dataset, index, middle), label_map)
    frames.append(visualize.draw_detections(frame, boxes, captions))
  return visualize.contact_sheet([frames[::2], frames[1::2]])[None]


def _of_frame(found: TubeDetections, dataset: Any, index: int, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Boxes in [0, 1], action ids and scores of a frame of a clip: one of each for each box and action."""
  video, numbers = dataset.clips[index]
  rows = np.flatnonzero((found.video == found.videos.index(video)) & (found.frame == numbers[frame]))
  height, width = dataset.truth.videos[video].size
  row, action = np.nonzero(np.isfinite(found.scores[rows]))
  boxes = found.boxes[rows, 0] / (width, height, width, height)
  return boxes[row], action + 1, found.scores[rows][row, action]


def _best(
  boxes: np.ndarray, action: np.ndarray, score: np.ndarray, label_map: Mapping[int, str]
) -> tuple[np.ndarray, list[list[str]]]:
  """The boxes to draw, each with its best actions."""
  captions: dict[tuple[float, ...], list[str]] = {}
  for row in np.argsort(-score, kind="stable"):
    box = tuple(boxes[row].tolist())
    if box in captions or len(captions) < _NUM_BOXES:
      captions.setdefault(box, []).append(f"{label_map[int(action[row])]} {score[row]:.2f}")
  return np.array(list(captions)), [lines[:_NUM_ACTIONS] for lines in captions.values()]
