"""Fine-tunes EVAD on videos of your own, prepared by ``python -m vad_jax.datasets.prepare custom`` or laid out alike.

    python -m vad_jax.main --config configs/custom.py:data=data/custom --workdir runs/custom
    python -m vad_jax.main --config configs/custom.py:data=data/custom,variant=vit_b,init_from=weights/evad --workdir w

``small`` starts from the quickstart weights, which know rendered people, and trains on a CPU. For real people take
``vit_b`` on an accelerator, and start it from a released detector or backbone (see vad_jax.convert).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: ``data``, folder of the set; ``variant``, small or vit_b; ``init_from``, weights; ``tiny``."""
  options = common.parse_arg(arg, data="data/custom", variant="small", init_from="", tiny=False)
  if options.variant not in ("small", "vit_b"):
    raise ValueError(f"unknown variant {options.variant!r}: choose small or vit_b")
  config = common.base()
  config.data = ConfigDict({"name": "custom", "root": ".", "directory": options.data})
  config.reinit_head = True
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 1.0
  config.augment.color = 0.15
  config.eval.every_epochs = 5.0
  if options.variant == "small":
    config.init_from = options.init_from or "quickstart"
    config.num_epochs = 30.0
    config.batch_size = 4
    config.clip = ConfigDict({"num_frames": 8, "frame_stride": 4, "fps": 25.0})
    config.canvas, config.short_side, config.max_boxes = (96, 192), 96, 10
    config.model = ConfigDict({"name": "evad", "variant": "quickstart", "token_order": "paper", "drop_path": 0.0})
    config.schedule = ConfigDict({"name": "cosine", "learning_rate": 5e-4, "warmup": 0.05})
  else:
    config.init_from = options.init_from or None
    config.num_epochs = 20.0
    config.batch_size = 8
    config.microbatch = 2
    config.canvas, config.short_side = (224, 416), 224
    config.model = ConfigDict({"name": "evad", "variant": "vit_b", "drop_path": 0.1, "remat": True})
    config.optimizer.groups = ((r"^(head|decoder)/", 8.0),)
    config.optimizer.no_decay = (r"(^|_|/)bias$", r"mask_token$")
    config.schedule = ConfigDict({"name": "cosine", "learning_rate": 2.5e-5, "warmup": 0.05})
  if options.tiny:
    config.num_steps = 2
    config.batch_size = 1
    config.canvas, config.short_side, config.max_boxes = (64, 96), 64, 4
    config.log.every_steps = 1
  return config
