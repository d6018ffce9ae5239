"""BMViT with Hiera-L on AVA (38.5 mAP), the recipe of ``bmvit_mvitv2s.py`` as it is.

    python -m vad_jax.main --config configs/bmvit_hieral.py --config.init_from=weights/hiera_l --workdir runs/hieral

The paper prints 650 GFLOPs and leaves the size of the input to a supplement that we do not have. No size that was
tried gives that number (see ``vad_jax.papers``). The default is 224, that of the weights, without the last pooling.
"""

from ml_collections import ConfigDict

from configs import bmvit_mvitv2s, common


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: ``side`` in pixels, ``tiny``."""
  options = common.parse_arg(arg, side=224, tiny=False)
  config = bmvit_mvitv2s.recipe(options.side)
  config.model = ConfigDict(
    {"name": "bmvit", "variant": "hiera_l", "drop_path": 0.2, "remat": True, "dtype": "float32"}
  )
  if options.tiny:
    bmvit_mvitv2s.learn_quickly(config)
  return config
