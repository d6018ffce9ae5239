"""BMViT with ViT-B at 288 x 288: AVA (31.4 mAP), JHMDB51-21 (85.4) or UCF101-24 (87.3).

    python -m vad_jax.main --config configs/bmvit_vitb.py --config.init_from=weights/videomae --workdir runs/vitb
    python -m vad_jax.main --config configs/bmvit_vitb.py:data=ucf101_24 --config.init_from=weights/v2 --workdir runs/u

The recipe is that of ``bmvit_mvitv2s.py``; the paper names no other for this backbone or these data sets.
"""

from ml_collections import ConfigDict

from configs import bmvit_mvitv2s, common


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: ``data`` (``ava``, ``jhmdb`` or ``ucf101_24``), ``side`` in pixels, ``tiny``."""
  options = common.parse_arg(arg, data="ava", side=288, tiny=False)
  config = bmvit_mvitv2s.recipe(options.side)
  if options.data not in ("ava", "jhmdb", "ucf101_24"):
    raise ValueError(f"unknown data set {options.data!r}: choose one of ava, jhmdb, ucf101_24")
  config.data.name = options.data
  config.model = ConfigDict({"name": "bmvit", "variant": "vit_b", "drop_path": 0.1, "remat": True, "dtype": "float32"})
  if options.tiny:
    bmvit_mvitv2s.learn_quickly(config)
    config.model.variant = "tiny_vit"
    config.canvas, config.num_steps = (96, 128), 4500
    config.init_from = "quickstart"  # whose backbone has seen rendered people
  return config
