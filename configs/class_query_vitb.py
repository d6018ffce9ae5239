"""Class queries with ViT-B: on keyframes of AVA (32.9 mAP), or whole tubes of UCF101-24 (85.9) and JHMDB (86.9).

    python -m vad_jax.main --config configs/class_query_vitb.py --config.init_from=weights/k400 --workdir runs/one
    python -m vad_jax.main --config configs/class_query_vitb.py --config.init_from=weights/k400 \
        --config.init_transformer_from=runs/one --workdir runs/two
    python -m vad_jax.main --config configs/class_query_vitb.py:jhmdb --config.init_from=weights/k400 --workdir runs/j
    python -m vad_jax.main --config configs/class_query_vitb.py:tiny --workdir runs/tiny

The published recipe has two stages: the second starts from the same backbone and from encoder and decoder of the first.
Sets by argument: ``ava`` (by default), ``ava_v2`` (VideoMAE V2's weights, 38.4 mAP), ``ucf101_24``, ``jhmdb``; ``tiny``
with ``tubes`` or without learns rendered people. Rows of Tables 1 to 4, as arguments of the model:

    Table 1  encoder=transformer,decoder=detr; encoder=transformer,decoder=ldl; encoder=transformer; decoder=ldl
    Table 2  aggregation=weighted_sum; aggregation=mean
    Table 3  positional_queries=false
    Table 4  combination=concat; combination=cross_attention; combination=self_attention

``faithful=paper`` is the method as it was published rather than as it was released. Training code never was: rates,
epochs and warm-up are those of the code that it was developed from, for 32 clips a step of AVA and 16 of tubes.
"""

from ml_collections import ConfigDict

from configs import common, quickstart

MODEL = {
  "faithful": "official",
  "encoder": "deformable",
  "decoder": "ldl_cdl",
  "aggregation": "actor",
  "positional_queries": True,
  "combination": "sum",
}
_SETS = {  # short side, and that before crops; then the arguments of the model that differ
  "ava": (256, 288, {}),
  "ava_v2": (256, 288, {}),
  "ucf101_24": (224, 256, {"tubes": True, "num_frames": 32, "num_queries": 15, "layers": 3}),
  "jhmdb": (256, 288, {"tubes": True, "num_frames": 40, "num_queries": 5, "layers": 3, "empty_frames": False}),
}


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: a set, those of ``MODEL``, and ``tiny`` with or without ``tubes``."""
  options = common.parse_arg(arg, **MODEL, **dict.fromkeys((*_SETS, "tiny", "tubes"), False))
  chosen = [name for name in _SETS if options[name]]
  if len(chosen) > 1:
    raise ValueError(f"{' and '.join(chosen)}: choose one set")
  name = chosen[0] if chosen else "ava"
  short_side, before, differing = _SETS[name]
  config = common.base()
  config.model = ConfigDict({"name": "class_query", "variant": "vitb", **{key: options[key] for key in MODEL}})
  config.model.update({"remat": True, "dtype": "float32", **differing})
  train(config, short_side, before)
  tubes = bool(differing)
  config.data = ConfigDict({"name": name.removesuffix("_v2"), "root": "data", **({"tubes": True} if tubes else {})})
  if tubes:
    config.batch_size, config.microbatch = 16, 1  # a GPU had one tube: the official losses are for one
    config.clip = ConfigDict({"num_frames": differing["num_frames"], "frame_stride": 1, "fps": 25.0})
    config.augment.saturation = config.augment.brightness = 0.5
    config.schedule.warmup_epochs = 4
  if options.tiny or options.tubes:
    learn_quickly(config, tubes=options.tubes)
  return config


def train(config: common.Config, short_side: int, before: int) -> None:
  """Sets the recipe for keyframes.

  Args:
    config: to be changed.
    short_side: of what the network sees.
    before: short side of the frames that training cuts that out of.
  """
  config.num_epochs = 20.0
  config.batch_size, config.microbatch = 32, 4  # a GPU had four clips
  config.data.name = "ava"
  # Heights and widths for 4:3, 16:9 and wider ones.
  config.canvas = tuple((short_side, -(-round(short_side * ratio) // 32) * 32) for ratio in (4 / 3, 16 / 9, 2.4))
  config.short_side = short_side
  config.augment.update({"scale": (before / short_side, before / short_side), "hue": 10 / 180})
  config.augment.update({"saturation": 0.4, "brightness": 0.4})
  config.optimizer.update({"weight_decay": 1e-4, "clip_norm": 0.1, "groups": ((r"^backbone/", 0.1),)})
  config.schedule = ConfigDict(
    {
      "name": "step_epochs",
      "learning_rate": 1e-4,
      "boundaries": (12, 17),
      "factor": 0.1,
      "warmup_epochs": 3,
      "warmup_learning_rate": 1e-5,
    }
  )
  config.eval.score = "action"


def learn_quickly(config: common.Config, *, tubes: bool) -> None:
  """Turns a config into one that learns rendered people on two cores, in minutes, given a backbone that saw such."""
  quick = quickstart.get_config()
  for key in ("data", "clip", "max_boxes", "augment", "optimizer", "schedule", "num_epochs", "batch_size"):
    config[key] = quick[key]
  config.num_steps, config.microbatch, config.init_from = 1500, None, "quickstart"
  config.canvas, config.short_side = quick.canvas, quick.short_side
  config.eval.every_epochs = 2.0
  config.log.every_steps = 50
  config.model = ConfigDict({**config.model.to_dict(), "variant": "tiny", "num_queries": 6, "drop_path": 0.0})
  config.model.update({"dropout": 0.0, "remat": False, "layers": None})
  if tubes:
    config.data.tubes, config.batch_size, config.num_steps = True, 2, 800
    config.clip.frame_stride = 1
    config.model.update({"tubes": True, "num_frames": 8})
