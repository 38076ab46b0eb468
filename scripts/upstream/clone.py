"""A clone of a host: the files of its default branch, and a branch that appears in it as a whole or not at all."""

import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from upstream.edits import Source

DEFAULT_BRANCHES = ("refs/remotes/origin/HEAD", "refs/heads/main", "refs/heads/master")


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
    """

    branch: str
    files: dict[str, str]
    message: str
    text: str
    finish: Callable = lambda *_: []


class Clone:
    """A git clone. What is checked out or changed in it is neither read nor touched.

    Raises:
        ValueError: if it is not the top folder of a clone, or has no default branch.

    Attributes:
        folder: of the clone.
        head: the commit of the host's default branch, which every branch starts from.
    """

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        if not (self.folder / ".git").exists():
            raise ValueError(f"--repo {folder} is not a git clone (its top folder, with .git): clone the host first.")
        found = self.git("for-each-ref", "--format=%(refname)", *DEFAULT_BRANCHES).splitlines()
        if not found:
            raise ValueError(
                f"--repo {folder} does not say which branch is the host's default: git remote set-head origin --auto."
            )
        self.head = self.git("rev-parse", min(found, key=DEFAULT_BRANCHES.index))

    def source(self, path):
        """A file of the host's default branch, to be edited in memory."""
        text = self._text(path)
        if text is None:
            raise ValueError(f"{path}, which this export needs, is not in {self.folder.name} at {self.head[:8]}.")
        return Source(path, text)

    def new(self, path, name, /, *, replaces=False, **values):
        """A file made from the template `name`, where the clone has none unless it is to be replaced."""
        text = Template(template(name)).substitute({key: str(value) for key, value in values.items()})
        return Source(path, text) if replaces else self.derived(Source(path, text), path)

    def derived(self, source, path):
        """What was made from one file, as a new one of another path."""
        if self._text(path) is not None:
            raise ValueError(f"{path} is in the host already: it has taken this method in, or another of its name.")
        return Source(path, source.text)

    def refuse_branch(self, branch):
        """A ValueError if the branch is there already."""
        if self.git("branch", "--list", branch):
            raise ValueError(f"{self.folder.name} already has a branch {branch}: remove it (git branch -D {branch}).")

    def commit(self, plan, written=None):
        """Makes the branch with its one commit; returns the commit.

        All of it happens in a tree of its own, so that the clone stays on its branch and a failure leaves nothing.

        Args:
            plan: of the branch.
            written: path where the plan's text goes; None for nowhere.
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
        if written:
            written.write_text(plan.text, encoding="utf-8")
        self.git("branch", "--no-track", plan.branch, commit)
        return commit

    def _text(self, path):
        """A file of the host's default branch to the last character; None where it has none."""
        command = ["git", "show", f"{self.head}:{path}"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, check=False)
        return None if done.returncode else done.stdout.decode()

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
