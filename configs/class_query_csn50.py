"""Class queries with CSN-50 on keyframes of AVA; the released weights come without a figure.

    python -m vad_jax.main --config configs/class_query_csn50.py --config.init_from=weights/csn50 --workdir runs/one

Stages and arguments are those of class_query_csn152.py.
"""

from configs import class_query_csn152, common


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: see class_query_csn152.py."""
  config = class_query_csn152.get_config(arg, variant="csn50")
  config.model.class_weight = 12.0
  return config
