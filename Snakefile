"""retune: raw training data → a better retrieval model.  `snakemake --cores N` runs what config.yaml asks for."""

import os
import sys

from snakemake.utils import min_version

min_version("9.14")

# The library and the wiring, for parsing; scripts find the library by themselves.
sys.path[:0] = [str(workflow.current_basedir), f"{workflow.current_basedir}/workflow"]

from retune import gpus
from store import see_folders_of_other_machines
from wiring import TRAIN, code, wire

# A config that is named on the command line stands alone: config.yaml, the demo, is not mixed in.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/demo.smk"
include: "workflow/rules/ingest.smk"
include: "workflow/rules/split.smk"
include: "workflow/rules/embed.smk"
include: "workflow/rules/mine.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/merge.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/card.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        WIRING.targets(),
