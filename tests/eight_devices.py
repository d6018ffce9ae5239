"""Whether eight devices compute what one does, for any system; tests of models call it."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from vad_jax import checkpoint, optim, sharding, train

MESHES = (({"data": 8}, "replicate"), ({"fsdp": 8}, "fsdp"), ({"data": 4, "fsdp": 2}, "fsdp"))
# Result, operation and name of an all-gather in a compiled program.
_GATHER = re.compile(r"= \(?(\w+\[([\d,]*)\])\S* all-gather(?:-start)?\(.*op_name=\"([^\"]*)\"")


def check(model: Any, batch: Any) -> None:
  """Compares losses, gradients and updated parameters of a training step, and detections, on several meshes.

  Rows stay where they are: nothing at all is gathered where parameters are replicated, and neither the batch nor
  matching costs where they are split up.

  Args:
    model: the system.
    batch: of eight rows.
  """
  graphdef, params, rest = checkpoint.split_model(model)
  optimizer = optim.make_optimizer(params, name="sgd", learning_rate=lambda _: 0.1, weight_decay=1e-4)
  options = {"seed": 0, "matcher": "scipy", "microbatch": None, "ema_decay": None}  # which compiles sooner
  train_step = train.make_train_step(graphdef, optimizer, lambda _: 0.1, **options)
  predict = train.make_predict(graphdef)

  def run(state: Any, batch: Any) -> Any:
    return *train_step(state, batch), predict(state["params"], state["rest"], batch)

  # After the first step, the momentum in the state is the gradient.
  state = {"step": np.int32(0), "params": params, "rest": rest, "opt": optimizer.init(params)}
  expected = jax.jit(run)(state, batch)
  inference = nnx.view(model, raise_if_not_found=False, deterministic=True)
  costs = nnx.eval_shape(lambda: inference.costs(inference(batch), batch))
  stay = {x.shape for x in jax.tree.leaves((batch, costs)) if x.ndim > 1}
  for shape, strategy in MESHES:
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
      patch.setattr(sharding, "MIN_FSDP_SIZE", 64)
      spread = jax.device_put(state, sharding.infer_sharding(state, mesh, strategy))
      spread_batch = sharding.to_global(batch, mesh)
      compiled = jax.jit(run).lower(spread, spread_batch).compile()
    found = compiled(spread, spread_batch)
    jax.tree.map_with_path(_assert_close, found, expected)
    for kind, sizes, operation in _GATHER.findall(compiled.as_text()):
      if strategy == "replicate" or tuple(map(int, filter(None, sizes.split(",")))) in stay:
        raise AssertionError(f"{shape}: {operation} gathers {kind}")


def _assert_close(path: Any, actual: Any, expected: Any) -> None:
  scale = max(np.abs(expected).max(), 0.1)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))
