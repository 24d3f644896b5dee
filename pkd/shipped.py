"""Files that come with pkd: recipes (launch/recipes), Slurm scripts (launch), DeepSpeed configurations (ds_configs).

In a checkout or an editable install they lie at the repository's top; in a wheel, inside the package (pyproject.toml).
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = {"recipes": ("launch/recipes", "shipped_recipes"), "ds_configs": ("ds_configs", "shipped_ds_configs"),
           "launch": ("launch", "shipped_launch")}


def shipped_folder(kind: str) -> Path:
    in_checkout, in_package = FOLDERS[kind]
    packaged = HERE / in_package
    return packaged if packaged.is_dir() else HERE.parent / in_checkout


def shipped_file(kind: str, name: str) -> Path | None:
    path = shipped_folder(kind) / name
    return path if is_file(path) else None


def is_file(path: Path) -> bool:
    """Whether a path of the user's names a file, however strange it is."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or with a zero byte in it
        return False


def shipped_names(kind: str) -> list[str]:
    return sorted(path.stem for path in shipped_folder(kind).glob("*.*") if path.suffix in (".yaml", ".json"))
