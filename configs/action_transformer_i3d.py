"""Video Action Transformer with I3D on AVA, the recipe of the paper (24.4 mAP with the Tx head, 24.9 with both).

    python -m vad_jax.main --config configs/action_transformer_i3d.py --config.init_from=weights/i3d --workdir runs/tx
    python -m vad_jax.main --config configs/action_transformer_i3d.py:head=i3d,proposals=64 --workdir runs/i3d_head
    python -m vad_jax.main --config configs/action_transformer_i3d.py:tiny --workdir runs/tiny

Rows of the paper's tables, as arguments behind the colon (a validation mAP each, all by ``init_from=weights/i3d``):

    Table 1  head=i3d,proposals=64 (21.3); with boxes=ground_truth (23.4)
             query=low_res,proposals=64 (17.8); proposals=64 (18.9); each with boxes=ground_truth (28.5; 27.6)
    Table 2  class_agnostic,proposals=64 with head=i3d (92.9), query=low_res (77.5) or none of them (87.7): person AP
    Table 3  head=i3d (20.5); none (24.4); head=tx_i3d (24.9); the others are of Table 1
    Table 4  the last row takes more frames in evaluation: --config.clip.num_frames=96 (25.0)
    Table 5  head=i3d,proposals=64 (21.3) with class_boxes (19.2), augment=false (16.6) or from_scratch (19.1), which
             takes no weights to start from

The learning rate belongs to a batch of 30 clips. Models with the Tx head stop after 300,000 of 500,000 steps. Weight
decay, momentum, limits of gradients and of crops are chosen here; the paper does not say them.
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config(arg: str | None = None) -> common.Config:
  """Arguments: see the module's docstring, and the model's constructor; ``tiny``."""
  options = common.parse_arg(
    arg,
    head="tx",
    query="high_res",
    boxes="rpn",
    proposals=300,
    class_agnostic=False,
    class_boxes=False,
    augment=True,
    from_scratch=False,
    tiny=False,
  )
  config = common.base()
  config.num_steps = 500_000 if options.head == "i3d" else 300_000
  config.batch_size, config.microbatch = 30, 3
  config.data.name = "ava"
  config.clip = ConfigDict({"num_frames": 64, "frame_stride": 1, "fps": 25.0})
  config.canvas, config.resize = (400, 400), "stretch"
  if options.augment:
    config.augment.scale = (1.0, 1.25)
  else:
    config.augment.flip = 0.0
  config.model = ConfigDict(
    {
      "name": "action_transformer",
      "variant": "i3d",
      "head": options.head,
      "query": options.query,
      "boxes": options.boxes,
      "proposals": options.proposals,
      "class_agnostic": options.class_agnostic,
      "class_boxes": options.class_boxes,
      "norm": "batch" if options.from_scratch else "frozen",
      "dropout": 0.3,
      "remat": True,
      "dtype": "float32",
    }
  )
  config.optimizer.update({"name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "clip_norm": 10.0})
  config.schedule = ConfigDict({"name": "cosine", "learning_rate": 0.1, "warmup": 0.002, "start": 0.1})
  config.schedule.decay_steps = 500_000
  config.eval.score, config.eval.score_threshold = "action", 0.01
  if options.tiny:
    learn_quickly(config)
  return config


def learn_quickly(config: common.Config) -> None:
  """Turns a config into one that learns rendered people from nothing on two cores, in minutes."""
  quick = quickstart.get_config()
  for key in ("data", "clip", "max_boxes", "augment", "optimizer", "schedule", "eval", "num_epochs", "batch_size"):
    config[key] = quick[key]
  config.num_steps, config.microbatch = None, None
  config.schedule.learning_rate = 2e-3
  config.canvas, config.resize, config.short_side = quick.canvas, quick.resize, quick.short_side
  config.model.update({"variant": "tiny", "proposals": 32, "norm": "batch", "dropout": 0.0, "remat": False})
