"""EVAD with ViT-B on AVA, the recipe of the paper and its code (32.3 mAP at keep rate 0.7, short side 288).

    python -m vad_jax.main --config configs/evad_vitb.py --workdir runs/evad_vitb
    python -m vad_jax.main --config configs/evad_vitb.py:keep_rate=0.6,short_side=224 --workdir runs/b_224
    python -m vad_jax.main --config configs/evad_vitb.py:ablation=random_pruning --workdir runs/random
    python -m vad_jax.main --config configs/evad_vitb.py:tiny --config.data.name=synthetic --workdir runs/try

The learning rate belongs to a batch of 16 clips.
"""

from ml_collections import ConfigDict

from configs import common

# Rows of Table 1 of the paper, by the constructor's arguments that differ. Parts (a) to (f) are at short side
# 224, and (a) and (f) have rows with keep_rate=1 too; (g) is at keep_rate=0.6 and short side 288.
ABLATIONS = {
  "none": {},
  "linear_head": {"decoder_depth": 0},  # (a)
  "random_pruning": {"pruning": "random"},  # (b)
  "unified_pruning": {"pruning": "unified"},  # (c)
  "all_tokens": {"decoder_tokens": "all"},  # (d)
  **{f"decoder_{depth}": {"decoder_depth": depth} for depth in (1, 2, 4, 6, 8)},  # (e)
  **{f"extension_{x}": {"roi_extension": (x, x / 2)} for x in (0.0, 0.2, 0.4, 0.6)},  # (f)
  **{f"weight_{weight}": {"keyframe_weight": float(weight)} for weight in (1, 2, 4, 6, 8)},  # (g)
}


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: ``keep_rate``, ``short_side``, ``ablation`` (one of ``ABLATIONS``), ``tiny``."""
  options = common.parse_arg(arg, keep_rate=0.7, short_side=288, ablation="none", tiny=False)
  if options.ablation not in ABLATIONS:
    raise ValueError(f"unknown ablation {options.ablation!r}: choose one of {', '.join(ABLATIONS)}")
  config = common.base()
  config.num_epochs = 12.0
  config.batch_size = 16
  config.microbatch = 2  # the official losses are means over the two clips of a GPU
  config.data.name = "ava"
  config.short_side = options.short_side
  config.canvas = (options.short_side, -(-options.short_side * 16 // 9 // 32) * 32)  # holds 16:9 in full size
  config.model = ConfigDict(
    {
      "name": "evad",
      "variant": "vit_b",
      "keep_rate": options.keep_rate,
      "drop_path": 0.1,
      "remat": True,
      "dtype": "float32",
      **ABLATIONS[options.ablation],
    }
  )
  config.optimizer.weight_decay = 1e-4
  config.optimizer.groups = ((r"^(head|decoder)/", 8.0),)
  config.optimizer.no_decay = (r"(^|_|/)bias$", r"mask_token$")
  config.schedule = ConfigDict(
    {
      "name": "step_epochs",
      "learning_rate": 2.5e-5,
      "boundaries": (5, 8),
      "factor": 0.1,
      "warmup_epochs": 2,
      "warmup_learning_rate": 2.5e-6,
    }
  )
  config.eval.score, config.eval.actor_threshold = "action", 0.7
  if options.tiny:
    config.model.variant = "tiny"
    config.num_steps = 4
    config.batch_size = 2
    config.canvas, config.short_side, config.max_boxes = (64, 96), 64, 4
    config.clip.num_frames = 8
    config.log.every_steps = 1
  return config
