"""Reads reference outputs and compares with them."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> Any:
  """Parsed content of ``tests/golden/<name>.json.gz``."""
  return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def assert_tap(actual: Any, tap: dict, limit: float, name: str = "") -> None:
  """Fails where ``actual`` is further from the recorded values than ``limit`` standard deviations of the tap."""
  actual = np.asarray(actual)
  assert list(actual.shape) == tap["shape"], f"{name}: {actual.shape} != {tap['shape']}"
  error = np.abs(actual.reshape(-1)[tap["index"]] - np.array(tap["value"])).max() / (tap["std"] or 1)
  assert error <= limit, f"{name}: off by {error:.2e} standard deviations, allowed {limit:.0e}"
