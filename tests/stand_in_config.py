"""A config for the command line: the stand-in system on a few rendered videos."""

from typing import Any

from ml_collections import ConfigDict

from configs import quickstart
from tests import stand_in
from vad_jax import models


def get_config() -> Any:
  """Trains for some steps, and evaluates in the middle and at the end."""
  models.MODELS["stand_in"] = stand_in.StandIn
  config = quickstart.get_config("tiny")
  config.data.num_train, config.data.num_val = 2, 1
  config.model = ConfigDict({"name": "stand_in", "width": 8})
  config.num_steps = 6
  config.matcher = "scipy"  # compiles sooner
  return config
