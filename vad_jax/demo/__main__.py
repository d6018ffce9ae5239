"""A web page that finds the actions in a visitor's video.

    python -m vad_jax.demo --checkpoint quickstart runs/mine

prints an address to open. Visitors choose one of these systems; their videos and results are removed when they leave.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from vad_jax import checkpoint
from vad_jax.demo.session import Limits, Sessions

SAMPLES = Path(__file__).parents[2] / "data" / "sample" / "videos"


@contextlib.contextmanager
def serve(checkpoints: Sequence[str], *, host: str, port: int | None, limits: Limits) -> Iterator[str]:
  """Serves the page until the context ends.

  Args:
    checkpoints: run directories, checkpoints, or ``"quickstart"``.
    host: name or address to listen at.
    port: None takes a free one.
    limits: of videos.

  Yields:
    The page's address.

  Raises:
    OSError: a checkpoint is missing, or the port is taken.
    ValueError: a checkpoint is damaged, or none of the systems finds people.
  """
  import gradio as gr

  from vad_jax.demo import page

  models = [checkpoint.load_model(name) for name in checkpoints]
  systems = {f"{m.info['model']['name']} ({name})": m for name, m in zip(checkpoints, models, strict=True)}
  if all(getattr(model.model, "takes_proposals", False) for model in models):
    raise ValueError("these systems classify given people: name a checkpoint that finds people, too")
  samples = sorted(SAMPLES.rglob("*.mp4"))
  with tempfile.TemporaryDirectory(prefix="vad_jax_demo_", ignore_cleanup_errors=True) as folder:
    os.environ["GRADIO_TEMP_DIR"] = folder
    sessions = Sessions(Path(folder))
    gr.set_static_paths([*samples])
    blocks = page.build(page.Actions(systems, sessions, limits), list(systems), samples, limits)
    try:
      _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        max_file_size=limits.size,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=page.theme(),
        css_paths=page.css(),
      )
      yield url
    finally:
      sessions.close_all()
      blocks.close(verbose=False)


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  options = _parse(arguments)
  limits = Limits(options.max_seconds, options.max_megabytes)
  try:
    with serve(options.checkpoint, host=options.host, port=options.port, limits=limits) as url:
      signal.signal(signal.SIGTERM, signal.default_int_handler)  # files are removed then, too
      print(f"Open {url} (Ctrl-C stops)", flush=True)
      threading.Event().wait()
  except ModuleNotFoundError as error:
    if error.name != "gradio":
      raise
    print('error: the page needs Gradio: pip install "vad_jax[demo]"', file=sys.stderr)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
  except KeyboardInterrupt:
    return 0
  return 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.demo", description="Serves a web page that finds the actions in a visitor's video."
  )
  parser.add_argument(
    "--checkpoint",
    nargs="+",
    default=["quickstart"],
    help="run directories, checkpoints, or `quickstart`, to choose from; default: quickstart. Systems that classify "
    "given people get them from the first one that finds people",
  )
  parser.add_argument(
    "--host", default="127.0.0.1", help="where to listen; 0.0.0.0 lets others in; default: %(default)s"
  )
  parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
  parser.add_argument("--max-seconds", type=_positive, default=60, help="longest video; default: %(default)s")
  parser.add_argument("--max-megabytes", type=_positive, default=100, help="largest file; default: %(default)s")
  return parser.parse_args(arguments)


def _positive(text: str) -> float:
  number = float(text)
  if not 0 < number < float("inf"):
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
  return number


if __name__ == "__main__":
  sys.exit(main())
