"""What mkdocs does beside its own: pages that live elsewhere in the repository, and Sphinx's roles in docstrings.

The Markdown files are written for a reader of the repository, with links from where they lie. Here they are pages of
one site: a link from one page to another stays one, a link to a source file becomes what it says, with its path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "assets/emoji64/README.md")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)\.?([\w.]+)`")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside ``docs/``, and the pictures that they show."""
    for path in (*ELSEWHERE, "assets/emoji64/loss.png"):
        file = File.generated(config, path, abs_src_path=str(ROOT / path))
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links from where a file lies in the repository into links between pages."""
    path = page.file.src_uri
    folder = posixpath.dirname(path if path in ELSEWHERE else f"docs/{path}")

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        if not target:
            return match[0]
        inside = posixpath.normpath(posixpath.join(folder, target))
        page_path = inside.removeprefix("docs/")
        if files.get_file_from_path(page_path) is not None:
            relative = posixpath.relpath(page_path, posixpath.dirname(path) or ".")
            return f"{image}[{text}]({relative}{anchor})"
        if not (ROOT / inside).exists():
            raise ValueError(f"{path}: {target} leads nowhere")
        return text if text.startswith("`") else f"{text} (`{inside}`)"

    return _LINK.sub(link, markdown)


class Roles(griffe.Extension):
    """Sphinx's roles in docstrings as code, and as links where the site has the name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda match: self._shown(obj, *match.groups()), obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the comment of a dataclass's field, its line of help on the command line, for a docstring."""
        lines = attr.parent.module.lines_collection[attr.filepath] if attr.parent and attr.parent.is_class else []
        if attr.docstring is not None or not attr.lineno or not lines or attr.annotation is None:
            return
        first = attr.lineno - 1
        told = [lines[first].partition("  # ")[2]]
        while not told[-1] and lines[first - 1].startswith("    # "):
            first -= 1
            told.insert(0, lines[first].removeprefix("    # "))
        if text := " ".join(told).strip():
            attr.docstring = griffe.Docstring(text, parent=attr)

    def _shown(self, obj: griffe.Object, short: str, name: str) -> str:
        try:
            path = name if name.startswith("madformer.") else obj.resolve(name)
        except griffe.NameResolutionError:
            path = name
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'
