"""Adaptive temperatures for open_clip (3.3 and 4), which the extra `open-clip` brings.

`python -m dystress_plugin.frameworks.open_clip method=dystress -- ...` trains with open_clip's own program; a loop of
one's own takes `ContrastiveClipLoss` in the place of `open_clip.ClipLoss`.
"""

from dystress_plugin.frameworks.open_clip.loss import ContrastiveClipLoss

__all__ = ["ContrastiveClipLoss"]
