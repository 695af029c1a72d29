"""MkDocs hooks: the public modules of each layer on its API page, and the repository's files that pages link to.

Experiment notes and their figures stay where they are. A link from a page to a file outside `docs/` is written as the
relative path in the repository, so that it also works there; the build copies that file below `project/` and adjusts
the link.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = "project"  # folder of the site with the repository's files
LINK = re.compile(r"(\]\()((?![a-z]+:|#|/)[^)#\s]+)")
MODULES = re.compile(r"^<!-- modules of (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every file outside `docs/` that a page links to."""
    root = Path(config.config_file_path).parent
    for path in linked_files(root):
        files.append(File.generated(config, f"{PROJECT}/{path}", abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lists the modules of a layer, and points links to files outside `docs/` to their copies in the site."""
    here, package = page.file.src_uri, Path(config.config_file_path).parent / "pulmo_jax"

    def moved(match: re.Match[str]) -> str:
        target = in_site(resolved(in_repository(here), match[2]))
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(moved, MODULES.sub(lambda match: listing(package, match[1]), markdown))


def listing(package: Path, layer: str) -> str:
    """A `:::` block for each public module of a layer."""
    return "\n".join(f"::: {module}\n    options:\n      heading_level: 2\n" for module in modules(package, layer))


def modules(package: Path, layer: str) -> Iterator[str]:
    """Dotted names of a layer's modules in the order of their paths; packages only where they say something."""
    if (package / f"{layer}.py").is_file():
        yield f"{package.name}.{layer}"
    for path in sorted((package / layer).rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if path.name == "__init__.py" or any(part.startswith("_") for part in parts):
            continue
        yield ".".join(parts)


def linked_files(root: Path) -> list[str]:
    """Files outside `docs/` that a page links to, directly or through a linked Markdown file."""
    found: set[str] = set()
    todo = [path.relative_to(root).as_posix() for path in sorted((root / "docs").rglob("*.md"))]
    while todo:
        page = todo.pop()
        for _, link in LINK.findall((root / page).read_text(encoding="utf-8")):
            target = resolved(page, link)
            if target.startswith("docs/") or target in found or not (root / target).is_file():
                continue
            found.add(target)
            if target.endswith(".md"):
                todo.append(target)
    return sorted(found)


def resolved(page: str, link: str) -> str:
    """A link of a page as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def in_repository(src_uri: str) -> str:
    """Where a file of the site lies in the repository."""
    outside = src_uri.startswith(f"{PROJECT}/")
    return src_uri.removeprefix(f"{PROJECT}/") if outside else f"docs/{src_uri}"


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{PROJECT}/{path}"
