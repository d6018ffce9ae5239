"""What the training step takes of every chip of a TPU slice, found out without a TPU.

    python -m vad_jax.describe --topology v5e:4x4 --config configs/evad_vitb.py

The step that ``vad_jax.train`` runs is compiled ahead of time by the compiler for TPUs, which the package ``libtpu``
brings along (``pip install vad_jax[tpu]``). It needs neither a TPU nor a network. Of systems that match, the matcher
``device`` is part of the step; ``scipy`` would call the host in the middle of it, and is refused.

**Memory** is what the compiler set aside. **FLOPs** are two for every multiply-add of the matrix products and
convolutions of the traced step, of all chips together: forward and backward pass, and what ``remat`` computes again.
**Bytes accessed** are the compiler's own estimate for one chip, which takes the body of a loop once. **Collectives**
are those of the compiled program, as often as loops turn; their bytes are what a chip gives or gets, whichever is more.
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich.console
import rich.table
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vad_jax import optim
from vad_jax.batch import Batch
from vad_jax.sharding import AXES, local_batch_size
from vad_jax.train import compile_step, make_train_step, prepare

Config = Any  # an ml_collections.ConfigDict, whose attributes a type checker cannot know

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBIC}  # that exist, up to 1,024 chips
MEMORY = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}  # GiB of a chip that the compiler gives to programs
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# The library would otherwise ask a metadata server what machine this is, write logs, and lock out other processes.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_LOG_DIR": "disabled",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str) -> Sequence[Any]:
  """The chips of a slice, to compile for.

  Raises:
    ValueError: there is no such slice, or libtpu is not installed.
  """
  kind, _, layout = topology.partition(":")
  if layout not in SLICES.get(kind, ()):
    known = "; ".join(f"{kind}:{', '.join(layouts)}" for kind, layouts in SLICES.items())
    raise ValueError(f"topology {topology!r}: choose one of {known}")
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("libtpu is not installed, which compiles for TPUs: pip install 'vad_jax[tpu]'")
  os.environ.update(_ENVIRONMENT)
  return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def describe_step(
  config: Config,
  mesh: Mesh,
  make_model: Callable[[Any], Any],
  make_batch: Callable[[int], Batch],
  *,
  capacity: float,
  seconds: float,
  count: Callable[[Any], int],
) -> dict[str, Any]:
  """Compiles the training step of a config, and looks for the largest batch.

  Args:
    config: see ``configs/common.py``.
    mesh: of the chips to compile for.
    make_model: builds the system from random numbers.
    make_batch: shapes of a batch of so many clips.
    capacity: bytes that a chip has for a program.
    seconds: for the search.
    count: multiply-adds of a jaxpr.

  Returns:
    What ``--json`` prints: ``chips``, ``batch_size``, ``clips_at_once`` on a chip; ``flops``, ``bytes_accessed`` and
    ``collectives``, see the module's docstring, the last two None where the step does not fit; ``memory`` in bytes,
    where it does not fit ``total`` and ``capacity`` alone; of clips at once that ``largest`` number that ``fits``, and
    the least that ``fails``.

  Raises:
    ValueError: the batch does not divide, or the step cannot be compiled.
  """
  if config.matcher != "device":
    raise ValueError(f"config.matcher {config.matcher!r} runs on the host; for TPUs take --config.matcher=device")
  local_batch_size(config.batch_size, mesh)
  begun = time.monotonic()
  step = _compile(config, mesh, make_model, make_batch(config.batch_size), config.microbatch)
  took = time.monotonic() - begun
  memory, rows = step.memory, config.batch_size // mesh.size
  at_once = min(config.microbatch or rows, rows)

  def memory_of(clips: int) -> int:
    return _compile(config, mesh, make_model, make_batch(clips * mesh.size), None).memory["total"]

  known = {at_once: memory["total"]} if at_once == rows else {}
  if "arguments" in memory:
    known[0] = memory["arguments"] + memory["program"]  # next to nothing of it is the batch
  fits, fails = largest_batch(memory_of, capacity, known, seconds, took)
  return {
    "chips": mesh.size,
    "batch_size": config.batch_size,
    "clips_at_once": at_once,
    "flops": 2 * count(step.jaxpr),
    "bytes_accessed": step.bytes_accessed,
    "collectives": step.collectives,
    "memory": {**memory, "capacity": int(capacity)},
    "largest": {"fits": fits, "fails": fails},
  }


class _Step(NamedTuple):
  """A compiled step; ``memory`` holds nothing but the total where there is too little."""

  jaxpr: Any
  memory: dict[str, int]
  bytes_accessed: float | None = None
  collectives: dict[str, dict[str, int]] | None = None


def _compile(
  config: Config, mesh: Mesh, make_model: Callable[[Any], Any], batch: Batch, microbatch: int | None
) -> _Step:
  """Compiles the step that ``vad_jax.main`` would run.

  Raises:
    ValueError: the compiler refuses it, for other reasons than memory.
  """
  # The length of the training is nothing but numbers in the program.
  schedule = optim.make_schedule(**config.schedule, num_steps=1000, steps_per_epoch=100)
  rows = NamedSharding(mesh, PartitionSpec(AXES))
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
  print(f"{len(batch['key'])} clips on {mesh.size} chips: ", end="", file=sys.stderr)
  with jax.set_mesh(mesh), _backend_of(mesh):
    graphdef, optimizer, state, _ = prepare(
      make_model,
      functools.partial(optim.make_optimizer, learning_rate=schedule, **config.optimizer),
      mesh,
      config.sharding,
      config.ema_decay is not None,
      config.seed,
    )
    train_step = make_train_step(
      graphdef,
      optimizer,
      schedule,
      seed=config.seed,
      matcher=config.matcher,
      microbatch=microbatch,
      ema_decay=config.ema_decay,
      skip=config.nonfinite == "skip",
    )
    jaxpr = jax.make_jaxpr(train_step)(state, batch).jaxpr
    try:
      compiled, _ = compile_step(train_step, state, batch)
    except jax.errors.JaxRuntimeError as error:
      needed = _bytes_needed(str(error))
      print(f"too large: {needed / 2**30:.2f} GiB", file=sys.stderr, flush=True)
      return _Step(jaxpr, {"total": needed})
  analysis = compiled.memory_analysis()
  memory = {
    "arguments": analysis.argument_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    "program": analysis.generated_code_size_in_bytes,
  }
  memory["total"] = sum(memory.values())
  print(f"{memory['total'] / 2**30:.2f} GiB on a chip", file=sys.stderr, flush=True)
  return _Step(jaxpr, memory, compiled.cost_analysis()["bytes accessed"], collectives(compiled.as_text()))


@contextlib.contextmanager
def _backend_of(mesh: Mesh) -> Iterator[None]:
  """Meanwhile layers, which ask ``jax.default_backend`` what is fast here, hear of the devices of the mesh."""
  ours, theirs = jax.default_backend, mesh.devices.flat[0].platform
  jax.default_backend = lambda: theirs
  try:
    yield
  finally:
    jax.default_backend = ours


def _bytes_needed(message: str) -> int:
  """Bytes that a program would take, of the compiler's message that a chip has not as many.

  Raises:
    ValueError: the message says something else.
  """
  used = re.search(r"RESOURCE_EXHAUSTED.*?\bhbm\b.*?([\d.]+)([KMGT])\b", message, re.IGNORECASE | re.DOTALL)
  if used is None:
    raise ValueError(f"the step cannot be compiled for these chips: {message}")
  return int(float(used[1]) * 1024 ** (1 + "KMGT".index(used[2])))


def largest_batch(
  memory_of: Callable[[int], int], capacity: float, known: Mapping[int, int], seconds: float, took: float
) -> tuple[int, int | None]:
  """Looks for the most clips that fit a chip: a straight line through the last figures tells what to try next.

  Args:
    memory_of: bytes that so many clips take; slow.
    capacity: bytes that there are.
    known: bytes for numbers of clips that are known already; 0 for what does not depend on them.
    seconds: no other attempt is begun that would end later if it took as long as the last one.
    took: seconds that the last one took.

  Returns:
    The largest number found that fits, 0 where none does, and the smallest that does not; None where it is not known.
  """
  tried = dict(known)
  end = time.monotonic() + seconds
  stride = 1  # grows, since where memory is scarce the compiler finds ways to take less than the line says
  while True:
    fits = max((clips for clips, size in tried.items() if size <= capacity), default=0)
    fails = min((clips for clips, size in tried.items() if clips and size > capacity), default=None)
    now = time.monotonic()
    if fails == fits + 1 or now + took > end:
      return fits, fails
    guess = 2 * fits or 1
    if len(tried) > 1:
      (a, size_a), (b, size_b) = sorted(tried.items(), key=lambda item: abs(item[1] - capacity))[:2]
      slope = max((size_b - size_a) / (b - a), 1.0)
      guess = int(a + (capacity - size_a) / slope)
    clips = min(max(guess, fits + stride), (fails or 4 * fits + 2) - 1)
    tried[clips] = memory_of(clips)
    stride = 2 * stride if tried[clips] <= capacity else 1
    took = time.monotonic() - now


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_SHAPE = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(calls|to_apply|body|\w+_computations?)=\{?((?:%?[\w.\-]+(?:, )?)+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


def collectives(hlo: str) -> dict[str, dict[str, int]]:
  """Counts the collective operations of a compiled program.

  Args:
    hlo: its text, of one device.

  Returns:
    By kind how often they run, and their bytes; see the module's docstring. Loops of unknown length count once.
  """
  sizes: dict[str, float] = {}  # bytes of every value
  bodies: dict[str, list[tuple[str, ...]]] = {}
  limits: dict[str, list[int]] = {}  # of conditions
  entry = name = ""
  for line in hlo.splitlines():
    if instruction := _INSTRUCTION.match(line):
      result, shape, _, _ = instruction.groups()
      sizes[result] = sum(
        int(bits or 8) / 8 * math.prod(map(int, filter(None, dims.split(",")))) for bits, dims in _SHAPE.findall(shape)
      )
      bodies[name].append(instruction.groups())
      limits[name] += map(int, _LIMIT.findall(line))
    elif header := _COMPUTATION.match(line):
      name = header[2]
      bodies[name], limits[name] = [], []
      entry = name if header[1] else entry
  runs = dict.fromkeys(bodies, 0) | {entry: 1}
  found: dict[str, dict[str, int]] = {}
  for name in reversed(bodies):  # callers stand behind what they call
    for result, _, operation, rest in bodies[name]:
      turns = 1
      if operation == "while" and (condition := re.search(r"condition=%?([\w.\-]+)", rest)):
        limit = limits[condition[1]]
        turns = limit[0] if len(limit) == 1 else 1
      for callees in _CALLS.findall(rest):
        for callee in re.findall(r"[\w.\-]+", callees[1]):
          runs[callee] = runs.get(callee, 0) + runs[name] * turns
      kind = operation.removesuffix("-start")
      if kind in COLLECTIVES and runs[name]:
        given = sum(sizes.get(operand, 0) for operand in re.findall(r"[\w.\-]+", rest.partition(")")[0]))
        got = sizes[result]
        if operation.endswith("-start") and kind != "all-reduce":
          got -= given  # the result of these holds what was given, too
        total = found.setdefault(kind, {"number": 0, "bytes": 0})
        total["number"] += runs[name]
        total["bytes"] += runs[name] * int(max(given, got))
  return found


def show(description: dict[str, Any]) -> None:
  """Prints tables to the terminal."""
  console = rich.console.Console()
  memory, chips = description["memory"], description["chips"]
  model, size = description["model"], " x ".join(map(str, description["input"]))
  console.print(
    f"{' '.join(filter(None, (model['name'], model.get('variant'))))}, {description['batch_size']} clips of {size} a "
    f"step on {chips} chips ({description['topology']}), {description['clips_at_once']} at once on each"
  )
  table = rich.table.Table("memory of a chip", "GiB")
  table.columns[1].justify = "right"
  for part, size in memory.items():
    table.add_row(part, f"{size / 2**30:.2f}")
  console.print(table)
  console.print(f"{description['flops'] / 1e12:.2f} TFLOPs a step, {description['flops'] / chips / 1e12:.3f} on a chip")
  if description["collectives"] is None:
    console.print("the batch does not fit")
  else:
    console.print(f"{description['bytes_accessed'] / 2**30:.1f} GiB accessed by a chip in a step, loops counted once")
    for kind, total in description["collectives"].items():
      console.print(f"{kind}: {total['number']}, {total['bytes'] / 2**20:.1f} MiB")
  fits, fails = description["largest"]["fits"], description["largest"]["fails"]
  exact = "" if fails == fits + 1 else f" at least, {fails} do not" if fails else " at least"
  console.print(f"a chip can take {fits} clips at once{exact}")
