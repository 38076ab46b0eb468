"""Adds this version's state dicts to tests/data/state_dicts.json, which later versions must still load.

    python scripts/checks/make_state_dicts.py

For every method: the state after three steps and the loss of a fourth batch from there, in evaluation mode.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import dystress_plugin

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from test_compatibility import STATES, packed, step, trained


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    versions = json.loads(STATES.read_text()) if STATES.exists() else {}
    states = {}
    for name in dystress_plugin.recipes.METHODS:
        loss = trained(name)
        states[name] = {"state": packed(loss.state_dict()), "value": step(loss.eval(), 3).item()}
    versions[dystress_plugin.__version__] = states
    STATES.parent.mkdir(exist_ok=True)
    text = json.dumps(versions, indent=1)
    STATES.write_text(text + "\n")
    print(f"{STATES}: versions {', '.join(versions)}, {len(text) // 1024} KiB")


if __name__ == "__main__":
    main()
