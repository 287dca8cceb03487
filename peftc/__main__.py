"""``python -m peftc``, so that launchers that start modules can start peftc."""

from peftc.cli.app import main

main()
