"""What a new loss costs beside the host's own: a program in the pull request's text, and what it printed."""

import os
import subprocess
import sys
from string import Template

from upstream.clone import template

MEASURED = "(measured)"  # where the text waits for what the program prints
LIMIT = 600  # seconds


def program(imports, losses, same=None):
    """A program for the clone's folder: a table of times and, if asked for, the difference of two losses.

    Args:
        imports: what it begins with.
        losses: from name to an expression, a loss function of two views.
        same: two of that kind that are to agree.
    """
    agreement = Template(template("benchmark_agreement.py")).substitute(same=_dict(same)) if same else ""
    whole = Template(template("benchmark.py")).substitute(imports=imports, losses=_dict(losses), agreement=agreement)
    return whole.strip()


def _dict(losses):
    return "{\n" + "".join(f'    "{name}": {code},\n' for name, code in losses.items()) + "}"


def section(code):
    """The section of the text, without the numbers."""
    return Template(template("benchmark.md")).substitute(measured=MEASURED, program=code).strip()


def measured(code, folder):
    """What the program prints in `folder`, or a sentence that says why there is nothing."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"Not measured: where this was exported the program below took more than {LIMIT} s."
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return f"Not measured: where this was exported the program below ended with `{reason}`."
    return done.stdout.strip()
