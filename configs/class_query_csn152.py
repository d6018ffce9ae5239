"""Class queries with CSN-152 on keyframes of AVA (33.5 mAP).

    python -m vad_jax.main --config configs/class_query_csn152.py --config.init_from=weights/csn152 --workdir runs/one
    python -m vad_jax.main --config configs/class_query_csn152.py --config.init_from=weights/csn152 \
        --config.init_transformer_from=runs/one --workdir runs/two

Stages and arguments are those of class_query_vitb.py. The backbone starts from IG65M and Kinetics-400.
"""

from ml_collections import ConfigDict

from configs import class_query_vitb, common


def get_config(arg: str | None = None, *, variant: str = "csn152") -> common.Config:
  """Arguments: those of ``class_query_vitb.MODEL``, ``last_stride``, ``tiny``."""
  options = common.parse_arg(arg, **class_query_vitb.MODEL, last_stride=False, tiny=False)
  chosen = {key: options[key] for key in (*class_query_vitb.MODEL, "last_stride")}
  config = common.base()
  config.model = ConfigDict({"name": "class_query", "variant": variant, **chosen})
  config.model.update({"num_frames": 32, "remat": True, "dtype": "float32"})
  class_query_vitb.train(config, 256, 288)
  config.clip = ConfigDict({"num_frames": 32, "frame_stride": 2, "fps": 30.0})
  if options.tiny:
    class_query_vitb.learn_quickly(config, tubes=False)
    config.init_from = None
    config.model.update({"variant": "tiny_csn", "norm": "batch"})
  return config
