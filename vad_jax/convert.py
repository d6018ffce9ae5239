"""Published weights into our models, strictly: every tensor is used, on an explicit list, or an error.

    python -m vad_jax.convert --input checkpoint.pyth --output weights/evad
    python -m vad_jax.predict --checkpoint weights/evad --video my.mp4

A whole detector becomes a checkpoint like those of training. Weights of a backbone become one that training starts
from (``--config.init_from=weights/videomae``). ``load_reference`` is the same thing in Python.

The name maps live with the models and backbones: pairs of a regular expression on our parameter path and the published
name. What is the same for all of them is here: how a leaf is called and laid out in PyTorch.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax import checkpoint, models, weight_files
from vad_jax.annotations import PathLike, read_label_map
from vad_jax.backbones import hiera, mvit, vit
from vad_jax.layers.position import sincos_positions
from vad_jax.models import evad

Name = str | tuple[str, ...]  # several published tensors are stacked along their first axis
NameRules = Sequence[tuple[str, Name | Callable[[re.Match[str]], Name]]]


class Source(NamedTuple):
  """How one kind of published file names its tensors, and what they are.

  Attributes:
    title: what it is, in words.
    licence: of the published weights.
    marks: patterns that all have to occur among the ``name (shape)`` of a file of this kind.
    names: rules from our path (with PyTorch's leaf names) to published names; the first that matches wholly counts.
    builds: what the weights are for: a name in ``models.MODELS`` or ``BACKBONES``.
    arguments: from the shapes of the published tensors to the arguments of its constructor.
    prefix: pattern of what stands before the names in some files.
    skip: patterns of published names that no model needs, with the reason.
    may_lack: patterns of our paths that the file need not have, with what becomes of them.
    positions: pattern of published tables of positions, which must be those that we compute.
    info: what inference has to know beside the model, see ``checkpoint.Loaded``.
  """

  title: str
  licence: str
  marks: tuple[str, ...]
  names: NameRules
  builds: str
  arguments: Callable[[Mapping[str, Sequence[int]]], dict[str, Any]]
  prefix: str = ""
  skip: Mapping[str, str] = {}
  may_lack: Mapping[str, str] = {}
  positions: str = "pos_embed"
  info: Mapping[str, Any] = {}


BACKBONES = {"vit": vit.ViT, "mvit": mvit.MViT, "hiera": hiera.Hiera}
# From our path and a published table of positions to the table for another size, or None where it is no such table.
RESIZES: dict[str, Callable[[str, np.ndarray, Sequence[int]], np.ndarray | None]] = {
  "mvit": mvit.resize_table,
  "hiera": hiera.resize_table,
}
AVA_CLASSES = Path(__file__).parent / "datasets" / "labels" / "ava_v2.2.pbtxt"
_MOST_PROBLEMS = 40  # named in an error

_NON_COMMERCIAL = "CC-BY-NC 4.0: no commercial use"
_CLASSIFIER = "classifies whole clips"
_RECONSTRUCTION = {r"(decoder|encoder_to_decoder)\..*|mask_token": "reconstructs masked pixels"}
_VIDEOMAE = Source(
  "VideoMAE ViT, fine-tuned",
  _NON_COMMERCIAL,
  (r"patch_embed\.proj\.weight \(\d+, 3, \d+, \d+, \d+\)", r"blocks\.0\.attn\.q_bias .*"),
  vit.REFERENCE_NAMES,
  "vit",
  vit.reference_arguments,
  prefix=r"((module|model|backbone|encoder)\.)*",
  skip={r"(head|fc_norm)\.(weight|bias)": _CLASSIFIER},
  may_lack={r"norm\.(scale|bias)": "not in these files, which normalise the mean of tokens; starts as 1 and 0"},
)

_HIERA = Source(
  "Hiera for video",
  _NON_COMMERCIAL,
  (r"pos_embed_spatial .*", r"pos_embed_temporal .*"),
  hiera.REFERENCE_NAMES,
  "hiera",
  hiera.reference_arguments,
  skip={r"head\.projection\.(weight|bias)": _CLASSIFIER},
)

# A file is of the first kind whose marks it has.
SOURCES = {
  "evad": Source(
    "EVAD detector",
    _NON_COMMERCIAL,
    (r"det_head\.s0_headseries\.0\.inst_interact\.dynamic_layer\.weight .*",),
    evad.REFERENCE_NAMES,
    "evad",
    evad.reference_arguments,
    skip={r"criterion\.empty_weight": "a constant of the loss"},
    info={"clip": {"num_frames": 16, "frame_stride": 4, "fps": 30.0}, "canvas": (288, 512), "short_side": 288},
  ),
  "videomae_hf": _VIDEOMAE._replace(
    title="VideoMAE ViT in Hugging Face layout",
    marks=(r"encoder\.layer\.0\.attention\.attention\.query\.weight .*",),
    names=vit.HUGGING_FACE_NAMES,
    prefix=r"(videomae\.)?",
    skip={r"(classifier|fc_norm)\.(weight|bias)": _CLASSIFIER, **_RECONSTRUCTION},
    positions=r"(embeddings\.)?position_embeddings",
  ),
  "videomae_pretrained": _VIDEOMAE._replace(
    title="VideoMAE ViT, pre-trained only",
    marks=(*_VIDEOMAE.marks, r"encoder_to_decoder\.weight .*"),
    skip=_RECONSTRUCTION,
    may_lack={},
  ),
  "videomae_v2": _VIDEOMAE._replace(
    title="VideoMAE V2 ViT, distilled on Kinetics-710", marks=(*_VIDEOMAE.marks, r"head\.weight \(710, \d+\)")
  ),
  "videomae": _VIDEOMAE,
  "mvit": Source(
    "MViTv2 of PySlowFast",
    "Apache 2.0",
    (r"blocks\.0\.attn\.rel_pos_t .*", r"patch_embed\.proj\.weight .*"),
    mvit.REFERENCE_NAMES,
    "mvit",
    mvit.reference_arguments,
    skip={r"head\.projection\.(weight|bias)": _CLASSIFIER},
  ),
  "mvit_torchvision": Source(
    "MViTv2 of torchvision",
    "BSD 3-Clause",
    (r"blocks\.0\.attn\.rel_pos_t .*", r"conv_proj\.weight .*"),
    mvit.TORCHVISION_NAMES,
    "mvit",
    mvit.reference_arguments,
    skip={r"head\.1\.(weight|bias)": _CLASSIFIER},
  ),
  "hiera_pretrained": _HIERA._replace(
    title="Hiera for video, pre-trained only",
    marks=(*_HIERA.marks, r"encoder_norm\.weight .*"),
    names=hiera.PRETRAINED_NAMES,
    skip={r"(decoder_|multi_scale_fusion_heads\.).*|mask_token": "reconstructs masked pixels"},
  ),
  "hiera": _HIERA,
}


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
) -> LoadReport:
  """Fills a model's parameters in place.

  Args:
    model: a freshly built system or backbone. Weights of a backbone go into ``model.backbone`` of a system, whose other
      parameters keep their initial values.
    weights: published names to arrays in the published layout; or a published file; or a checkpoint of ours.
    source: one of ``SOURCES``; None finds it from the names.
    reinit_head: parameters that follow the number of classes keep their initial values where that number differs.
    resize_positions: tables of positions for another size of video are resized.

  Raises:
    ConversionError: a tensor is missing, left over or of another shape; nothing was changed then.
    WeightFileError: the file cannot be read, or holds no weights.
    CheckpointError: the same of a checkpoint of ours.
  """
  if isinstance(weights, Mapping):
    source, kind, weights = _recognise(weights, source)
    return _fill(model, weights, source, kind, reinit_head, resize_positions)
  if checkpoint.is_checkpoint(weights):
    arrays, info = checkpoint.load_arrays(weights)
    builds = info["model"]["name"]
    own = Source(f"{builds} of {weights}", info.get("licence", ""), (), (), builds, dict)
    return _fill(model, arrays, "vad_jax", own, reinit_head, resize_positions)
  file = weight_files.read(weights)
  try:
    report = load_reference(
      model, file.tensors, source=source, reinit_head=reinit_head, resize_positions=resize_positions
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
) -> LoadReport:
  """Fills a model, or its backbone where the weights are for one, from weights with bare names."""
  within = kind.builds in BACKBONES and hasattr(model, "backbone")
  head = getattr(model, "class_parameters", "")
  entries, problems, values, used = [], [], [], set()
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    parameter, shape = ".".join(map(str, path)), variable.shape
    if within and path[0] != "backbone":
      entries.append(TensorReport("", parameter, "missing", shape, "no part of the backbone"))
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
      parts = [np.asarray(weights[name]) for name in names]
      value, action = _to_our_layout(parts, shape, is_kernel=bool(kind.names) and path[-1] == "kernel")
      hint = ""
      if value is None and kind.builds in RESIZES:
        value, action = RESIZES[kind.builds](str(path[-1]), parts[0], shape), "resized"
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
        problems.append(f"shape: {published} {parts[0].shape} does not fit {parameter} {shape}{hint}")
  for name in weights:
    if name not in used:
      shape, reason = np.shape(weights[name]), _reason(kind.skip, name) or _known_positions(weights, name, kind)
      entries.append(TensorReport(name, "", "skipped", shape, reason))
      if not reason:
        nearest = "".join(f"; nearest is {near}" for near in difflib.get_close_matches(name, used, 1))
        problems.append(f"unused: {name} {shape}, which no parameter asks for{nearest}")
  if problems:
    lines = "".join(f"\n  {line}" for line in problems[:_MOST_PROBLEMS])
    more = f"\n  and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    raise ConversionError(f"{len(problems)} tensors of {kind.title} do not fit {type(model).__name__}:{lines}{more}")
  nnx.update(model, nnx.from_flat_state(values))
  return LoadReport(source, kind.title, kind.licence, entries)


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
  parts: Sequence[np.ndarray], shape: tuple[int, ...], *, is_kernel: bool
) -> tuple[np.ndarray | None, str]:
  """Stacks the parts; PyTorch kernels ``[out, in, *window]`` become ``[*window, in, out]``.

  Returns:
    The value, None where it does not get that shape, and what was done.
  """
  if len({part.shape[1:] for part in parts}) > 1:
    return None, "merged"
  value, action = (np.concatenate(parts), "merged") if len(parts) > 1 else (parts[0], "loaded")
  if is_kernel and value.ndim > 1:
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
    label_map: names of a detector's classes; None where they are those of AVA.
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
    make = BACKBONES[kind.builds] if kind.builds in BACKBONES else models.MODELS[kind.builds]
    model = make(**arguments, rngs=nnx.Rngs(0))
    info = {"model": {"name": kind.builds, **arguments}, "label_map": {}, **kind.info}
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
  names = read_label_map(label_map or AVA_CLASSES)
  if (label_map is None and num_classes != 80) or max(names) > num_classes:
    raise ConversionError(f"the detector knows {num_classes} classes: give their names in a label map that fits")
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
  parser.add_argument("--label-map", metavar="FILE", help="class names of a detector; default: those of AVA")
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
