"""A run's figures in the user's own tracker: TensorBoard, Weights & Biases (offline) or MLflow, inside the run folder.

accelerate's tracker classes write them, without its Accelerator, whose state would make process groups of its own.
"""

import importlib.util
import json
import logging
import os
from pathlib import Path

from pkd.errors import UserError
from pkd.files import read_json, write_json
from pkd.recipe import Recipe

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}  # module: what pip installs
LONGEST = 500  # characters of a setting; MLflow drops longer ones


def check_tracker(kind: str | None) -> None:
    """Raises UserError where the recipe's tracker is not installed."""
    if kind and importlib.util.find_spec(kind) is None:
        raise UserError(f"tracker is {kind}, but that package is not installed here: run pip install {PACKAGES[kind]}, or "
                        "leave tracker out")


def figures(line: dict, prefix: str = "") -> dict[str, float]:
    """A line of metrics.jsonl by names such as "validation/mobile/accuracy" and "busy/0", without what is null."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            flat |= figures(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def settings(tree: dict | list, prefix: str = "") -> dict[str, str | float | bool | None]:
    """A recipe by names such as "students.0.lr", as an override has them; lists without sections in them as JSON."""
    flat: dict[str, str | float | bool | None] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            flat |= settings(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
            flat[f"{prefix}{key}"] = text[:LONGEST] if isinstance(text, str) else text
    return flat


class Tracker:
    """A tracker's run, which every start of the run folder goes on with; written by one process.

    trackers/<kind>.json notes its id and the last optimizer step that it has. Raises UserError where it cannot be started.
    """

    def __init__(self, kind: str, folder: Path, recipe: Recipe):
        self.note = folder / "trackers" / f"{kind}.json"
        noted = read_json(self.note) if self.note.exists() else None
        self.step = noted["step"] if noted else -1
        try:
            self.tracker = _started(kind, self.note.parent.resolve(), recipe.name, noted)
            if noted is None:
                self.tracker.store_init_configuration(settings(recipe.model_dump(mode="json")))
        except Exception as error:  # whatever a package of the user's choice says of its version or its settings
            raise UserError(f"tracker {kind} could not be started in {self.note.parent} ({type(error).__name__}: {error}): "
                            f"try another version of {PACKAGES[kind]}, or leave tracker out") from error
        self.run = {"wandb": lambda: self.tracker.tracker.id, "mlflow": lambda: self.tracker.tracker.info.run_id,
                    "tensorboard": lambda: recipe.name}[kind]()
        self._write_note()

    def log(self, line: dict) -> None:
        """Add a line of metrics.jsonl, unless the tracker has had that step: after a crash an epoch is computed again."""
        if line["step"] > self.step:
            self.tracker.log(figures(line), step=line["step"])
            self.step = line["step"]
            self._write_note()

    def close(self) -> None:
        self.tracker.finish()

    def _write_note(self) -> None:
        write_json(self.note, {"run": self.run, "step": self.step})


def _started(kind: str, folder: Path, name: str, noted: dict | None):
    """accelerate's tracker of that kind, everything of it in `folder`, nothing sent anywhere."""
    from accelerate import tracking

    tracking.logger = logging.getLogger(tracking.__name__)  # accelerate's own asks for its state, and so do its decorators
    for key in [key for key in os.environ if key.startswith(f"{kind.upper()}_")]:
        del os.environ[key]  # the user's settings for other runs would lead this one elsewhere
    tracker = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[kind](tracking, folder, name, noted)
    tracker.main_process_only = False
    tracker.start()
    return tracker


def _tensorboard(tracking, folder: Path, name: str, noted: dict | None):
    purge = {"purge_step": noted["step"] + 1} if noted else {}  # what a crash left beyond that is not shown
    return tracking.TensorBoardTracker(name, folder / "tensorboard", **purge)


def _wandb(tracking, folder: Path, name: str, noted: dict | None):
    for key in ("CACHE", "CONFIG", "DATA"):
        os.environ[f"WANDB_{key}_DIR"] = str(folder / "wandb" / key.lower())
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    import wandb

    # The process's output is pkd's, and of the machine and the code only what pkd itself writes down is kept.
    quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True,
                           disable_code=True, save_code=False)
    return tracking.WandBTracker(name, name=name, id=noted and noted["run"], mode="offline", dir=str(folder), settings=quiet)


def _mlflow(tracking, folder: Path, name: str, noted: dict | None):
    # A store of plain files: a run folder often lies on a network's file system, where SQLite does not lock.
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    import mlflow

    mlflow.set_tracking_uri((folder / "mlflow").as_uri())
    return tracking.MLflowTracker(name, (folder / "mlflow").as_uri(), run_id=noted and noted["run"], run_name=name)
