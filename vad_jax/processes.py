"""Several processes that work as one: how they find each other, and how the rest ends when one is lost."""

import atexit
import faulthandler
import os
import re
import subprocess
import sys
import time
from typing import NoReturn

import jax

JOIN_SECONDS = 300  # for all processes to come
SILENCE_SECONDS = 100  # after which a process that has not been heard of counts as dead
_GRACE_SECONDS = 5  # for the others to say what is wrong with them, before they lose the first process
_LOST = re.compile(r"gloo|coordination.?service|heartbeat|connection (closed|reset|refused)", re.IGNORECASE)
_watcher: subprocess.Popen[str] | None = None


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Waits for the other processes; call it before anything else is done with JAX.

  JAX ends all processes where one does not come within `JOIN_SECONDS`, is silent for `SILENCE_SECONDS`, or was the
  first one and dies. Python gets no chance to say why then, so a line about it is printed after the end.

  Args:
    coordinator: ``host:port`` of process 0. None, as the others, asks the cluster: TPU, Slurm, GKE, Open MPI.
    num_processes: how many there are.
    process_id: the number of this one.

  Raises:
    ValueError: the arguments do not fit, or there is no such cluster.
  """
  given = (coordinator, num_processes, process_id)
  if None in given and given != (None, None, None):
    raise ValueError("--coordinator, --num_processes and --process_id go together")
  if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
    raise ValueError(f"--coordinator={coordinator}: expected host:port")
  _say_when_killed()
  try:
    jax.distributed.initialize(
      *given,
      initialization_timeout=JOIN_SECONDS,
      heartbeat_timeout_seconds=SILENCE_SECONDS,
      shutdown_timeout_seconds=3600,  # the first process may have a report to write
    )
  except ValueError as error:
    if coordinator is not None:
      raise
    raise ValueError("--distributed: found no cluster; give --coordinator, --num_processes, --process_id") from error


def leave(code: int) -> NoReturn:
  """Ends this process at once, and with it those that wait for it: leaving politely would wait for them."""
  if jax.distributed.is_initialized() and jax.process_index() == 0:
    time.sleep(_GRACE_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  _end_watch()
  os._exit(code)


def is_loss(error: BaseException) -> bool:
  """Whether an error says that another process cannot be reached any more."""
  return jax.distributed.is_initialized() and bool(_LOST.search(str(error)))


def _say_when_killed() -> None:
  """Leaves a message that is printed if this process ends without a word."""
  global _watcher
  message = (
    f"error: ended by JAX, since another process stopped, was silent for {SILENCE_SECONDS} s or did not come within "
    f"{JOIN_SECONDS} s (its own output says why), or killed by somebody"
  )
  command = ["sh", "-c", 'read -r line || echo "$0" >&2', message]
  _watcher = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)  # not for ctrl-C
  atexit.register(_end_watch)
  faulthandler.disable()  # it would print stacks of Python as well


def _end_watch() -> None:
  if _watcher:
    _watcher.communicate("ended by itself\n")
