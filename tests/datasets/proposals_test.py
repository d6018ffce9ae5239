"""Any file of person boxes is read, or is an error of one line that names it."""

import pickle

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vad_jax.datasets import proposals

GOOD = ["v", "0901", "0.1", "0.2", "0.5", "0.9", "", "0.8"]
FIELDS = st.sampled_from(["v", "0901", "0.5", "nan", "inf", "", "1e400", '"', '"a,b"', "\x00", "\r", "é", "x", "-1"])
ROWS = st.one_of(
  st.just(GOOD),
  st.lists(FIELDS, max_size=9),
  st.tuples(st.integers(0, 7), FIELDS).map(lambda x: [*GOOD[: x[0]], x[1], *GOOD[x[0] + 1 :]]),
)
PICKLE = pickle.dumps({"v,0901": np.array([[0.1, 0.2, 0.5, 0.9, 0.8]]), "w,0902.5": np.zeros((0, 5))})


def check(path, content):
  path.write_bytes(content)
  try:
    rows = proposals.read_published(path)
  except ValueError as error:
    assert str(path) in str(error) and "\n" not in str(error)
  else:
    assert np.isfinite(rows.boxes).all() and np.isfinite(rows.extra).all() and (rows.action == 1).all()


@settings(
  max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(ROWS, max_size=4))
def test_any_text(tmp_path, rows):
  check(tmp_path / "boxes.csv", "\n".join(",".join(row) for row in rows).encode())


@settings(
  max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
  changes=st.lists(st.tuples(st.integers(0, len(PICKLE) - 1), st.integers(0, 255)), max_size=3), kept=st.floats(0, 2)
)
def test_any_pickle(tmp_path, changes, kept):
  content = bytearray(PICKLE)
  for position, value in changes:
    content[position] = value
  check(tmp_path / "boxes.pkl", bytes(content[: int(kept * len(PICKLE))]))
