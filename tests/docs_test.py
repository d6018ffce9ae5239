"""The documentation site builds without a warning, and needs no other host; figures, commands and examples fit."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("site")
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
  done = subprocess.run(
    command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return folder


def test_nothing_comes_from_other_hosts(site: Path) -> None:
  """Links and badges may; scripts, styles and fonts may not."""
  pages = list(site.rglob("*.html"))
  assert len(pages) > 20
  for page in pages:
    text = page.read_text()
    loaded = re.findall(r"<(?:script|iframe)\b[^>]*\bsrc=[\"']?([^\"' >]+)", text)
    loaded += re.findall(
      r"<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|icon))[^>]*\bhref=[\"']?([^\"' >]+)", text
    )
    assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page


def test_pages_hold_what_they_are_for(site: Path) -> None:
  """Files from elsewhere in the repository are pages, links lead there, and figures are drawn inside of pages."""
  overview = (site / "overview/index.html").read_text()
  assert 'href="../tpu/"' in overview and 'href="../data/#records"' not in overview
  assert "data/sample/exports</a>" not in overview  # a folder is no page
  assert 'id="vad_jax.batch.Batch"' in (site / "api/contract/index.html").read_text()
  for name in ("evad", "class_query", "bmvit", "action_transformer", "st_context"):
    assert "<svg" in (site / f"systems/{name}/index.html").read_text()


def test_figures_are_what_the_script_draws() -> None:
  script = runpy.run_path(str(ROOT / "docs/figures.py"))
  for figure in script["FIGURES"]:
    assert (script["FOLDER"] / f"{figure.__name__}.svg").read_text() == figure(), "run python docs/figures.py"


TEXTS = [*ROOT.glob("docs/**/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md"))]
OPTIONS = {
  option for file in ROOT.glob("vad_jax/**/*.py") for option in re.findall(r'"(--[a-z][\w-]*)"', file.read_text())
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_files_exist(text: Path) -> None:
  """Modules that are run, options given to them, and files of the repository that are named."""
  content = text.read_text().replace("\\\n", " ")
  for module, arguments in re.findall(r"python -m vad_jax\.([\w.]+)([^\n`|#]*)", content):
    source = ROOT / "vad_jax" / module.replace(".", "/")
    assert source.with_suffix(".py").exists() or (source / "__main__.py").exists(), module
    if module != "main":  # whose options are those of absl and of configs
      assert set(re.findall(r" (--[a-z][\w-]*)", arguments)) <= OPTIONS | {"--help"}, module
  for path in re.findall(r"`((?:vad_jax|configs|tests|benchmarks|docs)/[\w./]+)", content):
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", ["start.md", "api/datasets.md"])
def test_examples_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(ROOT)
  blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
  assert blocks
  for block in blocks:
    exec(block, {})
