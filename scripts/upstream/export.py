"""Writes a method as a pull request for lightly or solo-learn: a branch of your clone, with one commit.

python scripts/upstream/export.py lightly --repo ../lightly --method dystress
python scripts/upstream/export.py solo-learn --repo ../solo-learn --method dystress

The formulas stand in templates, which a test compares with this package; everything else comes as far as possible from
the host's own files. The branch starts from the host's default branch, whatever is checked out, and the clone stays
where it is. Either the branch exists afterwards, or all is as before. The text of the pull request is written beside
the clone.
"""

import argparse
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks for modules beside a script first, where lightly.py would hide the host.
    sys.path[0] = str(Path(__file__).parents[1])

import dystress_plugin
from upstream import lightly, solo_learn
from upstream.clone import Clone

HOSTS = {"lightly": lightly, "solo-learn": solo_learn}


def export(host, method, folder):
    """Makes the branch.

    Args:
        host: in `HOSTS`.
        method: in that host's `METHODS`.
        folder: of the clone.

    Returns:
        (branch, commit, path of the pull request's text).

    Raises:
        ValueError: where the clone has the branch, or a file does not fit; nothing is changed then.
    """
    if method not in HOSTS[host].METHODS:
        raise ValueError(f"method={method!r}: {host} has an export of {', '.join(HOSTS[host].METHODS)}.")
    clone = Clone(folder)
    command = f"python scripts/upstream/export.py {host} --repo {clone.folder.name} --method {method}"
    plan = HOSTS[host].plan(clone, method, command, (dystress_plugin.__version__, _own_commit()))
    text = clone.folder.with_name(f"{clone.folder.name}-{method}.PR.md")
    return plan.branch, clone.commit(plan, text), text


def _own_commit():
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("--repo", required=True, help="clone of the host")
    parser.add_argument(
        "--method",
        default="dystress",
        help="; ".join(f"{host}: {', '.join(module.METHODS)}" for host, module in HOSTS.items()),
    )
    chosen = parser.parse_args(arguments)
    try:
        branch, commit, text = export(chosen.host, chosen.method, chosen.repo)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"branch {branch} at {commit[:8]}\npull request text in {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
