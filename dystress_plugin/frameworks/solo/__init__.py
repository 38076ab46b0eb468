"""solo-learn: our methods in its METHODS, configs, small fixes, and `python -m dystress_plugin.frameworks.solo`.

Nothing here is imported until solo-learn runs: `hydra_plugins/dystress_solo_learn.py` starts it.
"""
