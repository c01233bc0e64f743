"""The plan that every rule asks: where its inputs lie, which settings it gets, which code it runs."""

import re
from pathlib import Path

from retune.data.files import expand as expand_files
from retune.experiment import load as load_experiment
from retune.fingerprint import fingerprint
from retune.plan import TRAIN, Node, Plan
from retune.runtime import UserError


def plan():
    """The validated plan; on mistakes in the config, one line for each and nothing else."""
    files = [str(file) for file in workflow.overwrite_configfiles or workflow.configfiles]
    try:
        return Plan(load_experiment(config, files))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


PLAN = plan()
SCRIPTS = Path(workflow.current_basedir).parent / "scripts"
ENVIRONMENT = f"../../envs/{PLAN.config(PLAN.main).environment}.yaml"


wildcard_constraints:
    run="|".join(map(re.escape, PLAN.runs)),
    model="base|miner|tuned|merged",
    benchmark="|".join(map(re.escape, dict.fromkeys(b for run in PLAN.runs for b in PLAN.benchmarks(run)))) or "none",
    part=r"queries|texts-\d+-of-\d+",


def code(script):
    """Fingerprint of a script and of the library modules that it reaches."""
    return fingerprint(SCRIPTS / f"{script}.py")


def node(rule, *labels):
    """The artifact that a job makes: a function of its wildcards."""
    return lambda wildcards: Node(wildcards.run, rule, tuple(getattr(wildcards, label, label) for label in labels))


def settings(rule, *labels):
    """The config values of a job's artifact."""
    return lambda wildcards: PLAN.settings(node(rule, *labels)(wildcards))


def made(rule, file=""):
    """Path of another artifact of the same run."""
    return lambda wildcards: PLAN.path(Node(wildcards.run, rule), file)


def raw_files(patterns, key):
    """Files behind patterns; a file that a rule makes need not be there yet."""
    produced = [pattern for pattern in patterns if str(pattern).startswith("results/")]
    try:
        return produced + [str(f) for f in expand_files([p for p in patterns if p not in produced], key)]
    except UserError as error:
        raise WorkflowError(str(error)) from None


def weights(reference):
    """The files of a model which lies in a folder here, so that a new model there is noticed."""
    folder = Path(reference).expanduser()
    if ":" in reference or not folder.is_dir():
        return []
    return sorted(str(file) for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))


def model_files(wildcards, label):
    """What a job that loads a model must wait for."""
    made_here = PLAN.model_node(wildcards.run, label)
    return [PLAN.path(made_here)] if made_here else weights(PLAN.embedder(wildcards.run, label)["model"])
