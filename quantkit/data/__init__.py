"""What comes with quantkit: the demo model, the bundled calibration texts and the recipes."""

from pathlib import Path

_HERE = Path(__file__).parent


def demo() -> Path:
    """Folder of the demo model (its card is beside the weights)."""
    return _HERE / "demo"


def calibration() -> Path:
    """Folder of the bundled texts: inside the installed package, or at the top of a checkout."""
    return _beside("calibration")


def recipes() -> Path:
    """Folder of the recipes: inside the installed package, or at the top of a checkout."""
    return _beside("recipes")


def _beside(name: str) -> Path:
    installed = _HERE / name
    return installed if installed.is_dir() else _HERE.parents[1] / name
