"""Less precision, memory or noise: options on a sharded system, and through a stop and a resume."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests import stand_in
from tests.models import bmvit_test
from tests.train_test import assert_equal
from vad_jax import models, optim, sharding, train
from vad_jax.checkpoint import Checkpoints
from vad_jax.models import bmvit

RATE = optax.constant_schedule(1e-2)


@pytest.fixture(autouse=True, scope="module")
def _small(compile_once: None) -> Iterator[None]:
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(bmvit.VARIANTS, "small", bmvit.Variant(bmvit.ViT, {"width": 32, "depth": 2, "heads": 2}))
    patch.setattr(sharding, "MIN_FSDP_SIZE", 256)
    yield


def run(workdir: Path, num_steps: int, *, model: dict[str, Any] | None = None, **options: Any) -> Any:
  """Trains on eight devices, four times two; returns the state."""

  def batches(start: int) -> Iterator[Any]:
    return (bmvit_test.make_batch(seed, rows=16) for seed in range(start, 9))

  with Checkpoints(workdir) as checkpoints:
    return train.train(
      lambda rngs: models.build("bmvit", variant="small", num_classes=bmvit_test.CLASSES, rngs=rngs, **(model or {})),
      batches,
      num_steps=num_steps,
      make_optimizer=partial(optim.make_optimizer, name="sgd", learning_rate=RATE, weight_decay=0.0),
      learning_rate=RATE,
      mesh=sharding.make_mesh({"data": 4, "fsdp": 2}),
      sharding="fsdp",
      checkpoints=checkpoints,
      info=stand_in.INFO,
      writer=stand_in.Writer(),
      matcher="scipy",
      **options,
    ).state


@pytest.fixture(scope="module")
def plain(_small: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
  return run(tmp_path_factory.mktemp("plain"), 2)


@pytest.mark.parametrize(
  "options, tolerance",
  [
    ({"model": {"remat": True}, "ema_decay": 0.9}, 1e-5),
    ({"model": {"dtype": "bfloat16"}, "microbatch": 1}, 5e-2),  # losses are means over other parts
  ],
  ids=["remat and average", "bfloat16 and accumulation"],
)
def test_options(plain: Any, tmp_path: Path, options: Any, tolerance: float) -> None:
  straight = run(tmp_path / "straight", 2, **options)
  run(tmp_path / "stopped", 1, **options)
  assert_equal(straight, run(tmp_path / "stopped", 2, **options))
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(straight["params"]))
  assert any(not x.is_fully_replicated for x in jax.tree.leaves(straight["params"]))
  jax.tree.map(partial(np.testing.assert_allclose, atol=tolerance), straight["params"], plain["params"])
