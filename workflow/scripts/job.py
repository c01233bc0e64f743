"""First import of every script: finds the library beside the workflow, and makes the process a job.

So a job needs nothing installed but the packages of its environment, also under `--sdm conda`.
"""

import atexit
import os
import shutil
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (ROOT, os.environ.get("PYTHONPATH")) if part)

from retune.gpus import reserve
from retune.runtime import start_job

KEPT = ".kept"
FOLDERS = ("HF_HOME", "HF_HUB_CACHE")  # variables that may hold a path from where Snakemake was started


def start(snakemake) -> None:
    """Send output to the rule's log, keep to its threads and its GPUs; call it before anything heavy is imported.

    Snakemake deletes the outputs of a job that is run again before it starts, and those of one that
    fails.  So that no good result is lost, each is kept, by links that take no space, until
    the next good one; in an object store that is a matter of the bucket's versions.
    """
    stored = settle(snakemake)
    start_job(snakemake.log[0], snakemake.threads)
    if (gpus := snakemake.resources.get("gpu")) is not None:  # the profile counts them
        reserve(gpus)
    if stored:
        return
    outputs, show = [Path(path) for path in snakemake.output], sys.excepthook

    def fail(*error) -> None:
        atexit.unregister(keep)
        show(*error)
        if kept := [str(_kept(path)) for path in outputs if _kept(path).exists()]:
            print("the last good result is kept in", ", ".join(kept), file=sys.stderr)

    sys.excepthook = fail
    atexit.register(keep, outputs)


def settle(snakemake) -> bool:
    """Go to where `results/` is: Snakemake stages the files of an object store under a folder of its own.

    There every path of the config and of the plan leads where it says, as it does without a store.

    Returns:
        whether the results are in an object store.
    """
    folder = snakemake.output[0].rpartition(f"results/{snakemake.wildcards.run}/")[0]
    if not folder:
        return False
    os.environ |= {name: os.path.abspath(os.environ[name]) for name in FOLDERS if name in os.environ}
    for name in ("input", "output", "log"):
        files = getattr(snakemake, name)
        setattr(snakemake, name, type(files)(files, custom_map=lambda path: os.path.relpath(path, folder)))
    os.chdir(folder)
    return True


def keep(outputs: list[Path]) -> None:
    """Link finished outputs into `results/<run>/.kept`, in place of the earlier ones.

    A job that is told to stop ends here too: what it did not finish takes no earlier result's place.
    """
    if not all(path.exists() for path in outputs):
        return
    for path in outputs:
        kept = _kept(path)
        if kept.is_dir():
            shutil.rmtree(kept)
        kept.unlink(missing_ok=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, kept, copy_function=_link)
        else:
            _link(path, kept)


def _kept(path: Path) -> Path:
    run = Path(*path.parts[:2])  # results/<run>
    return run / KEPT / path.relative_to(run)


def _link(source, target) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
