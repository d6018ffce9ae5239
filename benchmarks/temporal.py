"""Does a detector use motion, or does it read actions off single frames?

    python benchmarks/temporal.py --checkpoint runs/quickstart

Scores the held-out videos four times: with clips as they are, with their frames shuffled, with the keyframe
in place of every frame, and with time reversed. The keyframe always stays where it is, so people can be
found as before. If the classes that are motions hardly lose, the data or the model does not test action
detection.

The model was never trained on such clips, so a part of each loss comes from input that it does not know;
classes that one frame shows (stand, sit, bend) tell how large that part is.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import rich.console
import rich.table

from vad_jax import checkpoint, datasets, sharding
from vad_jax.batch import Batch
from vad_jax.datasets.loader import ClipSpec, KeyframeDataset, eval_batches
from vad_jax.evaluate import Evaluation, evaluate
from vad_jax.train import make_predict

MOTION = {7, 10, 14, 69}  # jump, run, walk, wave: one frame looks like stand, or like a raised hand
STILL = {1, 11, 12}  # bend, sit, stand

Order = Callable[[int, int], np.ndarray]  # number of frames, number of the clip -> which frame to show when


def intact(num_frames: int, clip: int) -> np.ndarray:
  return np.arange(num_frames)


def shuffled(num_frames: int, clip: int) -> np.ndarray:
  """Another order for each clip, the keyframe in its place."""
  order = np.arange(num_frames)
  others = np.delete(order, num_frames // 2)
  order[others] = np.random.default_rng(clip).permutation(others)
  return order


def keyframe_only(num_frames: int, clip: int) -> np.ndarray:
  return np.full(num_frames, num_frames // 2)


def time_reversed(num_frames: int, clip: int) -> np.ndarray:
  """Mirrored at the keyframe; where the clip holds no frame as late, its last one is repeated."""
  return np.minimum(2 * (num_frames // 2) - np.arange(num_frames), num_frames - 1)


ORDERS: dict[str, Order] = {
  "intact": intact,
  "shuffled": shuffled,
  "keyframe only": keyframe_only,
  "reversed": time_reversed,
}


def reorder(batches: Iterable[Batch], order: Order) -> Iterator[Batch]:
  """Shows the frames of every clip in another order."""
  for batch in batches:
    frames = np.stack([order(batch["video"].shape[1], int(key) + 1) for key in batch["key"]])
    yield {**batch, "video": np.take_along_axis(batch["video"], frames[:, :, None, None, None], axis=1)}


def open_validation_set(info: checkpoint.Info) -> KeyframeDataset:
  """The validation set that the checkpoint's run was evaluated on."""
  if "data" not in info:
    raise checkpoint.CheckpointError("the checkpoint does not say which data it was trained on")
  return datasets.load(**info["data"], clip=ClipSpec(**info["clip"]))["val"]


def score(loaded: checkpoint.Loaded, dataset: KeyframeDataset, batch_size: int) -> dict[str, Evaluation]:
  """Evaluates the set with each order of frames."""
  mesh = sharding.make_mesh({"data": 1}, jax.local_devices()[:1])
  graphdef, params, rest = checkpoint.split_model(loaded.model)
  predict_fn = functools.partial(jax.jit(make_predict(graphdef)), params, rest)
  results = {}
  for name, order in ORDERS.items():
    batches = eval_batches(
      dataset,
      batch_size=batch_size,
      canvas=tuple(loaded.info["canvas"]),
      short_side=loaded.info["short_side"],
      max_boxes=max(len(keyframe.boxes) for keyframe in dataset.keyframes),
    )
    with jax.set_mesh(mesh):
      result = evaluate(predict_fn, dataset, reorder(batches, order), loaded.info["label_map"], mesh=mesh)
    assert result is not None  # nobody asks it to stop
    results[name] = result
  return results


def mean_ap(result: Evaluation, classes: Iterable[int]) -> float:
  """Mean over those of the classes that have ground truth."""
  return float(np.nanmean([result.frame_map.ap.get(index, np.nan) for index in classes]))


def table(results: dict[str, Evaluation], label_map: dict[int, str]) -> rich.table.Table:
  """Scores in percent: one column for each order, one row for each class."""
  sheet = rich.table.Table("", *results, title="AP at IoU 0.5, in percent")

  def add(name: str, values: Iterable[float]) -> None:
    sheet.add_row(name, *(f"{100 * value:.1f}" for value in values))

  for metric in ("frame_map_50", "person_ap_50"):
    add(metric, (result.metrics[metric] for result in results.values()))
  add("motion classes", (mean_ap(result, MOTION) for result in results.values()))
  add("still classes", (mean_ap(result, STILL) for result in results.values()))
  sheet.add_section()
  for index, value in results["intact"].frame_map.ap.items():
    if np.isfinite(value):
      mark = " (motion)" if index in MOTION else ""
      add(label_map[index] + mark, (result.frame_map.ap[index] for result in results.values()))
  return sheet


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", required=True, help="run directory, checkpoint, or `quickstart`")
  parser.add_argument("--batch-size", type=int, default=8)
  options = parser.parse_args()
  try:
    loaded = checkpoint.load_model(options.checkpoint)
    results = score(loaded, open_validation_set(loaded.info), options.batch_size)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  rich.console.Console().print(table(results, loaded.info["label_map"]))
  before, after = (mean_ap(results[name], MOTION) for name in ("intact", "keyframe only"))
  used = after < before / 2
  print(
    f"motion classes: {100 * before:.1f} with all frames, {100 * after:.1f} with the keyframe alone: "
    + ("motion is used" if used else "motion is NOT used, or hardly")
  )
  return 0 if used else 1


if __name__ == "__main__":
  sys.exit(main())
