"""Makes pages of files that live elsewhere in the repository, so that nothing is written twice.

Links in all pages are those of the repository, which work on its web page as well. Here they lead to the page that a
file became, or to a copy of the file where it is none; of links to folders, only the text stays.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
  "README.md": "overview.md",
  "CONTRIBUTING.md": "contributing.md",
  "CHANGELOG.md": "changelog.md",
  "data/README.md": "data.md",
}
_ORIGINS = {page: source for source, page in PAGES.items()}


def on_files(files: Files, *, config: Any) -> Files:
  """Adds the files of `PAGES`."""
  for source, page in PAGES.items():
    files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
  return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
  """Makes links of the repository into links of the site."""
  here = page.file.src_uri
  origin = _ORIGINS.get(here, f"docs/{here}")

  def replace(link: re.Match[str]) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    if (ROOT / path).is_dir():
      return text or link[0]
    if not (ROOT / path).exists():
      return link[0]  # to be refused as a broken link
    if path in PAGES:
      path = PAGES[path]
    elif path.startswith("docs/"):
      path = path.removeprefix("docs/")
    elif not files.get_file_from_path(path):
      files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    start = "" if text is None else f"[{text}"
    return f"{start}]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{anchor})"

  # The text is missing where it is a picture, whose own link was met before.
  return re.sub(r"(?:\[([^\[\]]*))?\]\(([^)#:\s]+)(#[^)\s]*)?\)", replace, markdown)
