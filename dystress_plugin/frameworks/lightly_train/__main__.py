"""`python -m dystress_plugin.frameworks.lightly_train pretrain method=dystress ...`: LightlyTrain's command line.

Every command and argument is LightlyTrain's (`help`). Further ranks that Lightning starts come through here as well.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        import dystress_plugin.frameworks.lightly_train  # noqa: F401  registers
    except ImportError as error:
        sys.exit(str(error))
    from lightly_train._cli import _cli_entrypoint

    _cli_entrypoint()
