"""What mkdocs is told beside mkdocs.yml: pages that are made from the repository, and links that lead out of docs/.

A link to a file of the repository works where the text is read in the repository, and becomes one to a page that shows
the file where it is read on the site. So each text stands once, and no address of a server is needed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
TEXTS = {  # page of the site: file of the repository
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "evidence/results.md": "results/README.md",
    "reference/methods.md": "METHODS.md",
}
PAGES = {source: page for page, source in TEXTS.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".csv": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, then a page for every file that any page links to."""
    for page, source in TEXTS.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/settings.md", content=settings_page()))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        for path, content in notebook_pages(notebook).items():
            files.append(File.generated(config, path, content=content))
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        for target in sorted(outside(file.src_uri, file.content_string)):
            page = place(target)
            if files.get_file_from_path(page) is None:
                shown = File.generated(config, page, **shown_as(target))
                files.append(shown)
                waiting += [shown] if page.endswith(".md") and target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links to files of the repository into links to their pages."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = resolved(here, link[1])
        inside = target.removeprefix("docs/") if target.startswith("docs/") else place(target)
        if not (ROOT / target).exists():
            return link[1]  # which mkdocs reports
        return posixpath.relpath(inside, posixpath.dirname(here) or ".")

    return outside_fences(markdown, lambda text: LINK.sub(moved, text))


def outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """The text with everything changed but code blocks."""
    kept, parts, last = FENCED.finditer(markdown), [], 0
    for block in kept:
        parts += [change(markdown[last : block.start()]), block[0]]
        last = block.end()
    return "".join([*parts, change(markdown[last:])])


def resolved(page: str, link: str) -> str:
    """The file of the repository that a link on a page means."""
    source = TEXTS.get(page) or (
        page.removeprefix("source/").removesuffix(".txt") if page.startswith("source/") else f"docs/{page}"
    )
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def outside(page: str, markdown: str) -> set[str]:
    """Files and folders of the repository that a page links to and that are not under docs/."""
    links = {resolved(page, link) for link in LINK.findall(FENCED.sub("", markdown))}
    return {link for link in links if (ROOT / link).exists() and not link.startswith("docs/")}


def place(target: str) -> str:
    """Where a file of the repository is on the site."""
    if target in PAGES:
        return PAGES[target]
    if PurePosixPath(target).suffix in (".png", ".svg", ".md"):
        return f"source/{target}"
    return f"source/{target.removeprefix('.')}.md"  # a name that begins with a dot is left out


def shown_as(target: str) -> dict[str, str]:
    path = ROOT / target
    if path.suffix in (".png", ".svg"):
        return {"abs_src_path": str(path)}
    if path.is_dir():
        files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        return {"content": f"# {target}\n\n````text\n" + "\n".join(files) + "\n````\n"}
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return {"content": text}
    return {"content": f"# {target}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"}


def settings_page() -> str:
    """Every key of every command, as `--help` lists them."""
    from dystress_plugin.experiment.commands import COMMANDS
    from dystress_plugin.experiment.keys import describe

    lines = [
        "# Settings of the command",
        "",
        "Made from the code: what `dystress COMMAND --help` prints, every key with default, meaning and range.",
    ]
    for name, (_, structure, help_) in COMMANDS.items():
        lines += [
            "",
            f"## dystress {name}",
            "",
            f"{help_[0].upper()}{help_[1:]}.",
            "",
            "| key | default | |",
            "|---|---|---|",
        ]
        lines += [settings_row(line) for line in describe(structure).splitlines()]
    return "\n".join(lines) + "\n"


def settings_row(line: str) -> str:
    assignment, _, meaning = line.strip().partition("  ")
    key, _, default = assignment.partition("=")
    meaning = re.sub(r"([|*_<])", r"\\\1", meaning.strip())
    return f"| `{key}` | `{default}` | {meaning} |"


def notebook_pages(notebook: Path) -> dict[str, str | bytes]:
    """A notebook with its outputs as a page, and the pictures in it."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(notebook))
    name = notebook.stem
    pictures: dict[str, bytes] = resources["outputs"]
    for picture in pictures:
        text = text.replace(f"({picture})", f"({name}_{picture})")
    source = f"\n\nThis page is [{name}.py](../../docs/notebooks/{name}.py) with its outputs; "
    source += f"`docs/notebooks/{name}.ipynb` is the same to open in Jupyter.\n"
    title, _, rest = text.partition("\n\n")
    return {f"notebooks/{name}.md": title + source + "\n" + rest} | {
        f"notebooks/{name}_{picture}": content for picture, content in pictures.items()
    }
