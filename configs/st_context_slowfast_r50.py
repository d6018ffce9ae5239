"""Spatio-Temporal Context with SlowFast R50 8x8 on AVA, the recipe of the paper and of PySlowFast (27.02 mAP).

    python -m vad_jax.main --config configs/st_context_slowfast_r50.py --config.init_from=weights/k400 --workdir runs/st
    python -m vad_jax.main --config configs/st_context_slowfast_r50.py:context=spatial,actor_grid=no --workdir runs/s
    python -m vad_jax.main --config configs/st_context_slowfast_r50.py:oracle --workdir runs/oracle
    python -m vad_jax.main --config configs/st_context_slowfast_r50.py:tiny --workdir runs/tiny

The set has to be prepared with person boxes (``--proposals``, see data/README.md); ``oracle`` takes the annotated ones
instead, in evaluation, too, and works with sets that have no others. The learning rate belongs to a batch of 64 clips.
``scratch`` trains statistics of batch norm as well, for a backbone without pre-trained weights.
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: ``context``, ``actor_grid`` and ``positions`` of the model, ``oracle``, ``scratch``, ``tiny``."""
  options = common.parse_arg(
    arg, context="spatial_temporal", actor_grid=True, positions=False, oracle=False, scratch=False, tiny=False
  )
  config = common.base()
  config.num_epochs = 20.0
  config.batch_size = 64
  config.microbatch = 8  # as many as a GPU had
  boxes = {"oracle": True} if options.oracle else {"proposal_threshold": 0.8}
  config.data = ConfigDict({"name": "ava", "root": "data", **boxes})
  config.clip = ConfigDict({"num_frames": 32, "frame_stride": 2, "fps": 30.0})
  # Crops of 224 pixels from frames whose short side has 256 to 320; whole frames of 256 in evaluation.
  config.canvas, config.short_side = (224, 224), 224
  config.augment.square, config.augment.scale = True, (256 / 224, 320 / 224)
  config.eval.canvas, config.eval.short_side = ((256, 352), (256, 480), (256, 640)), 256
  config.max_proposals = 32
  config.model = ConfigDict(
    {
      "name": "st_context",
      "variant": "r50",
      "context": options.context,
      "actor_grid": options.actor_grid,
      "positions": options.positions,
      "norm": "batch" if options.scratch else "frozen",
      "dropout": 0.5 if options.context == "none" else 0.3,
      "remat": True,
      "dtype": "float32",
    }
  )
  config.optimizer.update({"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-7})
  config.schedule = ConfigDict(
    {
      "name": "step_epochs",
      "learning_rate": 0.1,
      "boundaries": (10, 15),
      "factor": 0.1,
      "warmup_epochs": 5,
      "warmup_learning_rate": 0.000125,
    }
  )
  config.eval.score = "action"
  if options.tiny:
    learn_quickly(config)
  return config


def learn_quickly(config: common.Config) -> None:
  """Turns the config into one that learns rendered people from nothing on two cores, in minutes."""
  quick = quickstart.get_config()
  for key in ("canvas", "short_side", "max_boxes", "augment", "optimizer", "eval", "num_epochs", "batch_size"):
    config[key] = quick[key]
  config.microbatch, config.max_proposals = None, quick.max_boxes
  config.data = ConfigDict({**quick.data, "oracle": True})
  config.clip = ConfigDict({"num_frames": 16, "frame_stride": 2, "fps": 25.0})
  config.model.update({"variant": "tiny", "norm": "batch", "dropout": 0.0, "remat": False})
  config.schedule = ConfigDict({"name": "cosine", "learning_rate": 2e-3, "warmup": 0.02})
