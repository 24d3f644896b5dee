"""The commands; the only place that exits.

Exit codes: 0 done, or stopped by a signal with everything saved; 2 a mistake that the user can mend, said in one
sentence; 3 a hang; 130 Ctrl-C where nothing is saved; 1 what may pass, such as a file server that is away, in one sentence,
and anything else, with the traceback in the rank's log.
"""

import argparse
import errno
import gc
import os
import sys
import traceback
from pathlib import Path

from pkd.console import Console
from pkd.errors import LocalError, PassingError, UserError
from pkd.launcher import Launch, read_launch
from pkd.ways import WAYS

# What a path that a user gave may be: somebody else's, no path at all, or on a disk that takes nothing.
OF_A_PATH = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EROFS}

COMMANDS = {
    "plan": "print who would be where, and how long a step would take; starts nothing",
    "teach": "train the pyramid's teachers",
    "archive": "write the teachers' soft targets down, where views repeat",
    "distill": "train the students from the teachers",
    "evaluate": "read the test split and write summary.json",
    "export": "write students for use elsewhere: safetensors and JSON, ONNX, or a folder for the Hugging Face hub",
    "predict": "classify image files by a run or an export",
    "launch": "run or submit the phases in order, going on where the run stands",
    "status": "tell where a run stands",
    "study": "compare the recipe with its controls, arms by seeds, in one table; goes on where the study stands",
    "report": "write a page about a run or a study, with plots",
    "bench": "measure what the teachers cost on this machine",
    "fetch": "bring the data and the pretrained weights of a recipe, where there is a network",
}
FORMATS = {
    "safetensors": "weights that load into plain torchvision, and a JSON each (the default)",
    "onnx": "one ONNX file, preprocessing and the mean over students within",
    "hub": "a folder in the layout of the Hugging Face hub, with a model card",
}
ON_EVERY_RANK = ("teach", "archive", "distill")
WITH_RECIPE = ("plan", "teach", "archive", "distill", "launch", "study", "bench", "fetch")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="pkd", description="Pyramid knowledge distillation across GPUs.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        own = commands.add_parser(name, help=text, description=text)
        if name in WITH_RECIPE:
            own.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with pkd")
        else:
            own.add_argument("run", type=Path, help={"predict": "a run folder, or what pkd export wrote",
                             "report": "the run folder or a study's"}.get(name, "the run folder"))
        if name in (*WITH_RECIPE, "evaluate", "export"):
            own.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe")
        if name in (*ON_EVERY_RANK, "launch"):
            own.add_argument("--run-folder", type=Path, help="run folder (default: runs/<name of the recipe>)")
        if name in ("teach", "distill"):
            own.add_argument("--steps", type=_positive, help="end after so many optimizer steps: a smoke run")
        if name == "evaluate":
            own.add_argument("--steps", type=_positive, help="read only so many test images: a smoke run")
        if name == "teach":
            own.add_argument("--teacher", metavar="NAME", help="train this one only")
        if name == "archive":
            own.add_argument("--audit", type=_positive, metavar="N", help="ask the teachers for N rows of a finished "
                             "archive again, drawn by chance, and compare")
        if name == "plan":
            own.add_argument("--world", type=_positive, default=1, help="number of ranks")
            own.add_argument("--device", metavar="NAME", help="of every rank, by its data sheet: a100, h100, h200, l40s, "
                             "v100 or cpu (one core); default: this machine's")
            own.add_argument("--ranks-per-node", type=_positive, metavar="N", help="so many each on machines like this one "
                             "(default: all on this one)")
        if name in ("plan", "status", "study"):
            own.add_argument("--json", action="store_true", help="print it as JSON")
        if name in ("export", "predict"):
            own.add_argument("--student", metavar="NAME", help="this one instead of the ensemble")
        if name == "export":
            own.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
            own.add_argument("--random-images", action="store_true", help="onnx: check the file on these, without the "
                             "run's data")
            own.add_argument("--study", type=Path, metavar="DIR", help="hub: a study's folder, whose arms the card states")
            own.add_argument("--format", choices=tuple(FORMATS), default="safetensors", metavar="FORMAT",
                             help="; ".join(f"{form}: {text}" for form, text in FORMATS.items()))
        if name == "report":
            own.add_argument("--to", type=Path, metavar="FILE", help="the page (default: report.html in the folder)")
        if name == "predict":
            own.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="an image file, or a folder with images")
            own.add_argument("--top", type=_positive, default=5, metavar="K", help="so many classes an image (default: 5)")
            own.add_argument("--csv", type=Path, metavar="FILE", help="write them into this new file instead")
            own.add_argument("--trust-code", action="store_true", help="import a class that an export names")
        if name == "bench":
            own.add_argument("--ranks-per-node", type=_positive, default=1, help="processes on this machine")
            own.add_argument("--rounds", type=_positive, default=9, help="how often each program runs")
            own.add_argument("--steps", type=_positive, default=24, help="steps of a run, the first quarter of which "
                             "warms up; with teachers more, where none would be left before the last steps, in which they "
                             "have nothing to answer")
        if name in ("launch", "study"):
            own.add_argument("--on", required=name == "launch", default="here", choices=tuple(WAYS), metavar="WAY",
                             help="; ".join(f"{way}: {text}" for way, text in WAYS.items()))
            own.add_argument("--ranks-per-node", type=_positive, default=1, help="processes a machine, one a GPU")
            own.add_argument("--nodes", type=_positive, default=1, help="machines; slurm only")
            own.add_argument("--dry-run", action="store_true", help="print the commands and scripts, start nothing")
            own.add_argument("--sbatch", action="append", default=[], metavar="OPTION",
                             help="slurm: an option for every job, such as --sbatch=--partition=gpu")
        if name == "study":
            own.add_argument("--seeds", default="3", help="how many, or which: 3, or 0,1,5 (default: 3)")
            own.add_argument("--only-seed", type=_whole, metavar="K", help="work on this one of --seeds: for several "
                             "processes of one study, each on a seed")
            own.add_argument("--arms", metavar="A,B", help="some of alone, top, top-t20, top-ensemble, top-own, peers, "
                             "peers-ensemble, top-long, long-ensemble, peers-long, paper-plain, paper, composed, recipe "
                             "(default: all that suit it)")
            own.add_argument("--arm", action="append", default=[], metavar='NAME="key=value ..."',
                             help="an arm of your own: the recipe with these changes")
            own.add_argument("--study-folder", type=Path, help="default: studies/<name of the recipe>")
            own.add_argument("--table", action="store_true", help="start nothing, show what the results so far say")
        if name == "launch":
            own.add_argument("--phases", help="some of teach,archive,distill,evaluate, with commas (default: all, archive "
                             "only where the recipe's soft_targets is archive)")
            own.add_argument("--teacher", action="append", metavar="NAME",
                             help="teach this one only; of several, a job array's element takes the one of its index")
            own.add_argument("--script", type=Path, help="slurm: your own copy of launch/slurm.sbatch")
    return top


def parse(argv: list[str]) -> argparse.Namespace:
    """argparse takes overrides only in one place; a user may write them before, between and after the options."""
    whole = parser()
    arguments, rest = whole.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        whole.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = arguments.overrides + rest
    return arguments


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    # deepspeed's launcher adds --local_rank=N; the environment says the same.
    arguments = parse([a for a in argv if not a.startswith(("--local_rank", "--local-rank"))])
    console = Console()
    try:
        if arguments.command in ON_EVERY_RANK:
            return train(arguments, read_launch(os.environ))  # to the others what a batch script exports means nothing
        if arguments.command == "launch":
            from pkd.launch import launch as start

            return start(arguments, console)
        if arguments.command == "study":
            from pkd.study.command import study

            return study(arguments, console)
        single(arguments, console)
        return 0
    except UserError as error:
        console.error(f"pkd: {error}")
        return 2
    except PassingError as error:
        console.error(f"pkd: {error}")
        return 1
    except BrokenPipeError:  # whoever read our output has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        if error.errno not in OF_A_PATH or error.filename is None:
            raise
        console.error(f"pkd: {str(error.filename)[:200]!r} cannot be used ({error.strerror}): give another path, or the "
                      "right to it")
        return 2


def single(arguments: argparse.Namespace, console: Console) -> None:
    """The commands that run as one process."""
    if arguments.command == "plan":
        import json

        from pkd.plan import plan
        from pkd.recipe_file import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        found = plan(recipe, arguments.world, Console(quiet=True) if arguments.json else console, arguments.device,
                     per_node=arguments.ranks_per_node)
        if arguments.json:
            console.report(json.dumps(found, indent=2))
    elif arguments.command == "bench":
        from pkd.bench import bench

        bench(arguments.recipe, arguments.overrides, arguments.ranks_per_node, arguments.rounds, arguments.steps, console)
    elif arguments.command == "evaluate":
        from pkd.evaluate import evaluate

        evaluate(arguments.run, console, arguments.overrides, arguments.steps)
    elif arguments.command == "status":
        from pkd.status import status

        status(arguments.run, arguments.json, console)
    elif arguments.command == "report":
        from pkd.report.command import report

        report(arguments.run, arguments.to, console)
    elif arguments.command == "fetch":
        from pkd.fetch import fetch
        from pkd.recipe_file import load_recipe

        fetch(load_recipe(arguments.recipe, arguments.overrides), console)
    elif arguments.command == "export":
        from pkd.export import export

        export(arguments.run, arguments.to, arguments.student, arguments.format, console, arguments.study,
               arguments.overrides, arguments.random_images)
    else:
        from pkd.predict import predict

        predict(arguments.run, arguments.images, arguments.student, arguments.top, arguments.csv, console,
                arguments.trust_code)


def train(arguments: argparse.Namespace, launch: Launch) -> int:
    """`teach`, `archive` or `distill` on one rank of many. Ends the process itself after a failure: other ranks may be
    gone, and the interpreter's own clean-up would wait for them or abort.
    """
    console = Console(quiet=launch.rank != 0, capture=True)
    job = None
    try:
        from pkd.recipe_file import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from pkd.job import Job  # from here on the slow imports

        gc.freeze()  # no collection while it trains, nor the process's end, is to go through all that was imported
        gc.set_threshold(700)  # as usual; __main__ raised it
        teacher = arguments.teacher if arguments.command == "teach" else None
        job = Job(recipe, arguments.run_folder or Path("runs") / recipe.name, arguments.command, launch, console, teacher)
        job.open()
        if arguments.command == "teach":
            from pkd.teach import teach

            outcome = teach(job, arguments.steps)
        elif arguments.command == "archive":
            from pkd.archive import archive
            from pkd.archive_audit import audit

            outcome = audit(job, arguments.audit) if arguments.audit else archive(job)
        elif job.finished_before():
            outcome = "finished before"
        else:
            from pkd.distill import distill
            from pkd.distill_setup import Setup

            outcome = distill(Setup(job, arguments.steps))
        job.close(outcome)
        return 0
    except UserError as error:
        once_a_node = launch.local_rank == 0  # a file may be missing on some nodes only
        _end(console, job, once_a_node or isinstance(error, LocalError), str(error), 2)
    except PassingError as error:
        _end(console, job, True, f"rank {launch.rank} failed: {error}", 1)
    except KeyboardInterrupt:  # the second; whoever pressed it does not want to wait for other ranks
        os._exit(130)
    except Exception as error:  # whatever it is, it is told once, logged whole, and ends this process
        traceback.print_exc()
        console.show_early()
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
            _end(console, job, True, f"rank {launch.rank} ran out of its device's memory ({what}): raise "
                 "placement.accumulation, lower the batch or answer_rows, choose a higher ZeRO stage in deepspeed.students, "
                 "or start more ranks", 2)
        _end(console, job, True, f"rank {launch.rank} failed ({what}); the traceback is in {console.log or 'its output'}", 1)


def _end(console: Console, job, speaks: bool, sentence: str, code: int) -> None:
    """Say it once for the whole job, then leave at once; speaks: whether this rank does, where no store can tell."""
    console.end_progress()
    if job is not None:
        code = job.give_up(sentence, code)
    elif speaks:
        console.error(f"pkd: {sentence}")
    sys.stdout.flush()
    os._exit(code)


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, found {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, found {text!r}")
    return int(text)
