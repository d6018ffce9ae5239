"""Published weights into our models, strictly: every tensor is used, on an explicit list, or an error.

    python -m vad_jax.convert --input checkpoint.pyth --output weights/evad
    python -m vad_jax.predict --checkpoint weights/evad --video my.mp4

A whole detector becomes a checkpoint like those of training. Weights of a backbone become one that training starts
from (``--config.init_from=weights/videomae``). ``load_reference`` is the same thing in Python.

The name maps live with the models and backbones, pairs of a regular expression on our parameter path and the published
name; ``published.py`` lists the files that they belong to. What is the same for all of them is here: how a leaf is
called and laid out in PyTorch.
"""

import argparse
import ast
import difflib
import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax import checkpoint, models, weight_files
from vad_jax.annotations import PathLike, read_label_map
from vad_jax.layers.position import sincos_positions
from vad_jax.published import BACKBONES, SOURCES, Backbone, Source
from vad_jax.rngs import make_rngs

_LABELS = Path(__file__).parent / "datasets" / "labels"
_CLASSES = {80: "ava_v2.2.pbtxt", 21: "jhmdb.pbtxt", 24: "ucf101_24.pbtxt"}  # that a detector of so many has
_MOST_PROBLEMS = 40  # named in an error


class ConversionError(ValueError):
  """Weights that do not fit the model; the message names the tensors."""


class TensorReport(NamedTuple):
  """What became of one tensor.

  Attributes:
    published: its published name, or several; empty for what the weights lack.
    parameter: our path; empty for what was skipped.
    action: loaded, transposed, merged (several into one), resized, skipped, missing or re-initialised (these two keep
      their initial values).
    shape: of the parameter, or of the tensor that was skipped.
    note: the reason, where it takes one.
  """

  published: str
  parameter: str
  action: str
  shape: tuple[int, ...]
  note: str = ""

  def __str__(self) -> str:
    names = " -> ".join(filter(None, (self.published, self.parameter)))
    return f"{self.action:>14}  {names} {tuple(self.shape)}" + (f": {self.note}" if self.note else "")


class LoadReport(NamedTuple):
  """What became of every published tensor and of every parameter of the model.

  Attributes:
    source: one of ``SOURCES``, or ``vad_jax`` for a checkpoint of ours.
    title: what that is.
    licence: of the published weights.
    tensors: one entry each.
    file: what is known of the file where they were read from one: path, sha256, size and so on.
  """

  source: str
  title: str
  licence: str
  tensors: list[TensorReport]
  file: Mapping[str, str] = {}

  def named(self, action: str) -> list[str]:
    """Published names, or our paths where there are none, of the tensors with this action."""
    return [tensor.published or tensor.parameter for tensor in self.tensors if tensor.action == action]

  def __str__(self) -> str:
    counts = Counter(tensor.action for tensor in self.tensors)
    return f"{self.title}: " + ", ".join(f"{number} {action}" for action, number in counts.most_common())

  def text(self) -> str:
    """The whole report in lines, the summary last."""
    head = {"source": self.source, "licence": self.licence, **self.file}
    return "\n".join([*(f"{name:>14}  {value}" for name, value in head.items()), *map(str, self.tensors), str(self)])

  def to_json(self) -> str:
    """The same for programs."""
    tensors = [tensor._asdict() for tensor in self.tensors]
    return json.dumps({**self._asdict(), "summary": str(self), "tensors": tensors}, indent=1) + "\n"


def load_reference(
  model: nnx.Module,
  weights: Mapping[str, np.ndarray] | PathLike,
  *,
  source: str | None = None,
  reinit_head: bool = False,
  resize_positions: bool = False,
  parts: str | None = None,
) -> LoadReport:
  """Fills a model's parameters in place.

  Args:
    model: a freshly built system or backbone. Weights of a backbone go into ``model.backbone`` of a system, whose other
      parameters keep their initial values.
    weights: published names to arrays in the published layout; or a published file; or a checkpoint of ours. Of another
      system's checkpoint the backbone is taken.
    source: one of ``SOURCES``; None finds it from the names.
    reinit_head: parameters that follow the number of classes keep their initial values where that number differs.
    resize_positions: tables of positions for another size of video are resized.
    parts: regular expression of the paths of parameters to fill, as when a second stage takes the decoder of the first;
      all others keep their values.

  Raises:
    ConversionError: a tensor is missing, left over or of another shape; nothing was changed then.
    WeightFileError: the file cannot be read, or holds no weights.
    CheckpointError: the same of a checkpoint of ours.
  """
  if isinstance(weights, Mapping):
    source, kind, weights = _recognise(weights, source)
    return _fill(model, weights, source, kind, reinit_head, resize_positions, parts)
  if checkpoint.is_checkpoint(weights):
    arrays, info = checkpoint.load_arrays(weights)
    title = builds = info["model"]["name"]
    if parts is None and builds in models.MODELS and not isinstance(model, models.MODELS[builds]):
      title, parts = f"backbone of {builds}", r"backbone\..*"
    arrays = {name: array for name, array in arrays.items() if parts is None or re.fullmatch(parts, name)}
    own = Source(f"{title} of {weights}", info.get("licence", ""), (), (), builds, dict)
    return _fill(model, arrays, "vad_jax", own, reinit_head, resize_positions, parts)
  file = weight_files.read(weights)
  try:
    report = load_reference(
      model,
      file.tensors,
      source=source,
      reinit_head=reinit_head,
      resize_positions=resize_positions,
      parts=parts,
    )
  except ConversionError as error:
    raise ConversionError(f"{weights}: {error}") from error
  return report._replace(file=_describe(file))


def _recognise(weights: Mapping[str, np.ndarray], source: str | None) -> tuple[str, Source, dict[str, np.ndarray]]:
  """Finds out of which kind weights are, and takes prefixes off their names.

  Raises:
    ConversionError: they are of no known kind, or two of them get the same name.
  """
  if source is not None and source not in SOURCES:
    raise ConversionError(f"unknown source {source!r}: choose one of {', '.join(SOURCES)}")
  for name, kind in SOURCES.items() if source is None else [(source, SOURCES[source])]:
    bare = {re.sub(f"^(?:{kind.prefix})", "", key): value for key, value in weights.items()}
    lines = [f"{key} {np.shape(value)}" for key, value in bare.items()]
    if source is None and not all(any(re.fullmatch(mark, line) for line in lines) for mark in kind.marks):
      continue
    if len(bare) < len(weights):
      raise ConversionError(f"some of its {len(weights)} tensors have the same name once {kind.prefix!r} is taken off")
    return name, kind, bare
  first = ", ".join(f"{key} {np.shape(value)}" for key, value in list(weights.items())[:3])
  known = "; ".join(f"{name} ({kind.title})" for name, kind in SOURCES.items())
  raise ConversionError(f"{len(weights)} tensors ({first}, ...) that belong to no known source; known: {known}")


def _fill(
  model: nnx.Module,
  weights: Mapping[str, np.ndarray],
  source: str,
  kind: Source,
  reinit_head: bool,
  resize_positions: bool,
  parts: str | None = None,
) -> LoadReport:
  """Fills a model, or its parts where the weights are for a backbone, from weights with bare names."""
  backbone = BACKBONES.get(kind.builds, Backbone(nnx.Module, homes=()))
  within = any(hasattr(model, home) for home in backbone.homes)
  head = getattr(model, "class_parameters", "")
  entries, problems, values, used = [], [], [], set()
  for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
    parameter, shape = ".".join(map(str, path)), variable.shape
    outside = "no part of the backbone" if within and path[0] not in backbone.homes else ""
    if parts is not None and not re.fullmatch(parts, parameter):
      outside = "not asked for"
    if outside:
      entries.append(TensorReport("", parameter, "missing", shape, outside))
      continue
    names = published_names(path[within:], kind)
    used.update(names)
    published = ", ".join(names)
    absent = [name for name in names if name not in weights]
    note = _reason(kind.may_lack, ".".join(map(str, path[within:])))
    if absent and note:
      entries.append(TensorReport("", parameter, "missing", shape, note))
    elif absent:
      problems.append(f"missing: {', '.join(absent)}, for {parameter} {shape}")
    else:
      pieces = [np.asarray(weights[name]) for name in names]
      transposed = bool(kind.names) and not kind.channels_last and path[-1] == "kernel"
      value, action = _to_our_layout(pieces, shape, transposed=transposed)
      hint = ""
      if value is None and backbone.resize:
        value, action = backbone.resize(str(path[-1]), pieces[0], shape), "resized"
        if value is not None and not resize_positions:
          value, hint = None, "; for another size of video, have positions resized"
      entries.append(TensorReport(published, parameter, action, shape))
      if value is not None:
        values.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
      elif reinit_head and re.fullmatch(head, parameter):
        entries[-1] = entries[-1]._replace(action="re-initialised")
      else:
        if re.fullmatch(head, parameter):
          hint = "; for other classes, have the head re-initialised"
        problems.append(f"shape: {published} {pieces[0].shape} does not fit {parameter} {shape}{hint}")
  left, complaints = _left_over(weights, used, kind, backbone.spare if within else "")
  entries, problems = entries + left, problems + (complaints if parts is None or not kind.names else [])
  if problems:
    lines = "".join(f"\n  {line}" for line in problems[:_MOST_PROBLEMS])
    more = f"\n  and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    raise ConversionError(f"{len(problems)} tensors of {kind.title} do not fit {type(model).__name__}:{lines}{more}")
  nnx.update(model, nnx.from_flat_state(values))
  return LoadReport(source, kind.title, kind.licence, entries)


def _left_over(
  weights: Mapping[str, np.ndarray], used: Set[str], kind: Source, spare: str
) -> tuple[list[TensorReport], list[str]]:
  """What becomes of published tensors that no parameter asks for, and what is wrong with that."""
  entries, problems = [], []
  for name in weights:
    if name in used:
      continue
    shape, reason = np.shape(weights[name]), _reason(kind.skip, name) or _known_positions(weights, name, kind)
    if not reason and re.fullmatch(spare, name):
      reason = "this detector has no part for it"
    original = next((match.expand(other) for p, other in kind.same.items() if (match := re.fullmatch(p, name))), "")
    if not reason and original in weights:
      if not np.array_equal(weights[name], weights[original]):
        problems.append(f"unused: {name} {shape} has other values than {original}, and should be the same tensor")
        continue
      reason = f"the same tensor as {original}"
    if not reason and re.fullmatch(kind.ones, name):
      if not np.all(np.asarray(weights[name]) == 1):
        problems.append(f"unused: {name} {shape} is not one everywhere, and our network has no such scale")
        continue
      reason = "a scale of one everywhere, which our network does not have"
    entries.append(TensorReport(name, "", "skipped", shape, reason))
    if not reason:
      nearest = "".join(f"; nearest is {near}" for near in difflib.get_close_matches(name, used, 1))
      problems.append(f"unused: {name} {shape}, which no parameter asks for{nearest}")
  return entries, problems


def published_names(path: Sequence[Any], kind: Source) -> tuple[str, ...]:
  """Published names of the tensors that make the parameter at a path of ours.

  Raises:
    ConversionError: no rule covers it, since the weights are for another model.
  """
  *parents, leaf = map(str, path)
  if not kind.names:
    return (".".join([*parents, leaf]),)
  ours = ".".join([*parents, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])
  for pattern, name in kind.names:
    if match := re.fullmatch(pattern, ours):
      found = name(match) if callable(name) else name
      parts = (found,) if isinstance(found, str) else found
      return parts if callable(name) else tuple(match.expand(part) for part in parts)
  raise ConversionError(f"weights of {kind.title} have nothing for {ours}: the model is another one")


def _to_our_layout(
  parts: Sequence[np.ndarray], shape: tuple[int, ...], *, transposed: bool
) -> tuple[np.ndarray | None, str]:
  """Stacks the parts; PyTorch kernels ``[out, in, *window]`` become ``[*window, in, out]``.

  Returns:
    The value, None where it does not get that shape, and what was done.
  """
  if len({part.shape[1:] for part in parts}) > 1:
    return None, "merged"
  value, action = (np.concatenate(parts), "merged") if len(parts) > 1 else (parts[0], "loaded")
  if transposed and value.ndim > 1:
    value, action = np.moveaxis(value, (0, 1), (-1, -2)), "transposed" if action == "loaded" else action
  if value.size == math.prod(shape) and value.ndim > len(shape):  # window of a 1x1 convolution, axis of a batch
    value = value.reshape(shape)
  return (value if value.shape == shape else None), action


def _reason(patterns: Mapping[str, str], name: str) -> str:
  """What the first pattern that matches wholly says; empty where none does."""
  return next((reason for pattern, reason in patterns.items() if re.fullmatch(pattern, name)), "")


def _known_positions(weights: Mapping[str, np.ndarray], name: str, kind: Source) -> str:
  """Why a table of positions may be skipped: it is the fixed one. Empty for anything else."""
  if not kind.names or not re.fullmatch(kind.positions, name):
    return ""
  table = np.reshape(weights[name], (-1, np.shape(weights[name])[-1]))
  fixed = np.allclose(table, sincos_positions(*table.shape), atol=1e-4)
  return "the sine-cosine table, which is computed" if fixed else ""


# --- Files ----------------------------------------------------------------------------------------------------------


def convert(
  path: PathLike,
  output: PathLike,
  *,
  source: str | None = None,
  label_map: PathLike | None = None,
  options: Mapping[str, Any] = {},
) -> LoadReport:
  """Turns a published file into a checkpoint of ours, which appears only when it is complete.

  Args:
    path: the file, or a Hugging Face folder.
    output: the directory to make; it holds the report as well, as ``conversion.txt`` and ``conversion.json``.
    source: one of ``SOURCES``; None finds it from the names.
    label_map: names of a detector's classes; None where they are those of AVA, JHMDB51-21 or UCF101-24.
    options: what weights do not tell of their network: arguments of its constructor, such as ``keep_rate``.

  Raises:
    ConversionError: a tensor is missing, left over or of another shape; or the options or classes do not fit.
    WeightFileError: the file cannot be read, or holds no weights.
    FileExistsError: the output exists.
  """
  output = Path(output).absolute()
  if output.exists():
    raise FileExistsError(f"{output} exists already: remove it, or choose another output")
  file = weight_files.read(path)
  try:
    source, kind, weights = _recognise(file.tensors, source)
    arguments = {**kind.arguments({name: np.shape(value) for name, value in weights.items()}), **options}
    make = BACKBONES[kind.builds].make if kind.builds in BACKBONES else models.MODELS[kind.builds]
    model = make(**arguments, rngs=make_rngs(0))
    info = {"model": {"name": kind.builds, **arguments}, "label_map": {}, **kind.info(arguments)}
    if kind.builds in models.MODELS:
      info["label_map"] = _class_names(label_map, arguments["num_classes"])
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    described = {**_describe(file), "model": f"{kind.builds}({given}), all else by default"}
    report = _fill(model, weights, source, kind, reinit_head=False, resize_positions=True)
    report = report._replace(file=described)
  except (ConversionError, TypeError, ValueError) as error:  # a constructor says what is wrong with the options
    raise ConversionError(f"{path}: {error}") from error
  info |= {"source": source, "licence": kind.licence, "sha256": file.sha256, "step": 0, "metrics": {}}
  _, params, rest = checkpoint.split_model(model)
  output.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as unfinished:
    complete = Path(unfinished) / "checkpoint"
    checkpoint.save_inference(complete, params, rest, info)
    (complete / "conversion.txt").write_text(report.text() + "\n", encoding="utf-8")
    (complete / "conversion.json").write_text(report.to_json(), encoding="utf-8")
    complete.rename(output)
  return report


def _class_names(label_map: PathLike | None, num_classes: int) -> dict[int, str]:
  if label_map is None and num_classes not in _CLASSES:
    raise ConversionError(f"the detector knows {num_classes} classes: give their names in a label map that fits")
  names = read_label_map(label_map or _LABELS / _CLASSES[num_classes])
  if max(names) > num_classes:
    raise ConversionError(f"{label_map} names class {max(names)}, and the detector knows {num_classes}")
  return names


def _describe(file: weight_files.WeightFile) -> dict[str, str]:
  container = f"{file.kind}, weights under {file.key!r}" if file.key else file.kind
  return {"file": str(file.path), "container": container, "sha256": file.sha256, "size": f"{file.size:,} bytes"}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.convert",
    description="Turns published weights into a checkpoint for vad_jax, and says what became of every tensor.",
    epilog="sources: " + "; ".join(f"{name}: {kind.title}" for name, kind in SOURCES.items()),
  )
  parser.add_argument("--input", required=True, metavar="FILE", help="published file, or a Hugging Face folder")
  parser.add_argument("--output", required=True, metavar="DIR", help="checkpoint to make; must not exist")
  parser.add_argument("--source", choices=SOURCES, help="what the file is; default: found from the names in it")
  parser.add_argument(
    "--label-map",
    metavar="FILE",
    help="class names of a detector; default: those of AVA, JHMDB51-21 or UCF101-24, by their number",
  )
  parser.add_argument(
    "--option",
    action="append",
    default=[],
    type=_option,
    metavar="NAME=VALUE",
    help="argument of the model that its weights do not tell, such as keep_rate=0.6; may be repeated",
  )
  options = parser.parse_args(arguments)
  try:
    report = convert(
      options.input, options.output, source=options.source, label_map=options.label_map, options=dict(options.option)
    )
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("aborted; nothing was written", file=sys.stderr)
    return 130
  print(report.text())
  print(f"saved to {options.output}")
  return 0


def _option(text: str) -> tuple[str, Any]:
  name, equals, value = text.partition("=")
  if not equals:
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
  try:
    return name, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return name, value


if __name__ == "__main__":
  sys.exit(main())
