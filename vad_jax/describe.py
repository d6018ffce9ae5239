"""Says what a config costs before anything runs: parameters, multiply-adds, memory, shapes, beside the paper's figures.

    python -m vad_jax.describe --config configs/evad_vitb.py:keep_rate=0.6,short_side=224 --input 16x224x224
    python -m vad_jax.describe --markdown configs/*.py
    python -m vad_jax.describe --topology v5e:4x4 --config configs/evad_vitb.py

The last says what the training step takes on a slice of TPUs; see ``vad_jax.topology``. For the others, the model is
only traced: no weights exist, and nothing is compiled.

**GMACs** are 10^9 multiply-adds of the forward pass of one clip, which most papers print as GFLOPs. Counted are all
matrix products and convolutions of the traced program (zero padding included), loops as often as they turn (those of
unknown length once), of a condition its dearest branch. There are three counts:

* ``run``: all of that, as our program does it.
* ``exact``: the same for the network as published. RoIAlign (matmuls here, gathers elsewhere) and the sums that tell
  which tokens are important do not count; a convolution that we apply before an enlargement and the official code
  after it (lateral ones of EVAD's pyramid) counts as often as there; a layer that we run for some of its queries (the
  last one of the class queries' encoder for frames that are wanted) counts for all.
* ``paper``: what the authors' counter sees, for comparison with their figure. EVAD's adds five for every element that
  a layer norm gets, and misses the first linear layer of each action classifier of the decoder and the two products
  of the self-attention in localisation layers (its projections count). Where ``vad_jax.papers`` knows no counter of a
  system, this is ``exact``.

**Memory** is an estimate, for operations in the traced order: an array exists from the operation that makes it to the
last one that needs it. Fusion takes less, since many arrays are never made; compilers that change the order or copy
operands take more (XLA on a CPU several times as much for gradients). Inference is one clip: weights, input, and the
most that exists in between at a time. Training is one microbatch on one device that holds all parameters: these (and
their moving average), AdamW's two moments or the one of SGD, the batch, and the most that exists while gradients are
computed, which includes them and what the forward pass keeps for the backward one (less with ``remat``). A batch that
is taken in several microbatches sums their gradients: as much as the parameters once more.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import math
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from absl import flags
from flax import nnx
from jax.extend import core
from ml_collections import config_flags

from vad_jax import models, sharding, topology
from vad_jax.annotations import read_label_map
from vad_jax.batch import Batch, Detections
from vad_jax.checkpoint import split_model
from vad_jax.papers import FREE_OPTIONS, PAPERS, Figure, Paper, Rule, Size
from vad_jax.rngs import make_rngs

Config = Any  # an ml_collections.ConfigDict, whose attributes a type checker cannot know

NUM_CLASSES = {"ava": 80, "synthetic": 80, "jhmdb": 21, "ucf101_24": 24}  # of sets that are the same for everybody
COUNTS = ("exact", "paper", "run")  # see the module's docstring
DEPTHWISE = "depthwise"  # named scope of convolutions that are sums of products of whole arrays
NOT_COUNTED = ("roi_align", "importance")  # named scopes that only ``run`` counts
QUERIES = re.compile(r"(\d+)_of_(\d+)_queries")  # named scope of what is run for so many queries instead of all


def describe(config: Config, size: Size | None = None, *, training: bool = True) -> dict[str, Any]:
  """Describes the model of a config.

  Args:
    config: see ``configs/common.py``.
    size: of the input; None takes the config's clip and canvas.
    training: whether to estimate the memory of training, which takes most of the time.

  Returns:
    What ``--json`` prints: ``model`` and ``input``; ``parts``, by attribute of the model, and their ``total``:
    ``parameters`` and multiply-adds by ``COUNTS``; ``paper``, its ``Figure`` for this model and input or None;
    ``memory`` in bytes; shapes of ``inputs``, ``outputs`` and ``detections``.

  Raises:
    ValueError: the config does not make a model, or the model does not take such an input.
  """
  canvas = config.canvas if isinstance(config.canvas[0], int) else config.canvas[0]  # the first of several
  size = size or (config.clip.num_frames, *canvas)
  model = build(config)
  batch = abstract_batch(config, size)
  jaxpr, detections, out = trace(model, batch)
  parts = _parameters(model)
  for part, counts in multiply_adds(jaxpr, model, PAPERS.get(config.model.name)).items():
    parts.setdefault(part, {"parameters": 0}).update(counts)
  keys = ("parameters", *COUNTS)
  parts = {part: {key: numbers.get(key, 0) for key in keys} for part, numbers in parts.items()}
  figure = next((figure for figure in figures(config) if figure.size == size), None)
  tube = detections.boxes.shape[1:-2]  # (T,) where boxes are [B, T, N, 4]
  _, *state = split_model(model)
  peak = peak_memory(jaxpr, jaxpr.outvars[: len(jax.tree.leaves(detections))])
  memory = {"weights": _tree_bytes(state), "inference": _tree_bytes(state) + _tree_bytes(batch) + peak}
  if training:
    examples = abstract_batch(config, size, clips=config.microbatch or config.batch_size, tube=tube)
    moments = 1 if config.optimizer.name == "sgd" else 2
    memory |= training_memory(model, examples, moments=moments, averaged=config.ema_decay is not None)
  return {
    "model": config.model.to_dict(),
    "input": list(size),
    "parts": parts,
    "total": {key: sum(numbers[key] for numbers in parts.values()) for key in keys},
    "paper": figure and figure._asdict(),
    "memory": memory,
    "inputs": _shapes(abstract_batch(config, size, tube=tube)),
    "outputs": _shapes(out),
    "detections": _shapes(detections._asdict()),
  }


def figures(config: Config) -> list[Figure]:
  """Figures of the paper for the model of a config, for any input."""
  name = config.model.name
  if name not in PAPERS:
    return []
  defaults = {key: value.default for key, value in inspect.signature(models.MODELS[name].__init__).parameters.items()}

  def decisive(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in FREE_OPTIONS and defaults.get(k) != v}

  return [figure for figure in PAPERS[name].figures if decisive(figure.options) == decisive(config.model)]


def build(config: Config) -> Any:
  """The system of a config, without its numbers.

  Raises:
    ValueError: model, options or data set are not known.
  """
  options = {"num_classes": num_classes(config), **config.model}
  try:
    return nnx.eval_shape(lambda: models.build(**options, rngs=make_rngs(0)))
  except TypeError as error:  # an argument that the constructor does not have
    raise ValueError(f"config.model: {error}") from error


def num_classes(config: Config) -> int:
  """Number of classes of the data set.

  Raises:
    ValueError: the set is not known, or is one's own and has not been prepared.
  """
  data = config.data
  if data.name in NUM_CLASSES:
    return NUM_CLASSES[data.name]
  if data.name != "custom":
    raise ValueError(f"config.data.name {data.name!r}: choose one of {', '.join(NUM_CLASSES)}, custom")
  directory = Path(data.root, data.get("directory", "custom"))
  try:
    return max(read_label_map(directory / "annotations" / "label_map.pbtxt"))
  except OSError:
    raise ValueError(
      f"{directory}: no data set here, so the number of classes is not known; prepare it first "
      "(python -m vad_jax.datasets.prepare custom --help)"
    ) from None


def abstract_batch(config: Config, size: Size, *, clips: int = 1, tube: Sequence[int] = ()) -> Batch:
  """Shapes of a batch of ``clips`` examples; ``tube`` is ``(T,)`` where annotations are of every frame."""
  boxes = (*tube, config.max_boxes)
  shapes = {
    "video": ((*size, 3), jnp.uint8),
    "video_size": ((2,), jnp.int32),
    "boxes": ((*boxes, 4), jnp.float32),
    "labels": ((*boxes, num_classes(config)), jnp.float32),
    "box_mask": (boxes, jnp.bool_),
    "key": ((), jnp.int32),
  }
  if config.max_proposals:
    shapes |= {
      "proposals": ((config.max_proposals, 4), jnp.float32),
      "proposal_mask": ((config.max_proposals,), jnp.bool_),
    }
  return cast(Batch, {name: jax.ShapeDtypeStruct((clips, *shape), dtype) for name, (shape, dtype) in shapes.items()})


def trace(model: Any, batch: Batch) -> tuple[core.Jaxpr, Detections, dict[str, Any]]:
  """Traces inference, with every module in a named scope of its path.

  Returns:
    The program, whose first results are the detections; shapes of the detections, and of all that the network returns.
  """
  with _module_scopes(model):
    graphdef, *state = split_model(nnx.view(model, raise_if_not_found=False, deterministic=True))

    def infer(state: list[Any], batch: Batch) -> tuple[Detections, dict[str, Any]]:
      model = nnx.merge(graphdef, *state)
      out = model(batch)
      return model.detections(out, batch), out

    closed, (detections, out) = jax.make_jaxpr(infer, return_shape=True)(state, batch)
  return closed.jaxpr, detections, out


_MODULE = "module:"  # begins the named scope of a module
_PATH = "path_in_model"


@contextlib.contextmanager
def _module_scopes(model: Any) -> Iterator[None]:
  """Meanwhile modules of the model run in named scopes."""

  def scoped(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def call_in_scope(self: Any, *args: Any, **kwargs: Any) -> Any:
      with jax.named_scope(_MODULE + getattr(self, _PATH, "")):
        return call(self, *args, **kwargs)

    return call_in_scope

  calls: dict[Any, Any] = {}
  for path, module in nnx.iter_modules(model):
    setattr(module, _PATH, ".".join(map(str, path)))  # an attribute, since nnx.merge and nnx.remat make new modules
    calls |= {kind: vars(kind)["__call__"] for kind in type(module).__mro__ if "__call__" in vars(kind)}
  try:
    for kind, call in calls.items():
      kind.__call__ = scoped(call)
    yield
  finally:
    for kind, call in calls.items():
      kind.__call__ = call


def multiply_adds(jaxpr: core.Jaxpr, model: Any, paper: Paper | None = None) -> dict[str, dict[str, int]]:
  """Counts multiply-adds by part: attributes of the model, ``NOT_COUNTED``, and ``model`` for what is in none of them.

  Args:
    jaxpr: what ``trace`` returned.
    model: the model that was traced.
    paper: how the authors counted; None counts ``paper`` as ``exact``.
  """
  norm, rules, _ = paper or Paper(0, (), ())
  norms = ((path, module) for path, module in nnx.iter_modules(model) if isinstance(module, nnx.LayerNorm))
  widths = {".".join(map(str, path)): module.num_features for path, module in norms}
  parts: dict[str, dict[str, int]] = {}
  for scopes, times, eqn in _operations(jaxpr):
    path = next((scope.removeprefix(_MODULE) for scope in reversed(scopes) if scope.startswith(_MODULE)), "")
    elementwise = DEPTHWISE in scopes and eqn.primitive.name == "mul"
    run = times * (_aval(eqn.outvars[0]).size if elementwise else _products(eqn))
    left_out = next((scope for scope in scopes if scope in NOT_COUNTED), None)
    rule = Rule("", 0, 0) if left_out else next((r for r in rules if re.fullmatch(r.path, path)), Rule("", 1, 1))
    published = run
    for part, whole in (map(int, match.groups()) for scope in scopes if (match := QUERIES.fullmatch(scope))):
      published = published * whole // part
    added = {"run": run, "exact": published * rule.exact, "paper": published * rule.paper}
    if eqn.primitive.name == "rsqrt" and path in widths:  # the one of each layer norm, an element for each vector
      added["paper"] += norm * times * _aval(eqn.outvars[0]).size * widths[path]
    if any(added.values()):
      counts = parts.setdefault(left_out or path.split(".")[0] or "model", dict.fromkeys(COUNTS, 0))
      counts.update({key: counts[key] + number for key, number in added.items()})
  return parts


def _operations(
  jaxpr: core.Jaxpr, scopes: tuple[str, ...] = (), times: int = 1
) -> Iterator[tuple[tuple[str, ...], int, core.JaxprEqn]]:
  """All operations that hold no others, with their named scopes, outermost first, and how often they run."""
  for eqn in jaxpr.eqns:
    inside = (*scopes, *str(eqn.source_info.name_stack).split("/"))
    bodies = list(core.jaxprs_in_params(eqn.params))
    if not bodies:
      yield inside, times, eqn
    if eqn.primitive.name == "cond":
      bodies = [max(bodies, key=lambda body: sum(n * _products(inner) for _, n, inner in _operations(body)))]
    turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for body in bodies:
      yield from _operations(body, inside, times * turns)


def _products(eqn: core.JaxprEqn) -> int:
  """Multiply-adds of one operation."""
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return _aval(eqn.outvars[0]).size * math.prod(_aval(eqn.invars[0]).shape[axis] for axis in contracted)
  if eqn.primitive.name == "conv_general_dilated":
    kernel, kernel_axes = _aval(eqn.invars[1]), eqn.params["dimension_numbers"].rhs_spec
    return _aval(eqn.outvars[0]).size * kernel.size // kernel.shape[kernel_axes[0]]
  return 0


def peak_memory(jaxpr: core.Jaxpr, results: Sequence[Any] | None = None) -> int:
  """Most bytes that exist at a time of what a program makes; see the module's docstring.

  Args:
    jaxpr: the program; its arguments belong to the caller.
    results: its variables that are wanted, what others need is not computed; None wants all that it returns.
  """
  wanted = {v for v in (jaxpr.outvars if results is None else results) if isinstance(v, core.Var)}
  steps = []
  for eqn in reversed(jaxpr.eqns):
    if not wanted.isdisjoint(eqn.outvars):
      last_used = {v for v in (*eqn.invars, *eqn.outvars) if isinstance(v, core.Var)} - wanted
      wanted |= last_used
      steps.append((eqn, last_used))
  made_here: set[core.Var] = set()
  peak = exists = 0
  for eqn, last_used in reversed(steps):
    made = sum(map(_bytes, eqn.outvars))
    inside = max(map(peak_memory, core.jaxprs_in_params(eqn.params)), default=0)
    # What a call makes is what its body returns; a loop stacks it.
    peak = max(peak, exists + (made + inside if eqn.primitive.name in ("scan", "while") else max(made, inside)))
    made_here.update(eqn.outvars)
    exists += made - sum(_bytes(variable) for variable in last_used & made_here)
  return peak


def training_memory(model: Any, batch: Batch, *, moments: int = 2, averaged: bool = False) -> dict[str, int]:
  """Memory of training, in bytes.

  Args:
    model: the system.
    batch: shapes of one microbatch.
    moments: how many numbers the optimizer keeps for each parameter.
    averaged: whether a moving average of the parameters exists.

  Returns:
    ``microbatch``, its clips; ``training``, everything; of it ``gradients``, ``moments`` of the optimizer, and what the
    forward pass has ``kept`` for the backward one.
  """
  graphdef, params, rest = split_model(nnx.view(model, raise_if_not_found=False, deterministic=False))

  def loss(params: Any, rest: Any, batch: Batch) -> Any:
    model = nnx.merge(graphdef, params, rest)
    out = model(batch, rngs=make_rngs(0))
    costs = jax.eval_shape(model.costs, out, batch)
    return model.loss(out, batch, None if costs is None else jnp.zeros(costs.shape, bool))[0]

  def gradients(params: Any, rest: Any, batch: Batch) -> tuple[Any, Any]:
    value, backward = jax.vjp(lambda params: loss(params, rest, batch), params)
    return backward(jnp.ones_like(value))[0], jax.tree.leaves(backward)

  jaxpr = jax.make_jaxpr(gradients)(params, rest, batch).jaxpr
  count = len(jax.tree.leaves(params))
  kept = {v for v in jaxpr.outvars[count:] if isinstance(v, core.Var)}.difference(jaxpr.invars)
  size, peak = _tree_bytes(params), peak_memory(jaxpr, jaxpr.outvars[:count])
  return {
    "microbatch": len(batch["key"]),
    "gradients": size,
    "kept": sum(map(_bytes, kept)),
    "moments": moments * size,
    "training": _tree_bytes((params, rest, batch)) + (moments + averaged) * size + peak,
  }


def shape_text(value: Any) -> str:
  """Type and shape of an array; those of a list or dictionary of arrays, equal neighbours together."""
  if isinstance(value, Mapping):
    return "{" + ", ".join(f"{name}: {shape_text(item)}" for name, item in value.items()) + "}"
  if isinstance(value, tuple | list):
    runs = [(text, len(list(equal))) for text, equal in itertools.groupby(map(shape_text, value))]
    return "(" + ", ".join(text if count == 1 else f"{count} x {text}" for text, count in runs) + ")"
  return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


def markdown(paths: Sequence[str]) -> str:
  """The table of the README: a row for each config, at the input of its paper's figure where there is one.

  Args:
    paths: config files, with arguments behind a colon or without; left out are files that hold no config, and
      configs for data of one's own, whose size depends on its classes.

  Raises:
    ValueError: a config cannot be read or does not make a model.
  """
  rows = [
    "| Config | Input | Parameters | GMACs | As the paper counts | Paper |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for path in paths:
    config = _read_config(path)
    if config is None or config.data.name == "custom":
      continue
    sizes = (figure.size for figure in figures(config) if figure.size[1] == config.short_side)
    found = describe(config, next(sizes, None), training=False)
    total, paper = found["total"], found["paper"]
    cells = (
      f"`{path}`",
      " x ".join(map(str, found["input"])),
      f"{total['parameters']:,}",
      f"{total['exact'] / 1e9:.2f}",
      f"{total['paper'] / 1e9:.2f}",
      f"{paper['gflops']:g}" if paper and paper["gflops"] else "",
    )
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join(rows)


def on_tpus(config: Config, name: str, size: Size | None = None, minutes: float = 10) -> dict[str, Any]:
  """Describes the training step of a config on a slice of TPUs; see ``vad_jax.topology``.

  Args:
    config: see ``configs/common.py``.
    name: of the slice, such as ``v5e:4x4``.
    size: of the input; None takes the config's clip and its largest canvas.
    minutes: for the search of the largest batch, after the batch of the config was compiled.

  Raises:
    ValueError: slice, batch or config do not go together, or libtpu is not installed.
  """
  canvas = config.canvas if isinstance(config.canvas[0], int) else max(config.canvas, key=math.prod)
  size = size or (config.clip.num_frames, *canvas)
  build(config)  # says what is wrong with the model
  options = {"num_classes": num_classes(config), **config.model}
  tube = size[:1] if config.data.get("tubes", False) else ()
  found = topology.describe_step(
    config,
    sharding.make_mesh(config.mesh.to_dict(), topology.tpu_devices(name)),
    lambda rngs: models.build(**options, rngs=rngs),
    lambda clips: abstract_batch(config, size, clips=clips, tube=tube),
    capacity=topology.MEMORY[name.partition(":")[0]] * 2**30,
    seconds=60 * minutes,
    count=lambda jaxpr: sum(times * _products(eqn) for _, times, eqn in _operations(jaxpr)),
  )
  return {"model": config.model.to_dict(), "input": list(size), "topology": name, **found}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  options, overrides = _parse(arguments)
  jax.config.update("jax_platforms", "cpu")  # tracing needs no accelerator, and is the same on every machine
  try:
    if options.markdown:
      print(markdown(options.markdown))
      return 0
    config = _read_config(options.config)
    if config is None:
      raise ValueError(f"config {options.config}: it defines no get_config")
    config = _override(config, overrides)
    if options.topology:
      description, show = on_tpus(config, options.topology, options.input, options.minutes), topology.show
    else:
      description, show = describe(config, options.input), _print
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1
  if options.json:
    print(json.dumps(description, indent=2))
  else:
    show(description)
  return 0


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Options, and overrides of the config."""
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.describe",
    description="Says what a config costs: parameters, multiply-adds, memory and shapes.",
    epilog="Any key of the config can be overridden: --config.model.keep_rate=0.6",
    allow_abbrev=False,
  )
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--config", help="config file, with arguments: configs/evad_vitb.py:keep_rate=0.6,short_side=224")
  what.add_argument("--markdown", nargs="+", metavar="CONFIG", help="print a table of configs, as in the README")
  parser.add_argument(
    "--input", type=_size, metavar="TxHxW", help="frames, height and width; default: the config's clip and canvas"
  )
  parser.add_argument(
    "--topology",
    metavar="SLICE",
    help="compile the training step for a slice of TPUs, such as v5e:4x4, v6e:16x16 or v5p:8x8x16, without having one "
    "(pip install 'vad_jax[tpu]'); minutes for a large model. Matching is done on the TPU (config.matcher=device)",
  )
  parser.add_argument(
    "--minutes", type=float, default=10.0, help="with --topology: to search the largest batch; default: 10, 0: none"
  )
  parser.add_argument("--json", action="store_true", help="print everything as JSON")
  options, overrides = parser.parse_known_args(arguments)
  if options.markdown and (options.input or options.json or options.topology):
    parser.error("--markdown goes with none of --input, --json, --topology")
  unknown = overrides if options.markdown else [x for x in overrides if x.startswith("-") and x[:9] != "--config."]
  if unknown:
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")
  return options, overrides


def _size(text: str) -> Size:
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
    raise argparse.ArgumentTypeError(f"{text!r} is not frames x height x width, such as 16x288x384")
  frames, height, width = map(int, text.split("x"))
  return frames, height, width


def _read_config(path: str) -> Config | None:
  """The config of ``file.py:arguments``; None where the file is none of a config.

  Raises:
    ValueError: the file cannot be read, or the arguments are wrong.
  """
  file, _, arguments = path.partition(":")
  if not Path(file).is_file():
    raise ValueError(f"config {file}: no such file")
  try:
    get_config = runpy.run_path(file).get("get_config")
    return get_config and get_config(arguments or None)
  except Exception as error:  # whatever the file does
    raise ValueError(f"config {path}: {error}") from error


def _override(config: Config, arguments: Sequence[str]) -> Config:
  """The config with keys set by ``--config.key=value``, as ``vad_jax.main`` sets them.

  Raises:
    ValueError: there is no such key, or the value does not fit it.
  """
  values = flags.FlagValues()
  command = ["describe", *arguments]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
    _, *surplus = values(command)
  except AttributeError as error:  # how ConfigDict says that a key does not exist
    cause = error.args[0]
    key = cause.args[0] if isinstance(cause, KeyError) else cause
    raise ValueError(f"no such config key: {key} (configs/common.py lists all)") from error
  except (flags.Error, KeyError, TypeError) as error:
    raise ValueError(str(error)) from error
  if surplus:
    raise ValueError(f"unexpected argument {surplus[0]!r}")
  return values.config


def _print(description: dict[str, Any]) -> None:
  """Prints tables to the terminal."""
  console = rich.console.Console()
  model, size = description["model"], " x ".join(map(str, description["input"]))
  console.print(f"{' '.join(filter(None, (model['name'], model.get('variant'))))}, one clip of {size}")

  parts = rich.table.Table("part", "parameters", "GMACs", "as the paper counts", "as run here")
  for column in parts.columns[1:]:
    column.justify = "right"
  for name, numbers in {**description["parts"], "total": description["total"]}.items():
    if name == "total":
      parts.add_section()
    parts.add_row(name, f"{numbers['parameters']:,}", *(f"{numbers[count] / 1e9:.2f}" for count in COUNTS))
  console.print(parts)
  if paper := description["paper"]:
    printed = [f"{paper['gflops']:g} GFLOPs"] if paper["gflops"] else []
    printed += [f"{paper['parameters']} parameters"] if paper["parameters"] else []
    printed += [f"{paper['mean_ap']} mAP"] if paper["mean_ap"] else []
    console.print(f"the paper prints {', '.join(printed)}")
  else:
    console.print("the paper prints no figure for this model and input")

  memory = rich.table.Table("memory, estimated", "GiB")
  memory.columns[1].justify = "right"
  clips = description["memory"]["microbatch"]
  for label, key in {
    "weights": "weights",
    "inference of one clip": "inference",
    f"training on {clips} clips at a time": "training",
    "  of it gradients": "gradients",
    "  of it moments of the optimizer": "moments",
    "  of it kept for the backward pass": "kept",
  }.items():
    memory.add_row(label, f"{description['memory'][key] / 2**30:.2f}")
  console.print(memory)
  for kind in ("inputs", "outputs", "detections"):
    console.print(kind)
    for name, text in description[kind].items():
      console.print(f"  {name}: {text}", soft_wrap=True, markup=False, highlight=False)


def _shapes(arrays: Mapping[str, Any]) -> dict[str, str]:
  return {name: shape_text(value) for name, value in arrays.items()}


def _parameters(model: Any) -> dict[str, dict[str, int]]:
  """Number of parameters by attribute of the model, in its order."""
  parts: dict[str, dict[str, int]] = {}
  for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    parts.setdefault(str(path[0]), {"parameters": 0})["parameters"] += parameter.size
  return {name: parts[name] for name in vars(model) if name in parts}


def _aval(variable: Any) -> Any:
  """Shape and type of a traced variable."""
  return variable.aval


def _bytes(variable: Any) -> int:
  return _aval(variable).size * _aval(variable).dtype.itemsize


def _tree_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, also in the middle of a compilation
  sys.exit(main())
