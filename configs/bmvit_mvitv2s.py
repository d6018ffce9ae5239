"""BMViT with MViTv2-S on AVA, the recipe of the paper (30.0 mAP at 256 x 256).

    python -m vad_jax.main --config configs/bmvit_mvitv2s.py --config.init_from=weights/mvitv2s --workdir runs/bmvit
    python -m vad_jax.main --config configs/bmvit_mvitv2s.py:tokens=tubelet --workdir runs/tubelet
    python -m vad_jax.main --config configs/bmvit_mvitv2s.py:tiny --workdir runs/tiny

The learning rate belongs to a batch of 16 clips. The paper does not say how far boxes and colours were jittered, nor
whether clips were flipped; that is chosen here. ``keep_aspect`` gives the frames their proportions, and scales of 240
to 340 pixels in training (Table 1c, 28.5 mAP).
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: ``side`` in pixels, ``tokens``, ``last_pool`` and ``keep_aspect`` (Table 1), ``tiny``."""
  options = common.parse_arg(arg, side=256, tokens="", last_pool=False, keep_aspect=False, tiny=False)
  config = recipe(options.side)
  if options.keep_aspect:
    long_side = -(-options.side * 16 // (9 * 32)) * 32  # 16:9, in whole patches
    config.resize, config.short_side = "short_side", options.side
    config.canvas = ((options.side, long_side), (long_side, options.side))
    config.augment.scale = (240 / 256, 340 / 256)
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
  config.canvas, config.resize = (side, side), "stretch"
  config.augment.update({"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05, "box_jitter": 0.05})
  config.optimizer.weight_decay = 1e-4
  config.schedule = ConfigDict({"name": "cosine", "learning_rate": 1e-4, "warmup": 0.02})
  config.eval.score, config.eval.actor_threshold = "action", 0.2
  return config


def learn_quickly(config: common.Config) -> None:
  """Turns a config into one that learns rendered people from nothing on two cores, in minutes."""
  quick = quickstart.get_config()
  for key in ("data", "clip", "max_boxes", "augment", "optimizer", "eval", "num_epochs", "batch_size", "microbatch"):
    config[key] = quick[key]
  config.canvas = (96, 96)
  config.model.variant, config.model.drop_path, config.model.remat = "tiny", 0.0, False
  config.model.action_weight = 24.0  # few of the 80 classes occur, and the loss is a mean over all
  config.schedule.learning_rate = 1.5e-3
  config.eval.score = "product"
