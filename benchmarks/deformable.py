"""What does deformable attention cost, next to the backbone whose maps it looks at?

    python benchmarks/deformable.py
    python benchmarks/deformable.py --full

compares an encoder of deformable layers on four maps of a clip (strides 4 to 32, as class queries have on ViT-B) with
its matrix products alone, with the same encoder whose samples are looked up by the formula written down plainly, and
with the blocks of ViT-B, two for each layer. Rows take turns, the best of several runs counts, and what is comparable
is the processor time of the process, and so the ratios: other programs may run meanwhile. Memory is what XLA plans for
intermediate results. The default size takes about two minutes on two processor cores; the full one is that of AVA.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from flax import nnx

from vad_jax import progress
from vad_jax.batch import Array
from vad_jax.layers import deformable
from vad_jax.layers.attention import Block

DIM, WIDTH = 256, 768


class Case(NamedTuple):
  """A function of parameters and inputs, compiled forward and with gradients, and the inputs."""

  name: str
  compiled: Sequence[Any]
  inputs: tuple[Any, ...]


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--side", type=int, default=224, help="of a square frame in pixels; default: %(default)s")
  parser.add_argument("--frames", type=int, default=16, help="of the clip; default: %(default)s")
  parser.add_argument("--layers", type=int, default=1, help="of the encoder; default: %(default)s")
  parser.add_argument("--repeats", type=int, default=2, help="runs, of which the best counts; default: %(default)s")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
  parser.add_argument(
    "--full", action="store_true", help="6 layers on a clip of 16 x 224 x 224, as class queries have for AVA"
  )
  options = parser.parse_args()
  if options.full:
    options.side, options.frames, options.layers = 224, 16, 6
  shapes = [(options.frames // 2, side, side) for side in (options.side // stride for stride in (4, 8, 16, 32))]
  with progress.bar("benchmark", 5 + 10 * options.repeats) as advance:
    cases = []
    for case in make_cases(shapes, options.layers, jnp.dtype(options.dtype)):
      cases.append(case)
      advance(note=f"compiled {case.name}")
    costs = measure(cases, options.repeats, advance)
  for direction, title in enumerate(("forward", "forward and backward")):
    tokens = sum(np.prod(shape) for shape in shapes)
    table = rich.table.Table(title=f"{title}; encoder layers: {options.layers}, tokens: {tokens:,}, {options.dtype}")
    for column in ("", "processor s", "wall s", "ratio to ViT-B", "MB"):
      table.add_column(column, justify="right" if column else "left")
    reference = costs[-1, direction, 0]
    for case, (cpu, wall) in zip(cases, costs[:, direction], strict=True):
      memory = case.compiled[direction].memory_analysis().temp_size_in_bytes / 1e6
      table.add_row(case.name, f"{cpu:.2f}", f"{wall:.2f}", f"{cpu / reference:.2f}", f"{memory:,.0f}")
    rich.console.Console().print(table)


def make_cases(shapes: Sequence[deformable.Shape], layers: int, dtype: jnp.dtype):
  """Yields what is compared; the last is ViT-B."""
  rngs = nnx.Rngs(0)
  encoder = deformable.Encoder(DIM, 8, 2048, layers, dropout=0.0, remat=True, dtype=dtype, rngs=rngs)
  for layer in encoder.layers:  # places that depend on what is there
    kernel = layer.self_attn.sampling_offsets.kernel
    kernel.set_value(0.1 / DIM**0.5 * jax.random.normal(rngs.params(), kernel.shape))
  maps, positions = ([jax.random.normal(rngs.params(), (1, *s, DIM), dtype) for s in shapes] for _ in range(2))
  masks = [jnp.ones((1, h, w), bool) for _, h, w in shapes]
  middle = [(t // 2 - 1, t // 2) for t, _, _ in shapes]

  def encode(encoder: deformable.Encoder, *inputs: Any) -> list[Array]:
    return encoder(*inputs)

  inputs = (maps, positions, masks)
  yield compiled("encoder", encode, encoder, inputs)
  yield compiled("encoder, 2 frames of its last layer", lambda e, *i: e(*i, frames=middle), encoder, inputs)
  with mock.patch.object(deformable, "sample_levels", plain_samples):
    yield compiled("encoder, plain formula", encode, encoder, inputs)
  yield compiled("matrix products alone", products, encoder, inputs)
  blocks = nnx.List([Block(WIDTH, WIDTH // 64, dtype=dtype, rngs=rngs) for _ in range(2 * layers)])
  tokens = jax.random.normal(rngs.params(), (1, int(np.prod(shapes[2])), WIDTH), dtype)
  yield compiled("blocks of ViT-B", vit, blocks, (tokens,))


def compiled(name: str, function: Callable[..., Any], module: nnx.Module, inputs: tuple[Any, ...]) -> Case:
  """Compiles a function of a module and inputs, forward and with gradients of parameters and floating-point inputs."""
  graph, state = nnx.split(module)

  def forward(state: Any, inputs: tuple[Any, ...]) -> Any:
    return function(nnx.merge(graph, state), *inputs)

  def loss(state: Any, first: Any, others: tuple[Any, ...]) -> Array:
    return sum((x.astype(jnp.float32) ** 2).mean() for x in jax.tree.leaves(forward(state, (first, *others))))

  def backward(state: Any, inputs: tuple[Any, ...]) -> Any:
    return jax.grad(loss, (0, 1))(state, inputs[0], inputs[1:])

  return Case(name, [jax.jit(f).lower(state, inputs).compile() for f in (forward, backward)], (state, inputs))


def measure(cases: Sequence[Case], repeats: int, advance: Callable[..., None]) -> np.ndarray:
  """Least processor and wall time, ``[cases, 2 directions, 2]`` seconds."""
  costs = np.full((repeats, len(cases), 2, 2), np.inf)
  for repeat, (index, case), direction in itertools.product(range(repeats), enumerate(cases), range(2)):
    start = time.process_time(), time.perf_counter()
    jax.block_until_ready(case.compiled[direction](*case.inputs))
    costs[repeat, index, direction] = np.array([time.process_time(), time.perf_counter()]) - start
    advance(note=case.name)
  return costs.min(0)


def products(encoder: deformable.Encoder, maps: Sequence[Array], *_: Any) -> Array:
  """The linear layers of the encoder with hardly anything between them, for 2,048 tokens at a time."""

  def some(x: Array) -> Array:
    for layer in encoder.layers:
      attention = layer.self_attn
      offsets = sum(jnp.split(attention.sampling_offsets(x), 3, -1))
      x = attention.output_proj(attention.value_proj(x) + attention.attention_weights(x) + offsets)
      x = layer.linear2(jax.nn.relu(layer.linear1(x)))
    return x

  x = jnp.concatenate([x.reshape(-1, DIM) for x in maps])
  return jax.lax.map(jax.checkpoint(some), jnp.pad(x, [(0, -len(x) % 2048), (0, 0)]).reshape(-1, 2048, DIM))


def vit(blocks: nnx.List, x: Array) -> Array:
  """Blocks one after the other, recomputed in the backward pass as the layers of the encoder are."""
  for block in blocks:
    x = nnx.remat(Block.__call__)(block, x)
  return x


def plain_samples(values: Array, shapes: Sequence[deformable.Shape], locations: Array, weights: Array) -> Array:
  """`sample_levels` as its formula is usually written down: each of eight cells looked up for all samples of a map."""
  total, start = 0, 0
  for (t, h, w), location, weight in zip(shapes, locations, weights, strict=True):
    size = np.array([w, h, t])[:, None, None, None]
    place = location * size - 0.5
    cells = values[:, :, start : start + t * h * w]
    for corner in itertools.product((0, 1), repeat=3):
      cell = jnp.floor(place) + np.array(corner)[:, None, None, None]
      inside = ((cell >= 0) & (cell < size)).all(1)
      x, y, z = jnp.moveaxis(jnp.clip(cell, 0, size - 1).astype(jnp.int32), 1, 0)
      rows = jnp.moveaxis((z * h + y) * w + x, 0, -1).swapaxes(0, 1)  # [B, heads, Q, points]
      seen = jnp.take_along_axis(cells, rows.reshape(*rows.shape[:2], -1, 1), 2).reshape(*rows.shape, -1)
      factor = jnp.where(inside, weight * (1 - jnp.abs(place - cell)).prod(1), 0)
      total += jnp.einsum("phbq,bhqpd->bhqd", factor, seen)
    start += t * h * w
  return jnp.asarray(total).astype(values.dtype)


if __name__ == "__main__":
  main()
