"""Writes a model, detection head included, as a file that runs without this library.

    python -m vad_jax.export --checkpoint runs/evad_vitb --format stablehlo --output evad.stablehlo
    python -m vad_jax.export --checkpoint runs/evad_vitb --format saved_model --output evad_saved_model

``stablehlo`` is one file that ``jax.export.deserialize`` reads and JAX alone runs, on CPU, CUDA GPUs and TPUs;
``saved_model`` is a folder that TensorFlow runs and TF Serving serves. Beside it, at the same path with ``.json``
behind, stands what a caller has to know: names, shapes and types of inputs and outputs, how clips are cut and frames
are prepared, the class names, and how far from the original the numbers may be.

Height and width are fixed. The number of clips in a batch is open, and they are run one after the other, unless
``--batch`` fixes it: then they are run at once.
"""

import argparse
import functools
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export as jax_export
from jax.extend.mlir.dialects import stablehlo

from vad_jax import __version__, checkpoint
from vad_jax.datasets.loader import ClipSpec

Arrays = dict[str, Any]

PLATFORMS = ("cpu", "cuda", "tpu")
# Largest absolute difference of a box coordinate or a score from the model in this library; float32 on a CPU.
TOLERANCE = 1e-4
_CANVAS_MULTIPLE = 32
_LARGEST_STABLEHLO = 2**31 - 2**24  # bytes of weights; the file's format counts bytes with 32 bits

_MEANINGS = {
  "video": "RGB frames of a clip, zero right of and below the picture",
  "video_size": "height and width in pixels of the picture in the frames",
  "proposals": "person boxes in the keyframe: x1, y1, x2, y2 in [0, 1] of the picture",
  "proposal_mask": "false for slots of proposals that hold no person",
  "proposal_score": "probability that a proposal is a person; returned as actor_score",
  "boxes": "x1, y1, x2, y2 in [0, 1] of the picture; several boxes of one person are possible, see nms of predict",
  "actor_score": "probability that the box holds a person",
  "action_score": "probability of each action; place k is the class with id k + 1 of label_map",
  "valid": "false for slots that hold no detection",
}


class Program(NamedTuple):
  """What is exported.

  Attributes:
    exported: what ``jax.export`` made of the model: a function of weights, and of inputs by name, which returns the
      fields of `Detections` by name. All inputs and outputs have a batch axis.
    weights: pytree of arrays.
  """

  exported: jax_export.Exported
  weights: Any

  @property
  def inputs(self) -> Arrays:
    """Shapes and types by name."""
    return jax.tree.unflatten(self.exported.in_tree, self.exported.in_avals)[0][1]

  @property
  def outputs(self) -> Arrays:
    """Shapes and types by name."""
    return jax.tree.unflatten(self.exported.out_tree, self.exported.out_avals)


def export_model(
  loaded: checkpoint.Loaded,
  form: str,
  output: str | Path,
  *,
  size: tuple[int, int] | None = None,
  batch: int | None = None,
  people: int = 32,
) -> Path:
  """Writes a model and its description.

  Args:
    loaded: the model.
    form: one of ``FORMATS``.
    output: the file or folder to write; its description is written beside it.
    size: height and width of the frames, multiples of 32; None takes those of training.
    batch: number of clips; None leaves it open.
    people: slots for given boxes of one clip, for a system that takes them.

  Returns:
    Path of the description.

  Raises:
    ValueError: the model does not take frames of that size, or is too large for the format.
    OSError: the output exists, or cannot be written.
  """
  output = Path(output)
  description = output.with_name(output.name + ".json")
  for path in (output, description):
    if path.exists():
      raise FileExistsError(f"{path}: exists already; remove it or choose another --output")
  canvas = _canvas(loaded.info, size)
  output.parent.mkdir(parents=True, exist_ok=True)
  program = make_program(loaded, canvas, batch=batch, people=people)
  FORMATS[form](program, output)
  text = json.dumps(describe(loaded.info, form, program), indent=2, ensure_ascii=False)
  description.write_text(text + "\n", encoding="utf-8")
  return description


def make_program(
  loaded: checkpoint.Loaded, canvas: tuple[int, int], *, batch: int | None = None, people: int = 32
) -> Program:
  """Traces a model for frames of a height and width; the other arguments are those of `export_model`."""
  graphdef, *weights = checkpoint.split_model(loaded.model)

  def detect(weights: Any, inputs: Arrays) -> Arrays:
    model = nnx.merge(graphdef, *weights)
    clips: Any = {**inputs, "key": jnp.zeros(len(inputs["video"]), jnp.int32)}
    return model.detections(model(clips), clips)._asdict()

  def detect_one_by_one(weights: Any, inputs: Arrays) -> Arrays:
    batches_of_one = jax.tree.map(lambda x: x[:, None], inputs)
    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(functools.partial(detect, weights), batches_of_one))

  shapes = {"video": ((loaded.info["clip"]["num_frames"], *canvas, 3), jnp.uint8), "video_size": ((2,), jnp.int32)}
  if getattr(loaded.model, "takes_proposals", False):
    shapes |= {
      "proposals": ((people, 4), jnp.float32),
      "proposal_mask": ((people,), jnp.bool_),
      "proposal_score": ((people,), jnp.float32),
    }
  clips = batch or jax_export.symbolic_shape("batch")[0]
  inputs = {name: jax.ShapeDtypeStruct((clips, *shape), dtype) for name, (shape, dtype) in shapes.items()}
  # Models count the clips of a batch; an open number is neither that, nor what all operations of TensorFlow take.
  run = jax.jit(detect if batch else detect_one_by_one)
  return Program(jax_export.export(run, platforms=PLATFORMS)(weights, inputs), weights)


def describe(info: checkpoint.Info, form: str, program: Program) -> dict[str, Any]:
  """Says what a caller of an exported model has to know, see the module's docstring."""
  clip, (height, width) = info["clip"], program.inputs["video"].shape[2:4]
  scaling = f"Stretch them to {height} x {width} pixels."
  if side := info["short_side"]:
    scaling = (
      f"Scale them, bilinear, so that the short side has {side} pixels, or that they fit {height} x {width} where they "
      "would be larger; place them top left in black frames of that size."
    )
  return {
    "format": form,
    **({"platforms": PLATFORMS} if form == "stablehlo" else {}),
    "model": info["model"],
    **{key: info[key] for key in ("source", "licence", "sha256") if key in info},
    "versions": {"vad_jax": __version__, "jax": jax.__version__},
    "inputs": _describe_arrays(program.inputs),
    "outputs": _describe_arrays(program.outputs),
    "label_map": info["label_map"],
    "clip": {**clip, "seconds_from_keyframe": ClipSpec(**clip).times(0.0).round(6).tolist()},
    "preprocessing": [
      "Take the frames nearest to the times of the clip, the first or last frame where the video has none.",
      scaling,
      "Leave pixels as 8-bit RGB: the model normalises them. video_size is height and width of the scaled picture.",
    ],
    "tolerance": {
      "absolute": TOLERANCE,
      "of": "boxes and scores in float32 on a CPU, against the model in vad_jax; of candidates that score the same to "
      "the last digits another one may be chosen",
    },
  }


def write_stablehlo(program: Program, output: Path) -> None:
  """Writes the program with its weights in it as ``jax.export`` serialises it."""
  size = sum(x.nbytes for x in jax.tree.leaves(program.weights))
  if size > _LARGEST_STABLEHLO:
    raise ValueError(f"{size / 1e9:.1f} GB of weights do not fit a StableHLO file (2 GB); use --format saved_model")
  whole = jax.jit(lambda inputs: program.exported.call(program.weights, inputs))
  output.write_bytes(jax_export.export(whole, platforms=PLATFORMS)(program.inputs).serialize())


def write_saved_model(program: Program, output: Path) -> None:
  """Writes a SavedModel whose signature ``serving_default`` has the names of inputs and outputs."""
  import tensorflow as tf
  from tensorflow.compiler.tf2xla.python import xla

  exported = program.exported
  # TensorFlow is older than JAX, and reads the StableHLO of its own time.
  version = stablehlo.get_version_from_compatibility_requirement(stablehlo.StablehloCompatibilityRequirement.WEEK_12)
  code = stablehlo.deserialize_portable_artifact_str(exported.mlir_module_serialized)
  code = stablehlo.serialize_portable_artifact_str(code, version)

  def tf_shape(x: Any) -> list[int | None]:
    return [n if isinstance(n, int) else None for n in x.shape]

  def detect(**given: Any) -> dict[str, Any]:
    arguments = [*module.weights, *jax.tree.leaves(given)]
    found: Any = xla.call_module(
      [arguments[index] for index in exported.module_kept_var_idx],
      version=exported.calling_convention_version,
      module=code,
      Sout=[tf_shape(x) for x in exported.out_avals],
      Tout=[x.dtype for x in exported.out_avals],
      platforms=[platform.upper() for platform in exported.platforms],
    )
    return jax.tree.unflatten(exported.out_tree, found)

  weights: Any = jax.device_get(jax.tree.leaves(program.weights))
  module: Any = tf.Module()
  module.weights = [tf.Variable(x, trainable=False) for x in weights]
  module.detect = tf.function(detect, autograph=False)
  specs = {name: tf.TensorSpec(tf_shape(x), x.dtype, name=name) for name, x in program.inputs.items()}
  tf.saved_model.save(module, str(output), signatures={"serving_default": module.detect.get_concrete_function(**specs)})


FORMATS: dict[str, Callable[[Program, Path], None]] = {
  "stablehlo": write_stablehlo,
  "saved_model": write_saved_model,
}


def _canvas(info: checkpoint.Info, size: tuple[int, int] | None) -> tuple[int, int]:
  """Height and width of the frames.

  Raises:
    ValueError: they are not what the model takes.
  """
  trained = tuple(info["canvas"])
  if size is None or size == trained:
    return trained
  if info["short_side"] is None:
    raise ValueError(f"--size: the model takes frames stretched to {trained[0]}x{trained[1]} only")
  if any(side % _CANVAS_MULTIPLE for side in size):
    raise ValueError(f"--size {size[0]}x{size[1]}: height and width must be multiples of {_CANVAS_MULTIPLE}")
  return size


def _describe_arrays(arrays: Arrays) -> list[dict[str, Any]]:
  return [
    {
      "name": name,
      "shape": [n if isinstance(n, int) else str(n) for n in x.shape],
      "dtype": x.dtype.name,
      "meaning": _MEANINGS[name],
    }
    for name, x in arrays.items()
  ]


# --- command line -------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  options = _parse(arguments)
  jax.config.update("jax_platforms", "cpu")  # the program must not depend on what this machine has
  try:
    loaded = checkpoint.load_model(options.checkpoint)
    settings = {"size": options.size, "batch": options.batch, "people": options.people}
    description = export_model(loaded, options.format, options.output, **settings)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{options.output}\n{description}")
  return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.export", description="Writes a model as a file that runs without this library."
  )
  parser.add_argument("--checkpoint", required=True, help="run directory, checkpoint, or `quickstart`")
  parser.add_argument("--format", required=True, choices=FORMATS, help="what runs it: JAX alone, or TensorFlow")
  parser.add_argument("--output", required=True, type=Path, help="file to write, of saved_model a folder")
  parser.add_argument("--size", type=_size, metavar="HxW", help="of the frames in pixels; default: those of training")
  parser.add_argument("--batch", type=_count, metavar="N", help="clips at once; default: any number")
  parser.add_argument(
    "--people",
    type=_count,
    default=32,
    metavar="N",
    help="slots for person boxes of a clip, for a system that classifies given ones; default: %(default)s",
  )
  return parser.parse_args(arguments)


def _size(text: str) -> tuple[int, int]:
  found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
  if found is None:
    raise argparse.ArgumentTypeError(f"{text!r} is not a height and width such as 288x512")
  return int(found[1]), int(found[2])


def _count(text: str) -> int:
  if not re.fullmatch(r"[1-9]\d*", text):
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
  return int(text)


if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, also in the middle of a compilation
  sys.exit(main())
