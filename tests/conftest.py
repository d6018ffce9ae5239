"""Test-wide settings: CPU with 8 virtual devices, exact matmuls, absl flags parsed (grain defines some)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
flags.FLAGS.mark_as_parsed()
