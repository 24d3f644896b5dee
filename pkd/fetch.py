"""`pkd fetch RECIPE`: data and pretrained weights, brought where there is a network, so that compute nodes need none."""

from pathlib import Path

import torch

from pkd.console import Console
from pkd.data import DataSet, load_data
from pkd.errors import UserError
from pkd.models import check_model, models_of, read_weights
from pkd.recipe import Model, Recipe
from pkd.sources import DOWNLOADABLE
from pkd.weights_file import is_weights_file


def fetch(recipe: Recipe, console: Console) -> tuple[DataSet, list[Model]]:
    """Download what the recipe names and is not there yet, and read it once. Raises UserError where that fails."""
    for model in models_of(recipe):
        check_model(model)
    wish = recipe.data.model_copy(update={"cache_gib": 0.0, "download": False})  # nothing is decoded here
    try:
        data = load_data(wish)
    except UserError:
        if not (recipe.data.name in DOWNLOADABLE and recipe.data.path):
            raise
        data = load_data(wish.model_copy(update={"download": True}))
    console.say(f"data {recipe.data.name}{f' in {recipe.data.path}' if recipe.data.path else ''}: "
                f"{len(data.labels)} images of {len(data.classes)} classes"
                + f", {len(data.unlabelled)} of them without a label" * recipe.data.unlabelled)
    pretrained = list({(model.name, model.weights): model for model in models_of(recipe) if model.weights}.values())
    for model in pretrained:
        count = sum(tensor.numel() for tensor in read_weights(model).values())
        where = model.weights if is_weights_file(model.weights) else Path(torch.hub.get_dir(), "checkpoints")
        console.say(f"weights {model.weights} of {model.name}: {count:,} numbers, in {where}")
    if any(not is_weights_file(model.weights) for model in pretrained):
        console.say("compute nodes must see that folder too: export TORCH_HOME there as here")
    return data, pretrained
