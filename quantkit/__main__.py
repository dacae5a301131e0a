"""``python -m quantkit``"""

from quantkit.cli.main import run

run()
