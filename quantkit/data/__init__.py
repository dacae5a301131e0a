"""What comes with quantkit: the demo model, the bundled calibration texts, the recipes,
the words of the report and the page of the server."""

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


def report() -> Path:
    """Folder with the words (one file per language) and the style of the verification report."""
    return _HERE / "report"


def page() -> Path:
    """Folder with the files of the page that ``quantkit serve`` shows."""
    return _HERE / "page"


def _beside(name: str) -> Path:
    installed = _HERE / name
    return installed if installed.is_dir() else _HERE.parents[1] / name
