"""The page: what is on it, and what its parts do."""

import math
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vad_jax.checkpoint import Loaded
from vad_jax.demo import timeline
from vad_jax.demo.session import LEAST_SCORE, DemoError, Limits, Session, Sessions, StoppedError, Video, check
from vad_jax.predictions import Prediction

_HERE = Path(__file__).parent
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
_PROGRESS = gr.Progress()
_LIVE = '<div role="status" aria-live="polite">${value}</div>'  # read out when it changes
_NAME_SAMPLES = """() => document.querySelectorAll(".gallery-item").forEach(
  (button, index) => button.setAttribute("aria-label", `Sample ${index + 1}`))"""
_IDLE, _BUSY = gr.Button(interactive=False), gr.Button(interactive=True)  # states of the button that cancels
_NO_PICTURE = gr.Image(value=None, visible=False)
_EMPTY = '<p class="tl-none">Who does what, and when, will stand here.</p>'


class Actions:
  """What the parts of the page do.

  Args:
    systems: models by the name that the visitor chooses.
    sessions: of the visitors.
    limits: of a video.
  """

  def __init__(self, systems: dict[str, Loaded], sessions: Sessions, limits: Limits):
    self._systems, self._sessions, self._limits = systems, sessions, limits
    finders = (model for model in systems.values() if not getattr(model.model, "takes_proposals", False))
    self._finder = next(finders, None)

  def check(self, path: str | None, request: gr.Request) -> str:
    """Says what is known of a video that was chosen, or what is wrong with it."""
    if path is None:
      return ""
    try:
      video = self._checked(path, request)
    except DemoError as error:
      return _error(error)
    height, width = video.size
    return _message(f"{video.path.name}: {video.seconds:.1f} s, {width} × {height}, {video.fps:.4g} frames a second.")

  def find(
    self,
    path: str | None,
    system: str,
    actor: float,
    action: float,
    request: gr.Request,
    progress: gr.Progress = _PROGRESS,
  ) -> list[Any]:
    """Finds people and actions; answers for all outputs of the page."""
    begun = time.monotonic()
    progress(0, desc="Preparing the model")
    try:
      if path is None:
        raise DemoError("Choose a video first.")
      session, video = self._session(request), self._checked(path, request)
      result = session.find(self._systems[system], self._finder, video, (actor, action), _shown_in(progress))
    except StoppedError:
      return _nothing(_message("Cancelled."))
    except (DemoError, OSError, ValueError) as error:
      return _nothing(_error(error))
    return _outputs(result, video.seconds, f"Done in {time.monotonic() - begun:.0f} s")

  def choose(self, actor: float, action: float, request: gr.Request, progress: gr.Progress = _PROGRESS) -> list[Any]:
    """Shows the result at other thresholds."""
    try:
      chosen = self._session(request).choose((actor, action), _shown_in(progress))
    except StoppedError:
      return _nothing(_message("Cancelled."))
    return _outputs(*chosen, "Drawn again") if chosen else [gr.skip()] * len(_nothing(""))

  def look(self, request: gr.Request, event: gr.EventData) -> tuple[gr.Image, str]:
    """Shows what was clicked on the timeline."""
    clicked = event._data
    try:
      path, caption = self._session(request).look(clicked["person"], clicked["action"], clicked["time"])
    except DemoError as error:
      return _NO_PICTURE, _message(str(error))
    return gr.Image(value=str(path), visible=True), _message(caption)

  def cancel(self, request: gr.Request) -> tuple[str, gr.Button]:
    """Stops the visitor's work."""
    self._session(request).stop()
    return _message("Cancelled."), _IDLE

  def leave(self, request: gr.Request) -> None:
    """Forgets a visitor."""
    self._sessions.close(str(request.session_hash))

  def _session(self, request: gr.Request) -> Session:
    return self._sessions.of(str(request.session_hash))

  def _checked(self, path: str, request: gr.Request) -> Video:
    self._sessions.keep(str(request.session_hash), Path(path))
    return check(Path(path), self._limits)


def build(actions: Actions, systems: Sequence[str], samples: Sequence[Path], limits: Limits) -> gr.Blocks:
  """Lays out the page."""
  most = f"at most {limits.seconds:g} s and {limits.megabytes:g} MB"
  with gr.Blocks(title="Video action detection", analytics_enabled=False, fill_width=True) as page:
    gr.HTML("<h1>Video action detection</h1><p>Who is doing what, where, in a video.</p>", elem_id="title")
    with gr.Row(elem_id="columns"):
      with gr.Column(scale=3, min_width=300):
        video = gr.Video(
          label=f"Video ({most})", sources=["upload"], include_audio=True, height=210, buttons=[], elem_id="video"
        )
        if samples:
          gr.Examples([str(sample) for sample in samples], video, label="Samples", cache_examples=False)
        system = gr.Radio(list(systems), value=systems[0], label="System", elem_id="system")
        sliders = [
          gr.Slider(LEAST_SCORE, 0.95, default, step=0.05, label=f"{kind} score, at least", elem_id=f"{kind.lower()}")
          for kind, default in (("Person", 0.5), ("Action", 0.3))
        ]
        with gr.Row():
          find = gr.Button("Find actions", variant="primary", elem_id="find", scale=2, min_width=120)
          cancel = gr.Button("Cancel", interactive=False, elem_id="cancel", min_width=90)
        status = gr.HTML(html_template=_LIVE, elem_id="status")
      with gr.Column(scale=5, min_width=320):
        result = gr.Video(label="Result", interactive=False, buttons=[], elem_id="result")
        with gr.Row():
          files = [
            gr.DownloadButton(f"Download {kind}", interactive=False, size="md", min_width=90, elem_id=kind.lower())
            for kind in ("CSV", "JSON", "mp4")
          ]
      with gr.Column(scale=4, min_width=320):
        rows = gr.HTML(
          _EMPTY,
          js_on_load=(_HERE / "timeline.js").read_text(encoding="utf-8"),
          label="Timeline",
          show_label=True,
          container=True,
          padding=True,
          elem_id="timeline",
        )
        caption = gr.HTML(html_template=_LIVE, elem_id="caption")
        picture = gr.Image(label="Attention map", visible=False, buttons=["fullscreen"], elem_id="map")
    outputs = [status, result, rows, caption, picture, *files, cancel]
    started = find.click(lambda: _BUSY, None, cancel, queue=False, api_visibility="private")
    work = started.then(
      actions.find,
      [video, system, *sliders],
      outputs,
      show_progress_on=[result],
      api_visibility="private",
      **_ONE_AT_A_TIME,
    )
    cancel.click(actions.cancel, None, [status, cancel], cancels=[work], queue=False, api_visibility="private")
    gr.on(
      [slider.change for slider in sliders],
      *(actions.choose, sliders, outputs),
      trigger_mode="always_last",
      show_progress_on=[result],
      api_visibility="private",
      **_ONE_AT_A_TIME,
    )
    video.change(actions.check, video, status, queue=False, api_visibility="private")
    rows.select(actions.look, None, [picture, caption], api_visibility="private")
    page.load(None, js=_NAME_SAMPLES)
    page.unload(actions.leave)
  return page


def theme() -> gr.Theme:
  """Colours and fonts; none come from other hosts."""
  return gr.themes.Default(
    primary_hue="indigo", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
  )


def css() -> Path:
  """The style sheet."""
  return _HERE / "page.css"


def _shown_in(progress: gr.Progress) -> Callable[[float], None]:
  """Shows the share that is done, and how long the rest will take."""
  begun = time.monotonic()
  first = math.nan

  def show(share: float) -> None:
    nonlocal begun, first
    if math.isnan(first):  # the model was compiled until now
      begun, first = time.monotonic(), share
    left = (time.monotonic() - begun) / max(share - first, 1e-9) * (1 - share)
    progress(share, desc=f"About {left:.0f} s left" if share > first else "Finding people and actions")

  return show


def _outputs(result: Prediction, seconds: float, done: str) -> list[Any]:
  people = {int(person) for keyframe in result.keyframes for person in keyframe.person}
  actions = {action.id for keyframe in result.keyframes for each in keyframe.actions for action in each}
  files = [gr.DownloadButton(value=str(path), interactive=True) for path in (result.csv, result.json, result.video)]
  found = f"{done}: {len(people)} people, {len(actions)} kinds of action."
  hint = '<p class="tl-none">Click a person, an action or a bar to see what the system looked at.</p>'
  return [_message(found), str(result.video), timeline.html(result, seconds), hint, _NO_PICTURE, *files, _IDLE]


def _nothing(status: str) -> list[Any]:
  return [status, None, _EMPTY, "", _NO_PICTURE, *[gr.DownloadButton(value=None, interactive=False)] * 3, _IDLE]


def _message(text: str) -> str:
  return f'<p class="status">{escape(text)}</p>'


def _error(error: Exception) -> str:
  return f'<p class="status error">{escape(str(error))}</p>'
