"""What comes with quantkit: the demo model and the bundled calibration texts."""

from pathlib import Path

_HERE = Path(__file__).parent


def demo() -> Path:
    """Folder of the demo model (its card is beside the weights)."""
    return _HERE / "demo"


def calibration() -> Path:
    """Folder of the bundled texts: inside the installed package, or at the top of a checkout."""
    installed = _HERE / "calibration"
    return installed if installed.is_dir() else _HERE.parents[1] / "calibration"
