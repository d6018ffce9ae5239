"""Trains and evaluates what a config describes.

    python -m vad_jax.main --config configs/quickstart.py --workdir runs/quickstart

A working directory belongs to one config; a run that was stopped goes on when it is started again. Afterwards
it holds ``checkpoints/``, TensorBoard logs in ``logs/``, ``metrics.json``, ``detections.csv`` (of tubes
``detections.npz`` and ``ground_truth.json``), ``report.html`` and, where the videos of the set lie beside its
records, a held-out one with the detections drawn in ``videos/``. The best checkpoint is the one with the highest
frame-mAP@0.5, of tubes as well.
"""

import functools
import json
import re
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import rich.console
import rich.table
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import config_flags

from vad_jax import (
  checkpoint,
  convert,
  datasets,
  describe,
  logs,
  models,
  optim,
  predict,
  processes,
  sharding,
  visualize,
)
from vad_jax.annotations import write_ava_csv
from vad_jax.datasets.augment import Augment
from vad_jax.datasets.loader import ClipSpec, KeyframeDataset, eval_batches, train_batches
from vad_jax.datasets.tube_clips import TubeDataset
from vad_jax.datasets.video import video_files
from vad_jax.evaluate import Evaluation, TubeEvaluation, evaluate, evaluate_tubes
from vad_jax.metrics.analysis import analyse
from vad_jax.metrics.protocols import PROTOCOLS
from vad_jax.metrics.report import scalars, write_report
from vad_jax.metrics.tube_report import write_tube_report
from vad_jax.metrics.video_map import Dataset as Rules
from vad_jax.metrics.video_map import Protocol as TubeProtocol
from vad_jax.person_boxes import PersonBoxes
from vad_jax.train import PEAK_FLOPS, NonFiniteError, PredictFn, Result, StopRequest, make_predict, train
from vad_jax.tubes import write_detections, write_ground_truth

Config = Any  # an ml_collections.ConfigDict, whose attributes a type checker cannot know
Dataset = KeyframeDataset | TubeDataset

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with arguments: configs/evad_vitb.py:tiny")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and results go")
_MODE = flags.DEFINE_enum("mode", "train_and_evaluate", ["train", "evaluate", "train_and_evaluate"], "What to do")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Work with the other processes of a TPU, Slurm or GKE job")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "The same elsewhere: host:port of process 0, for all alike")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: the number of this process, from 0 up")
_PROFILE = flags.DEFINE_bool("profile", False, "Trace steps 6 to 10 after the start, for TensorBoard's profiler")

_EXPECTED = (ValueError, OSError, NonFiniteError, jax.errors.JaxRuntimeError)
_NUM_MAPS = 4  # shown in the report
# Keys that may change between the runs of a working directory: they have no effect on what is learnt.
_FREE_KEYS = (
  "eval.",
  "log.",
  "checkpoint.",
  "mesh.",
  "sharding",
  "workers",
  "data.root",
  "data.workers",
  "matcher",
  "nonfinite",
)


def main(argv: list[str]) -> int:
  """Runs the command line; returns the exit code."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  begun = time.perf_counter()
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells its whole life otherwise
  by_hand = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  distributed = _DISTRIBUTED.value or by_hand != (None, None, None)
  try:
    if distributed:
      processes.join(*by_hand)
    code = _run(begun)
  except Exception as error:
    code = 1
    if isinstance(error, _EXPECTED) and logging.get_verbosity() <= logging.INFO:
      print(f"error: {_one_line(error)} (--v=1 shows where)", file=sys.stderr)
    elif distributed:
      traceback.print_exc()
    else:
      raise
  if code and distributed:
    processes.leave(code)
  return code


def _run(begun: float) -> int:
  try:
    stopped = run(_CONFIG.value, Path(str(_WORKDIR.value)), _MODE.value, begun)
  except KeyboardInterrupt:
    print("aborted; a run goes on from its last checkpoint when it is started again", file=sys.stderr)
    return 130
  if stopped:
    print(f"{stopped}: all is saved; the same command goes on from here", file=sys.stderr)
  return 130 if stopped == "interrupted" else 0


def run(config: Config, workdir: Path, mode: str, begun: float) -> str:
  """Does what the mode says; returns why training was stopped early, if it was.

  Args:
    config: see ``configs/common.py``.
    workdir: made where it is missing.
    mode: ``train``, ``evaluate`` or ``train_and_evaluate``.
    begun: ``time.perf_counter()`` of the start, for the time in all.

  Raises:
    ValueError: the config does not fit itself, the devices, the data or the working directory.
    OSError: the working directory cannot be written.
  """
  weights = workdir if (workdir / "checkpoints").is_dir() else config.init_from
  if mode == "evaluate" and not weights:
    raise FileNotFoundError(f"workdir {workdir} holds no checkpoints to evaluate; train first, or set config.init_from")
  _protocol(config)
  for name, path in (("--workdir", workdir), ("config.data.root", config.data.root)):
    if re.match(r"\w\w+:/", str(path)):
      raise ValueError(f"{name} {str(path)!r} is in a bucket: mount it and give the path there (docs/tpu.md)")
  mesh = sharding.make_mesh(config.mesh.to_dict())
  if config.matcher == "scipy" and mesh.devices.flat[0].platform == "tpu":
    raise ValueError("config.matcher 'scipy' would stop the TPU in every step to ask the host: take 'device'")
  _claim(workdir, config)
  local_batch = sharding.local_batch_size(config.batch_size, mesh)
  sets = _load_data(config, mode)
  numbers: dict[str, Any] = {}
  if mode != "evaluate":
    result = _train(config, workdir, mesh, local_batch, sets, with_evaluation=mode == "train_and_evaluate")
    if result.stopped or mode == "train":
      return result.stopped
    if result.steps:  # none where a run that had come to its end is started again
      numbers = {
        "train_seconds": result.train_seconds,
        "compile_seconds": result.compile_seconds,
        "steps_per_second": result.steps / result.train_seconds,
      }
    weights = workdir
  loaded = checkpoint.load_model(weights)
  graphdef, params, rest = checkpoint.split_model(loaded.model)
  # From host memory, since devices of another process take nothing from those of this one.
  host = jax.tree.map(np.asarray, (params, rest))
  placed = jax.device_put(host, sharding.infer_sharding(host, mesh))
  with jax.set_mesh(mesh), StopRequest() as stop:
    predict_fn = functools.partial(jax.jit(make_predict(graphdef)), *placed)
    evaluation = _evaluate(config, mesh, local_batch, sets["val"], loaded.info["label_map"], predict_fn, stop)
  if evaluation is None:
    return stop.reason
  if jax.process_index() == 0:
    numbers = {
      **evaluation.metrics,
      "step": loaded.info["step"],
      "parameters": sum(x.size for x in jax.tree.leaves(params)),
      **numbers,
      "peak_memory_mb": _peak_memory(),
      "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
    }
    _write_results(workdir, config, loaded, sets, evaluation, numbers, begun)
  return ""


def _claim(workdir: Path, config: Config) -> None:
  """Makes the working directory and notes the config in it, or checks that it is the one that was noted.

  Raises:
    OSError: the directory cannot be written.
    ValueError: it belongs to another config; names the keys that differ.
  """
  path = workdir / "config.json"
  text = config.to_json_best_effort(indent=2)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0 and not any((workdir / "checkpoints").glob("*/*")):
      path.write_text(text)  # nothing has been learnt here yet
    with (workdir / f".writable_{jax.process_index()}").open("w") as probe:
      Path(probe.name).unlink()
  except OSError as error:
    raise OSError(f"workdir {workdir} cannot be written: {error.strerror}") from error
  multihost_utils.sync_global_devices("config")
  before, now = _flatten(json.loads(path.read_text())), _flatten(json.loads(text))
  differing = [
    f"{key} ({before.get(key, 'absent')} before, {now.get(key, 'absent')} now)"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key) and not key.startswith(_FREE_KEYS)
  ]
  if differing:
    raise ValueError(
      f"workdir {workdir} belongs to a run of another config: {'; '.join(differing)}. "
      "Take another workdir, or remove this one"
    )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
  return flat


def _protocol(config: Config) -> Any:
  """How detections are scored.

  Raises:
    ValueError: the protocol is not known, other settings are not for tubes, or the model is not.
  """
  tubes = config.data.get("tubes", False)
  if tubes != config.model.get("tubes", False):
    raise ValueError(
      f"config.data.tubes is {tubes} and config.model.tubes is not: a system for keyframes learns from keyframes, "
      "one for tubes from tubes"
    )
  known = get_args(TubeProtocol) if tubes else tuple(PROTOCOLS)
  protocol = config.eval.protocol or ("class_query" if tubes else "activitynet")
  if protocol not in known:
    raise ValueError(f"config.eval.protocol {protocol!r}: of {'tubes' if tubes else 'keyframes'} {', '.join(known)}")
  if tubes and (config.eval.actor_threshold or config.eval.score_threshold):
    raise ValueError(
      "config.eval.actor_threshold and .score_threshold are for keyframes: of tubes all detections count"
    )
  return protocol


def _load_data(config: Config, mode: str) -> dict[str, Dataset]:
  """Opens the data set; the first process prepares what is missing, the others wait for it.

  Raises:
    ValueError: the set lacks a split that the mode needs.
  """
  kwargs = config.data.to_dict()
  load: Any = functools.partial(
    datasets.load, kwargs.pop("name"), kwargs.pop("root"), clip=ClipSpec(**config.clip), **kwargs
  )
  sets = load() if jax.process_index() == 0 else {}
  multihost_utils.sync_global_devices("data")
  sets = sets or load()
  for part, split, other in (("train", "train", "evaluate"), ("evaluate", "val", "train")):
    if part in mode and split not in sets:
      raise ValueError(
        f"{_directory(next(iter(sets.values())))} has no {split} split, only {', '.join(sets)}: prepare it with "
        f"{split} as well (see data/README.md), or run with --mode={other}"
      )
  return sets


def _directory(dataset: Dataset) -> Path:
  """The folder of the set; its frames are in `records/<split>/` or `videos/<split>/`."""
  frames: Any = dataset.frames
  return frames.directory.parents[1]


def _train(
  config: Config,
  workdir: Path,
  mesh: Mesh,
  local_batch: int,
  sets: dict[str, Dataset],
  *,
  with_evaluation: bool,
) -> Result:
  """Trains from the last checkpoint, or from the start."""
  steps_per_epoch = max(len(sets["train"]) // config.batch_size, 1)
  num_steps = config.num_steps or round(config.num_epochs * steps_per_epoch)
  schedule = optim.make_schedule(**config.schedule, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
  model = {**config.model.to_dict(), "num_classes": sets["train"].num_classes}
  canvas, short_side = _canvas(config, training=False)
  info = {
    "model": model,
    "clip": config.clip.to_dict(),
    "canvas": np.reshape(canvas, (-1, 2)).max(axis=0).tolist(),  # the largest, where there are several
    "short_side": short_side,
    "label_map": sets["train"].label_map,
    "data": config.data.to_dict(),
  }

  def make_batches(start: int) -> Any:
    options = {"seed": config.seed, "start": start, "augment": Augment(**config.augment)}
    return train_batches(sets["train"], batch_size=local_batch, **options, **_loading(config, training=True))

  def load_weights(system: Any) -> None:
    options = {"reinit_head": config.reinit_head, "resize_positions": config.resize_positions}
    starts = [(config.init_from, None)]
    if config.init_transformer_from:
      if not hasattr(system, "transformer_parameters"):
        raise ValueError(f"config.init_transformer_from: {config.model.name} is not trained in two stages")
      starts.append((config.init_transformer_from, system.transformer_parameters))
    reports = [convert.load_reference(system, source, parts=parts, **options) for source, parts in starts if source]
    for report in reports:
      print(f"starting from {report}", file=sys.stderr, flush=True)
    if jax.process_index() == 0:
      (workdir / "init_from.txt").write_text("\n\n".join(report.text() for report in reports) + "\n")

  def evaluate_during(step: int, predict_fn: PredictFn, should_stop: Any) -> dict[str, float] | None:
    label_map = sets["train"].label_map
    result = _evaluate(config, mesh, local_batch, sets["val"], label_map, predict_fn, should_stop)
    if result is None:
      return None
    if jax.process_index() == 0:
      writer.write_images(step, {"eval/found": logs.picture(sets["val"], result.detections, label_map)})
    if isinstance(result, TubeEvaluation):
      return result.metrics
    analysis = analyse(result.ground_truth, result.detections, label_map, protocol=_protocol(config))
    return {**scalars(analysis), **result.metrics}

  with (
    checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
    logs.open_writer(workdir / "logs", _flatten(config.to_dict())) as writer,
  ):
    return train(
      lambda rngs: models.build(**model, rngs=rngs),
      make_batches,
      num_steps=num_steps,
      make_optimizer=functools.partial(optim.make_optimizer, learning_rate=schedule, **config.optimizer),
      learning_rate=schedule,
      mesh=mesh,
      checkpoints=checkpoints,
      info=info,
      writer=writer,
      sharding=config.sharding,
      matcher=config.matcher,
      microbatch=config.microbatch,
      ema_decay=config.ema_decay,
      nonfinite=config.nonfinite,
      seed=config.seed,
      load_weights=load_weights if config.init_from or config.init_transformer_from else None,
      log_every=config.log.every_steps,
      save_every=config.checkpoint.every_steps,
      evaluate_every=round(config.eval.every_epochs * steps_per_epoch),
      evaluate=evaluate_during if with_evaluation else None,
      peak_steps_per_second=_peak_steps_per_second(config, mesh),
      profile=str(workdir / "logs") if _PROFILE.value else None,
    )


def _peak_steps_per_second(config: Config, mesh: Mesh) -> float | None:
  """Steps that the devices could do at their peak; None where that is not known.

  A step counts as three times the operations of the forward pass of its clips, on the largest canvas.
  """
  peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
  if peak is None or jax.process_index() > 0:
    return None
  height, width = np.reshape(config.canvas, (-1, 2)).max(axis=0).tolist()
  size = (config.clip.num_frames, height, width)
  multiply_adds = describe.describe(config, size, training=False)["total"]["exact"]
  return peak * mesh.size / (3 * 2 * multiply_adds * config.batch_size)


def _loading(config: Config, *, training: bool) -> dict[str, Any]:
  """Arguments that training and evaluation batches both take."""
  canvas, short_side = _canvas(config, training=training)
  return {
    "canvas": canvas,
    "short_side": short_side,
    "max_boxes": config.max_boxes,
    "max_proposals": config.max_proposals,
    "workers": config.workers,
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
  }


def _canvas(config: Config, *, training: bool) -> tuple[Any, int | None]:
  """The canvas, or several, and the short side of frames on it; None where they are stretched to fill it."""
  if config.resize not in ("short_side", "stretch"):
    raise ValueError(f"config.resize {config.resize!r}: choose short_side or stretch")
  canvas, short_side = config.canvas, config.short_side
  if not training:
    canvas, short_side = config.eval.canvas or canvas, config.eval.short_side or short_side
  return canvas, short_side if config.resize == "short_side" else None


def _evaluate(
  config: Config,
  mesh: Mesh,
  local_batch: int,
  dataset: Dataset,
  label_map: dict[int, str],
  predict_fn: PredictFn,
  should_stop: Any = None,
) -> Evaluation | TubeEvaluation | None:
  if label_map != dataset.label_map:
    raise ValueError("the classes of the checkpoint are not those of the data set")
  batches = eval_batches(dataset, batch_size=local_batch, **_loading(config, training=False))
  protocol = _protocol(config)
  if isinstance(dataset, TubeDataset):
    return evaluate_tubes(
      predict_fn, dataset, batches, mesh=mesh, protocol=protocol, rules=_rules(config), should_stop=should_stop
    )
  return evaluate(
    predict_fn,
    dataset,
    batches,
    label_map,
    mesh=mesh,
    protocol=protocol,
    score=config.eval.score,
    actor_threshold=config.eval.actor_threshold,
    score_threshold=config.eval.score_threshold,
    should_stop=should_stop,
  )


def _rules(config: Config) -> Any:
  """Whose rules the protocol of class queries takes; JHMDB's, which know several actions at once, for other sets."""
  if _protocol(config) != "class_query":
    return None
  return config.data.name if config.data.name in get_args(Rules) else "jhmdb"


def _peak_memory() -> float:
  """Most memory of this process so far, and of its first accelerator where that is more, in MB."""
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
  device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1024**2
  return max(host, device)


def _write_results(
  workdir: Path,
  config: Config,
  loaded: checkpoint.Loaded,
  sets: dict[str, Dataset],
  evaluation: Evaluation | TubeEvaluation,
  numbers: dict[str, Any],
  begun: float,
) -> None:
  """Writes detections, an annotated video, the report and the numbers, and says where they are."""
  source = _held_out_video(sets["val"])
  seen = hasattr(loaded.model, "maps")
  people = _given_people(sets["val"], source.stem) if source and hasattr(loaded.model, "takes_proposals") else None
  shown = source and predict.predict_video(
    loaded, source, workdir / "videos", boxes=people, stride=1.0 if people else 0.25, save_maps=seen
  )
  video, maps = (shown.video, shown.maps) if shown else (None, None)
  pictures = sorted(maps.glob("*.png")) if maps else []
  numbers = {**numbers, "wall_seconds": time.perf_counter() - begun}
  page = {
    "title": workdir.resolve().name,
    "metrics": numbers,
    "train_counts": _boxes_by_class(sets["train"]) if "train" in sets else None,
    "video": video,
    "maps": pictures[:: max(1, len(pictures) // _NUM_MAPS)][:_NUM_MAPS],
    "config": json.loads(config.to_json_best_effort()),
  }
  if isinstance(evaluation, TubeEvaluation):
    ap, files = _write_tubes(workdir, config, evaluation, page)
  else:
    ap, files = _write_keyframes(workdir, config, sets["val"], evaluation, page)
  (workdir / "metrics.json").write_text(json.dumps({**numbers, **ap}, indent=2) + "\n")
  table = rich.table.Table(title=f"{config.model.name} on {config.data.name}", show_header=False)
  for name, value in numbers.items():
    table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
  rich.console.Console().print(table)
  for name, path in {
    "checkpoints": workdir / "checkpoints",
    "report": workdir / "report.html",
    "annotated video": video or f"python -m vad_jax.predict --checkpoint {workdir} --video FILE",
    **files,
    "numbers": workdir / "metrics.json",
    "TensorBoard": f"tensorboard --logdir {workdir / 'logs'}",
  }.items():
    print(f"{name:>15}: {path}")  # not in the table, which would cut long ones


def _write_keyframes(
  workdir: Path, config: Config, dataset: Any, evaluation: Evaluation, page: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Writes detections and report; returns AP by class, and what to say about the files."""
  label_map, protocol = dataset.label_map, _protocol(config)
  write_ava_csv(workdir / "detections.csv", evaluation.detections)
  write_report(
    workdir / "report.html",
    analyse(evaluation.ground_truth, evaluation.detections, label_map, protocol=protocol),
    label_map=label_map,
    facts={"protocol": protocol, "data set": config.data.name},
    frames=lambda video, time: visualize.upscale(dataset.frames.frames(video, [time])[0]),
    warnings=evaluation.frame_map.differences(),
    **page,
  )
  ap = {label_map[index]: value for index, value in evaluation.frame_map.ap.items() if np.isfinite(value)}
  return {"ap": ap}, {"detections": workdir / "detections.csv"}


def _write_tubes(
  workdir: Path, config: Config, evaluation: TubeEvaluation, page: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The same of tubes. Detections and ground truth are files that ``vad_jax.evaluate`` scores alike."""
  detections, truth = workdir / "detections.npz", workdir / "ground_truth.json"
  write_detections(detections, evaluation.detections)
  write_ground_truth(truth, evaluation.ground_truth)
  result, rules = evaluation.video_map, _rules(config)
  write_tube_report(workdir / "report.html", result, facts={"data set": config.data.name}, **page)
  command = f"python -m vad_jax.evaluate --detections {detections} --ground-truth {truth} --protocol {result.protocol}"
  ap = {
    name: {label: value for label, value in zip(result.labels, by_iou[0.5].tolist(), strict=True) if np.isfinite(value)}
    for name, by_iou in (("ap", result.frame_ap), ("video_ap", result.video_ap))
  }
  return ap, {"detections": detections, "scored again by": f"{command} --dataset {rules}" if rules else command}


def _boxes_by_class(dataset: Dataset) -> dict[int, int]:
  """Annotated boxes of each class; of tubes the number of tubes."""
  if isinstance(dataset, TubeDataset):
    videos = dict.fromkeys(clip.video for clip in dataset.clips)
    found = [tube.label + 1 for name in videos for tube in dataset.truth.videos[name].tubes]
    return {index: found.count(index) for index in dataset.label_map}
  labels = sum((keyframe.labels.sum(0) for keyframe in dataset.keyframes), np.zeros(dataset.num_classes))
  return {index: int(labels[index - 1]) for index in dataset.label_map}


def _given_people(dataset: Dataset, video: str) -> PersonBoxes:
  """The proposals of a video."""
  found = {time: boxes for (name, time), boxes in (dataset.proposals or {}).items() if name == video}
  times = sorted(found)
  scores = [np.ones(len(found[time]), np.float32) for time in times]
  return PersonBoxes("the data set", np.array(times), [found[time] for time in times], scores)


def _held_out_video(dataset: Dataset) -> Path | None:
  """The video file of the example in the middle, beside the folder that its frames are read from."""
  frames: Any = dataset.frames
  for parent in frames.directory.absolute().parents:
    if (parent / "videos" / "val").is_dir():
      return video_files(parent / "videos" / "val").get(dataset.place(len(dataset) // 2)[0])
  return None


def _parse_flags(argv: list[str]) -> list[str]:
  """Reads the command line; what is wrong with it, or with the config file, is said in one line."""
  try:
    return flags.FLAGS(argv)
  except AttributeError as error:  # how ConfigDict says that a key does not exist
    cause = error.args[0]
    text = cause.args[0] if isinstance(cause, KeyError) else str(cause)
    sys.exit(f"error: no such config key: {' '.join(text.split())} (configs/common.py lists all)")
  except (flags.Error, KeyError, TypeError, ValueError) as error:
    lines = str(error).strip().splitlines()
    if any(line.strip().startswith("Traceback") for line in lines):  # raised by the config file
      lines = [lines[-1].strip().removeprefix("ValueError: ")]
    sys.exit(f"error: {' '.join(lines)}")


def _one_line(error: Exception) -> str:
  if processes.is_loss(error):
    return f"another process stopped or cannot be reached; its own output says why ({str(error).splitlines()[0]})"
  if isinstance(error, jax.errors.JaxRuntimeError):
    return str(error).splitlines()[0]
  return " ".join(str(error).split())


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=_parse_flags)
