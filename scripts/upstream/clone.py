"""A clone of a host: its files, and a branch that appears in it as a whole or not at all."""

import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from upstream.edits import Source


@dataclass(frozen=True)
class Plan:
    """A pull request.

    Attributes:
        branch: to be made.
        files: from path within the clone to the whole new text.
        message: of the commit.
        text: of the pull request.
        finish: what the host's own tools add, called with the folder of the finished tree and the paths written there;
            returns further paths to commit.
        benchmark: a program for the finished clone, whose output belongs in the text; see benchmark.py.
    """

    branch: str
    files: dict[str, str]
    message: str
    text: str
    finish: Callable = lambda *_: []
    benchmark: str = ""


class Clone:
    """A git clone with nothing uncommitted in it.

    Raises:
        ValueError: if it is not the top folder of a clone, or not clean.
    """

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        if not (self.folder / ".git").exists():
            raise ValueError(f"--repo {folder} is not a git clone (its top folder, with .git): clone the host first.")
        if changed := self.git("status", "--porcelain"):
            raise ValueError(f"--repo {folder} has uncommitted changes; commit or remove them first:\n{changed}")
        self.head = self.git("rev-parse", "HEAD")

    def source(self, path):
        """A file of the clone, to be edited in memory."""
        file = self.folder / path
        if not file.is_file():
            raise ValueError(f"{path}, which this export needs, is not in {self.folder.name} at {self.head[:8]}.")
        return Source(path, file.read_text(encoding="utf-8"))

    def new(self, path, name, /, *, replaces=False, **values):
        """A file made from the template `name`, where the clone has none unless it is to be replaced."""
        text = Template(template(name)).substitute({key: str(value) for key, value in values.items()})
        return Source(path, text) if replaces else self.derived(Source(path, text), path)

    def derived(self, source, path):
        """What was made from one file, as a new one of another path."""
        if (self.folder / path).exists():
            raise ValueError(f"{path} is in the host already: it has taken this method in, or another of its name.")
        return Source(path, source.text)

    def refuse_branch(self, branch):
        """A ValueError if the branch is there already."""
        if self.git("branch", "--list", branch):
            raise ValueError(f"{self.folder.name} already has a branch {branch}: remove it (git branch -D {branch}).")

    def commit(self, plan):
        """Makes the branch with its one commit and switches to it; returns the commit.

        All of it happens in a tree of its own, so that a failure leaves nothing behind in the clone.
        """
        self.refuse_branch(plan.branch)
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            self.git("worktree", "add", "--quiet", "--detach", str(tree), self.head)
            try:
                for path, text in plan.files.items():
                    (tree / path).parent.mkdir(parents=True, exist_ok=True)
                    (tree / path).write_text(text, encoding="utf-8")
                more = plan.finish(tree, list(plan.files))
                run(["git", "add", "--", *plan.files, *more], tree)
                run(["git", "commit", "--quiet", "-m", plan.message], tree)
                commit = run(["git", "rev-parse", "HEAD"], tree)
            finally:
                self.git("worktree", "remove", "--force", str(tree))
        self.git("branch", plan.branch, commit)
        self.git("switch", "--quiet", plan.branch)
        return commit

    def git(self, *arguments):
        """What git prints."""
        return run(["git", *arguments], self.folder)


def template(name):
    """The text of a template."""
    return (Path(__file__).parent / "templates" / f"{name}.txt").read_text(encoding="utf-8")


def run(command, folder):
    """What a command prints, stripped; a ValueError with its message where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, command[:4]))} failed in {folder}:\n{done.stderr or done.stdout}")
    return done.stdout.strip()
