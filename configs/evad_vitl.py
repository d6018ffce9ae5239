"""EVAD with ViT-L on AVA, the recipe of the paper's code (39.7 mAP with K700 pre-training, keep rate 0.7).

    python -m vad_jax.main --config configs/evad_vitl.py --workdir runs/evad_vitl

Arguments as in ``evad_vitb.py``. The code differs from the paper: 1e-5 as the learning rate for a batch of 8,
and 6 as the weight of the action loss.
"""

from configs import common, evad_vitb


def get_config(arg: str | None = None) -> common.Config:
  """Arguments as in ``evad_vitb.py``."""
  config = evad_vitb.get_config(arg)
  config.batch_size = min(config.batch_size, 8)
  with config.model.unlocked():
    config.model.action_loss = 6.0
  config.model.drop_path = 0.2
  config.schedule.learning_rate = 1e-5
  if config.model.variant == "vit_b":
    config.model.variant = "vit_l"
  return config
