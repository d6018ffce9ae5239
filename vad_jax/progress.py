"""Progress with an ETA: a bar on a terminal, a line now and then in a log file."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def bar(
  description: str, total: int | None, *, start: int = 0, log_seconds: float = 15.0
) -> Iterator[Callable[..., None]]:
  """Shows how far a long job is; written to standard error.

  Args:
    description: what is being done.
    total: number of units, or None where it is not known.
    start: units that were done before.
    log_seconds: least time between two lines where standard error is no terminal.

  Yields:
    ``advance(amount=1, note="")``: counts units done; the note is shown beside the bar.
  """
  if sys.stderr.isatty():
    columns = (
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn("elapsed"),
      TimeElapsedColumn(),
      TextColumn("ETA"),
      TimeRemainingColumn(),
      TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
      task = progress.add_task(description, total=total, completed=start, note="")

      def advance(amount: int = 1, note: str = "") -> None:
        progress.update(task, advance=amount)
        if note:
          progress.update(task, note=note)

      yield advance
    return

  begun = last = time.monotonic()
  done = start

  def advance_log(amount: int = 1, note: str = "") -> None:
    nonlocal done, last
    done += amount
    now = time.monotonic()
    if now - last >= log_seconds or done == total:
      last = now
      rate = (done - start) / max(now - begun, 1e-9)
      eta = f", ETA {max(total - done, 0) / max(rate, 1e-9):.0f} s" if total else ""
      print(
        f"{description}: {done}/{total or '?'} in {now - begun:.0f} s{eta} {note}".rstrip(), file=sys.stderr, flush=True
      )

  yield advance_log
