"""What every config starts from: all keys with their meaning and default."""

import difflib
from typing import Any

from ml_collections import ConfigDict, config_dict

Config = Any  # a ConfigDict, whose attributes a type checker cannot know


def base() -> Config:
  """All keys that exist. The result is locked: setting one that does not exist is an error."""
  config = ConfigDict()
  config.seed = 0
  config.num_epochs = 12.0
  config.num_steps = config_dict.placeholder(int)  # counts instead of num_epochs where it is set
  config.batch_size = 16  # over all devices
  # Examples that a device takes at once; losses are means over them, then over all such parts of a batch.
  config.microbatch = config_dict.placeholder(int)
  config.workers = 0  # processes that load data; 0 loads in threads

  # Name of the system and arguments of its constructor; the number of classes comes from the data.
  config.model = ConfigDict({"name": "evad"})

  # Weights to start from: a converted file (see vad_jax.convert), or the workdir or a checkpoint of another run.
  config.init_from = config_dict.placeholder(str)
  # The run of a first stage, whose encoder and decoder the second one starts from, over those of init_from.
  config.init_transformer_from = config_dict.placeholder(str)
  config.reinit_head = False  # start the classifier anew where the weights know another number of classes
  config.resize_positions = False  # where the weights have tables of positions for another size of video

  # Name of the set, folder of all prepared sets, and arguments of the set's function in vad_jax.datasets: tubes=True
  # for targets in every frame; proposal_threshold, the least score of given person boxes, or oracle=True, which gives
  # the annotated ones; and so on.
  config.data = ConfigDict({"name": "synthetic", "root": "data"})
  config.clip = ConfigDict({"num_frames": 16, "frame_stride": 4, "fps": 30.0})
  # Height and width of the padded frames, multiples of 16 (some systems want 32); or several of these, of which a video
  # gets the one it fills.
  config.canvas = (288, 512)
  config.resize = "short_side"  # or "stretch", which fills the canvas without keeping proportions
  config.short_side = 288  # of the frames on the canvas, as far as they fit; nothing where they are stretched
  config.max_boxes = 32  # actors of one keyframe; more than that are dropped, smallest first
  config.max_proposals = 0  # given boxes of one keyframe, for systems that take them
  # Arguments of vad_jax.datasets.augment.Augment; zero switches off.
  config.augment = ConfigDict({"flip": 0.5, "scale": (1.0, 1.0), "square": False, "color": 0.0, "brightness": 0.0})
  config.augment.update({"contrast": 0.0, "saturation": 0.0, "hue": 0.0, "box_jitter": 0.0})

  # name: adamw or sgd.
  # groups: pairs of a regular expression of parameter names and a factor of the learning rate.
  config.optimizer = ConfigDict({"name": "adamw", "weight_decay": 1e-4, "groups": (), "no_decay": ()})
  config.optimizer.update({"momentum": 0.9, "nesterov": False})  # of sgd
  config.optimizer.clip_norm = config_dict.placeholder(float)
  # Name of a schedule of vad_jax.optim, and its arguments.
  config.schedule = ConfigDict({"name": "cosine", "learning_rate": 1e-4})
  config.ema_decay = config_dict.placeholder(float)
  config.matcher = "device"  # or "scipy", on the host
  config.nonfinite = "stop"  # where a loss is not finite; or "skip", which leaves such steps out and counts them

  config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # -1: all devices that are left
  config.sharding = "replicate"  # or "fsdp"

  # protocol: of keyframes activitynet (default), slowfast or mmaction2, see vad_jax.metrics.protocols; of tubes
  # class_query (default), act or multisports, see vad_jax.metrics.video_map.
  # score: "product" of actor and action, or "action" alone; persons below actor_threshold say nothing then. These and
  # score_threshold are for keyframes: the scores of tubes are final, and all of them count.
  config.eval = ConfigDict({"every_epochs": 1.0, "score": "product", "actor_threshold": 0.0, "score_threshold": 0.0})
  config.eval.protocol = config_dict.placeholder(str)
  config.eval.canvas = config_dict.placeholder(tuple)  # where it is another one than in training, with its short side
  config.eval.short_side = config_dict.placeholder(int)
  config.log = ConfigDict({"every_steps": 50})
  config.checkpoint = ConfigDict({"every_steps": 500, "keep": 2})
  return config.lock()


def parse_arg(arg: str | None, **known: Any) -> Config:
  """Reads the part of ``--config file.py:tiny,keep_rate=0.6`` behind the colon.

  Args:
    arg: items ``name=value`` or, for switches, ``name`` alone.
    **known: names that exist with their defaults, whose type values are converted to.

  Raises:
    ValueError: a name does not exist, or a value has the wrong type.
  """
  result = dict(known)
  for item in filter(None, (arg or "").split(",")):
    name, _, value = item.partition("=")
    if name not in known:
      close = difflib.get_close_matches(name, known, 1)
      hint = f" (did you mean {close[0]!r}?)" if close else ""
      raise ValueError(f"config argument {name!r} is not known{hint}; known: {', '.join(known)}")
    kind = type(known[name])
    try:
      result[name] = value.lower() in ("", "1", "true", "yes") if kind is bool else kind(value)
    except ValueError:
      raise ValueError(f"config argument {name}={value}: expected {kind.__name__}") from None
  return ConfigDict(result)
