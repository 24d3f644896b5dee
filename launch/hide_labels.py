"""A set of few labels to try data.unlabelled on: scikit-learn's digits, of whose training images all but some lose theirs.

    .venv/bin/python launch/hide_labels.py --labels 300 --to data/digits-300.npz
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np

from pkd.data import load_data
from pkd.files import write_bytes
from pkd.recipe import Data


def hidden(labels: np.ndarray, keep: int) -> np.ndarray:
    """bool [n]: which of them to hide, so that every class keeps as many, `keep` in all but for a remainder."""
    out, draw = np.ones(len(labels), bool), np.random.default_rng(0)
    classes = np.unique(labels)
    for label in classes:
        out[draw.permutation(np.flatnonzero(labels == label))[:keep // len(classes)]] = False
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=300)
    parser.add_argument("--to", type=Path, default=Path("data/digits-300.npz"))
    arguments = parser.parse_args(argv)
    data = load_data(Data(name="digits"))
    least, most = len(data.classes), len(data.splits["train"])
    if not least <= arguments.labels <= most:
        print(f"hide_labels: --labels is {arguments.labels}, but there are {least} classes and {most} training images: ask "
              f"for {least} to {most}", file=sys.stderr)
        return 2
    if arguments.to.exists():
        print(f"hide_labels: {arguments.to} is there already: delete it, or give another name with --to", file=sys.stderr)
        return 2
    x, y = data.images[np.arange(len(data.labels))].numpy(), data.labels.numpy()
    train, validation, test = (data.splits[part].numpy() for part in ("train", "validation", "test"))
    hide = hidden(y[train], arguments.labels)
    whole = io.BytesIO()
    np.savez(whole, x_train=x[train[~hide]], y_train=y[train[~hide]], x_unlabelled=x[train[hide]],
             x_validation=x[validation], y_validation=y[validation], x_test=x[test], y_test=y[test],
             classes=np.array(data.classes))
    write_bytes(arguments.to, whole.getvalue())
    print(f"{arguments.to}: {(~hide).sum()} training images with a label, {hide.sum()} without, {len(validation)} for "
          f"validation, {len(test)} for testing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
