"""Starts a command several times on this machine, as the processes of one run, each with some virtual devices.

    python tests/two_processes.py 2 python -m vad_jax.main --config configs/quickstart.py:tiny --workdir runs/two

What each process prints comes after its number. One of them gets ctrl-C or SIGTERM, and tells the others.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(count: int, command: Sequence[str], *, devices: int = 1) -> list[subprocess.Popen[str]]:
  """Starts processes that find each other: the command, with the flags that say so behind it."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
  env["PYTHONPATH"] = str(ROOT)
  return [
    subprocess.Popen(
      [*command, f"--coordinator={coordinator}", f"--num_processes={count}", f"--process_id={index}"],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(count)
  ]


def main() -> int:
  """Runs the command line; returns the exit code of the first process that failed, if any did."""
  processes = start(int(sys.argv[1]), sys.argv[2:])
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: processes[-1].terminate())

  def show(index: int) -> None:
    for line in processes[index].stdout or ():
      print(f"{index}: {line}", end="", flush=True)

  readers = [threading.Thread(target=show, args=(index,)) for index in range(len(processes))]
  for reader in readers:
    reader.start()
  for reader in readers:
    reader.join()
  return next(filter(None, (process.wait() for process in processes)), 0)


if __name__ == "__main__":
  sys.exit(main())
