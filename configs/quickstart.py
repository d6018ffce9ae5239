"""Learns to detect the actions of rendered people, from nothing, in minutes on two cores.

python -m vad_jax.main --config configs/quickstart.py --workdir runs/quickstart
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: ``tiny``, which shows that everything runs, and learns nothing."""
  options = common.parse_arg(arg, tiny=False)
  config = common.base()
  config.num_epochs = 4.0
  config.batch_size = 4
  config.data = ConfigDict(
    {
      "name": "synthetic",
      "root": "data",
      "level": "easy",
      "num_train": 600,
      "num_val": 120,
      "size": (160, 120),
    }
  )
  config.clip = ConfigDict({"num_frames": 8, "frame_stride": 4, "fps": 25.0})
  config.canvas, config.short_side, config.max_boxes = (96, 128), 96, 4
  config.augment.color = 0.15
  config.model = ConfigDict({"name": "evad", "variant": "quickstart", "token_order": "paper", "drop_path": 0.0})
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 1.0
  config.schedule = ConfigDict({"name": "cosine", "learning_rate": 1e-3, "warmup": 0.02})
  config.eval.every_epochs = 2.0
  config.log.every_steps = 50
  if options.tiny:
    config.num_steps = 4
    config.batch_size = 2
    config.data.num_train, config.data.num_val, config.data.size = 4, 2, (96, 72)
    config.canvas, config.short_side = (64, 96), 64
    config.log.every_steps = 1
  return config
