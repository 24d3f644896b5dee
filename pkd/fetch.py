"""`pkd fetch RECIPE`: data and pretrained weights, brought where there is a network, so that compute nodes need none."""

from pathlib import Path

import torch

from pkd.console import Console
from pkd.data import DataSet, load_data
from pkd.models import read_weights
from pkd.recipe import Model, Recipe
from pkd.sources import DOWNLOADABLE
from pkd.weights_file import is_weights_file


def fetch(recipe: Recipe, console: Console) -> tuple[DataSet, list[Model]]:
    """Download what the recipe names and is not there yet, and read it once. Raises UserError where that fails."""
    wish = {"cache_gib": 0.0}  # nothing is decoded here
    if recipe.data.name in DOWNLOADABLE and recipe.data.path:
        wish["download"] = True
    data = load_data(recipe.data.model_copy(update=wish))
    console.say(f"data {recipe.data.name}{f' in {recipe.data.path}' if recipe.data.path else ''}: "
                f"{len(data.labels)} images of {len(data.classes)} classes")
    models = [level.model for level in recipe.pyramid] + [student.model for student in recipe.students]
    pretrained = list({(model.name, model.weights): model for model in models if model.weights}.values())
    for model in pretrained:
        count = sum(tensor.numel() for tensor in read_weights(model).values())
        where = model.weights if is_weights_file(model.weights) else Path(torch.hub.get_dir(), "checkpoints")
        console.say(f"weights {model.weights} of {model.name}: {count:,} numbers, in {where}")
    if any(not is_weights_file(model.weights) for model in pretrained):
        console.say("compute nodes must see that folder too: export TORCH_HOME there as here")
    return data, pretrained
