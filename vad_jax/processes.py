"""Several processes that work as one: how they find each other, and how the rest ends when one is lost."""

import os
import re
import sys
import threading
from typing import NoReturn

import jax

JOIN_SECONDS = 300  # for all processes to come
SILENCE_SECONDS = 100  # after which a process that has not been heard of counts as dead
_LOST = re.compile(r"gloo|coordination.?service|heartbeat|connection (closed|reset|refused)", re.IGNORECASE)


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Waits for the other processes; call it before anything else is done with JAX.

  A process that does not come within `JOIN_SECONDS` ends those that wait for it, with exit code 1.

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
  # JAX itself would end the process with a stack trace, so it gets more time than that.
  watch = threading.Timer(JOIN_SECONDS, _give_up, given)
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
      *given,
      initialization_timeout=JOIN_SECONDS + 60,
      heartbeat_timeout_seconds=SILENCE_SECONDS,
      shutdown_timeout_seconds=3600,  # the first process may have a report to write
    )
  except ValueError as error:
    if coordinator is not None:
      raise
    raise ValueError("--distributed: found no cluster; give --coordinator, --num_processes, --process_id") from error
  finally:
    watch.cancel()


def leave(code: int) -> NoReturn:
  """Ends this process at once, and with it those that wait for it: leaving politely would wait for them."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def is_loss(error: BaseException) -> bool:
  """Whether an error says that another process cannot be reached any more."""
  return jax.distributed.is_initialized() and bool(_LOST.search(str(error)))


def _give_up(coordinator: str | None, num_processes: int | None, process_id: int | None) -> NoReturn:
  where = f" (this is number {process_id} of {num_processes}, with coordinator {coordinator})" if coordinator else ""
  print(f"error: not all processes came within {JOIN_SECONDS:g} s{where}", file=sys.stderr)
  leave(1)
