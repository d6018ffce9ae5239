"""BMViT with MViTv2-S on AVA, the recipe of the paper (30.0 mAP at 256 x 256).

    python -m vad_jax.main --config configs/bmvit_mvitv2s.py --config.init_from=weights/mvitv2s --workdir runs/bmvit
    python -m vad_jax.main --config configs/bmvit_mvitv2s.py:tokens=tubelet --workdir runs/tubelet
    python -m vad_jax.main --config configs/bmvit_mvitv2s.py:tiny --workdir runs/tiny

The learning rate belongs to a batch of 16 clips. The paper does not say how boxes were jittered, nor whether clips were
flipped; both are chosen here.
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: ``side`` in pixels, ``tokens`` and ``last_pool`` (Tables 1a and 1b), ``tiny``."""
  options = common.parse_arg(arg, side=256, tokens="", last_pool=False, tiny=False)
  config = recipe(options.side)
  config.model = ConfigDict(
    {
      "name": "bmvit",
      "variant": "mvitv2_s",
      "tokens": options.tokens or None,  # None: those of the variant
      "last_pool": options.last_pool,
      "drop_path": 0.2,
      "remat": True,
      "dtype": "float32",
    }
  )
  if options.tiny:
    learn_quickly(config)
  return config


def recipe(side: int) -> common.Config:
  """What the paper's AVA configs share: optimizer, schedule, augmentation, thresholds (section 4)."""
  config = common.base()
  config.num_epochs = 25.0
  config.batch_size = 16
  config.microbatch = 2
  config.data.name = "ava"
  config.canvas, config.short_side = (side, side), side
  config.augment.color = 0.2
  config.optimizer.weight_decay = 1e-4
  config.schedule = ConfigDict({"name": "cosine", "learning_rate": 1e-4, "warmup": 0.02})
  config.eval.score, config.eval.actor_threshold = "action", 0.2
  return config


def learn_quickly(config: common.Config) -> None:
  """Turns a config into one that learns rendered people from nothing on two cores, in minutes."""
  quick = quickstart.get_config()
  for key in ("data", "clip", "canvas", "short_side", "max_boxes", "augment", "optimizer", "eval", "num_epochs"):
    config[key] = quick[key]
  config.batch_size, config.microbatch = quick.batch_size, None
  config.model.variant, config.model.drop_path, config.model.remat = "tiny", 0.0, False
  config.schedule.learning_rate = 1e-3
  config.eval.score = "product"
