"""peftc demo."""

from peftc.cli import options as o
from peftc.cli.command import command


@command(source=False)
def demo(*, output_dir: o.OutputDir = None, seed: o.Seed = 0, device: o.Device = "auto") -> None:
    """Run the main job on a small model in a minute, offline.

    \b
    Example:
      peftc demo
    """
