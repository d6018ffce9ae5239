"""Which share of a training step does matching take, on the host and on the device?

    python -m benchmarks.matching
    python -m benchmarks.matching --clips 4 --actors 8

Each row is a full-size system: the matching of all its layers, images and frames in one call, with both solvers, and
the rest of its training step (forward and backward pass, without the optimizer), for random frames and costs. Where
matching does not depend on the size of frames they are small, which makes its share larger than it is; BMViT's 512
tokens need the full size. Times are the least of several runs; compare those of one run alone.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from flax import nnx

from configs import bmvit_mvitv2s, class_query_vitb, evad_vitb
from vad_jax import describe, models, progress
from vad_jax.checkpoint import split_model
from vad_jax.ops.matching import match

CONFIGS = {  # and the side of square frames in pixels
  "EVAD": (evad_vitb.get_config(), 128),
  "class queries, JHMDB": (class_query_vitb.get_config("jhmdb"), 128),
  "class queries, UCF": (class_query_vitb.get_config("ucf101_24"), 128),
  "BMViT": (bmvit_mvitv2s.get_config(), 256),
}
SOLVERS = ("scipy", "device")


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--clips", type=int, default=1, help="in a step; default: %(default)s")
  parser.add_argument("--actors", type=int, default=4, help="in each frame; default: %(default)s")
  parser.add_argument("--repeats", type=int, default=3, help="runs, of which the least counts; default: %(default)s")
  options = parser.parse_args()
  device = jax.devices()[0]
  table = rich.table.Table(title=f"{device.device_kind}, {options.clips} clips, actors in a frame: {options.actors}")
  for column in ("", "costs", "step s", *(f"{solver} {unit}" for solver in SOLVERS for unit in ("ms", "share"))):
    table.add_column(column, justify="right" if column else "left")
  with progress.bar("benchmark", len(CONFIGS)) as advance:
    for name, (config, side) in CONFIGS.items():
      shape, step, solved = measure(config, side, options)
      shares = (text for ms in solved for text in (f"{1000 * ms:.2f}", f"{ms / (ms + step):.3%}"))
      table.add_row(name, " x ".join(map(str, shape)), f"{step:.2f}", *shares)
      advance(note=name)
  rich.console.Console().print(table)


def measure(config: Any, side: int, options: argparse.Namespace) -> tuple[tuple[int, ...], float, list[float]]:
  """Shape of the costs, seconds of a step without matching, and of matching by each of the solvers."""
  rng = np.random.default_rng(0)
  classes = describe.num_classes(config)
  model = models.build(**config.model, num_classes=classes, rngs=nnx.Rngs(0))
  tube = (config.clip.num_frames,) if config.model.get("tubes") else ()
  shapes: Any = describe.abstract_batch(config, (config.clip.num_frames, side, side), clips=options.clips, tube=tube)
  batch: dict[str, Any] = {name: np.zeros(spec.shape, spec.dtype) for name, spec in shapes.items()}
  batch["video"] = rng.integers(0, 255, batch["video"].shape, np.uint8)
  batch["video_size"] += side
  corners = rng.uniform(0, 0.5, (*batch["boxes"].shape[:-1], 2))
  batch["boxes"] = np.concatenate([corners, corners + rng.uniform(0.1, 0.5, corners.shape)], -1).astype(np.float32)
  batch["box_mask"] |= np.arange(batch["box_mask"].shape[-1]) < options.actors
  batch["labels"] = rng.integers(0, 2, batch["labels"].shape).astype(np.float32)
  graphdef, params, rest = split_model(nnx.view(model, raise_if_not_found=False, deterministic=False))

  def loss(params: Any, batch: Any, mask: Any) -> Any:
    model = nnx.merge(graphdef, params, rest)
    return model.loss(model(batch, rngs=nnx.Rngs(0)), batch, mask)[0]

  def costs_of(params: Any, batch: Any) -> Any:
    model = nnx.merge(graphdef, params, rest)
    return model.costs(model(batch, rngs=nnx.Rngs(0)), batch)

  shape = jax.eval_shape(costs_of, params, batch).shape
  costs = jnp.asarray(rng.uniform(0, 10, shape), jnp.float32)
  valid = jnp.asarray(batch["box_mask"])
  solve, gradient = jax.jit(match, static_argnums=2), jax.jit(jax.grad(loss))
  solved = [least(functools.partial(solve, costs, valid, solver), options.repeats) for solver in SOLVERS]
  step = functools.partial(gradient, params, batch, solve(costs, valid, "device"))
  return shape, least(step, options.repeats), solved


def least(run: Callable[[], Any], repeats: int) -> float:
  """Seconds of the fastest run, after one to warm up."""
  seconds = []
  for _ in range(1 + repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return min(seconds[1:])


if __name__ == "__main__":
  main()
