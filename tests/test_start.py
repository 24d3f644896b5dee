"""What a rank does not load while it starts. Both modules are installed here, and each would take it a second or more."""

import subprocess
import sys


def said(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_rank_that_trains_nothing_starts_without_torchs_compiler():
    loaded = "print('torch._dynamo' in sys.modules)"
    found = said(f"import pkd.archive, pkd.evaluate, pkd.teacher, pkd.vision; {loaded}; pkd.vision._ask('cpu'); {loaded}")
    assert found == ["False", "True"], "torchvision gets its answer when it asks"


def test_deepspeed_does_without_mlflow_which_can_be_imported_afterwards():
    found = said("from pkd.ds_config import import_deepspeed as get; get(); print('mlflow' in sys.modules); import mlflow; "
                 "get(); print('mlflow' in sys.modules, mlflow.__name__)")
    assert found[-3:] == ["False", "True", "mlflow"]
