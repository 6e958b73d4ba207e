"""The small models that ship with the package: components stored once, put together to pipeline folders at first use."""

from __future__ import annotations

from pathlib import Path

MODELS_FOLDER = Path(__file__).parents[1] / "assets" / "models"
COMPONENTS_FOLDER = MODELS_FOLDER / "components"


def find_component(name_or_folder: str) -> Path:
    """The folder of one network: a component of the package, or a local folder.

    Args:
        name_or_folder: `scene-clip`, `svd-unet`, ..., or a folder with a config.json.

    Returns:
        The folder; it holds config.json, and weight files if the network has been trained.

    Raises:
        ValueError: If there is neither such a component nor such a folder.
    """
    for folder in (COMPONENTS_FOLDER / name_or_folder, Path(name_or_folder).expanduser()):
        if (folder / "config.json").is_file():
            return folder
    names = ", ".join(sorted(folder.name for folder in COMPONENTS_FOLDER.iterdir()))
    raise ValueError(f"{name_or_folder} is no folder with a config.json; give one, or one of {names}.")
