"""What Hydra finds when any program starts: it adds our methods and configs where that program is solo-learn.

Hydra imports this module in every program of an environment that has the package, so it must cost nothing: no torch,
nothing of ours until it is certain that solo-learn is running.
"""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class DystressSoloLearn(SearchPathPlugin):
    """Registers with solo-learn, if its scripts have imported it before `hydra.main` starts, as all of them do."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if "solo.methods" not in sys.modules:
            return
        from dystress_plugin.frameworks.solo.registration import CONFIGS, register

        if register():
            search_path.append("dystress_plugin", CONFIGS)
