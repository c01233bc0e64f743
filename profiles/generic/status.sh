#!/bin/sh
# What became of a job of SLURM, in the words of snakemake-executor-plugin-cluster-generic.
state=$(scontrol show job --oneliner "$1" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
: "${state:=$(sacct -X -n -P -o State -j "$1" 2>/dev/null | cut -d' ' -f1)}" # the controller forgets finished jobs
case $state in
COMPLETED) echo success ;;
BOOT_FAIL | CANCELLED | DEADLINE | FAILED | NODE_FAIL | OUT_OF_MEMORY | PREEMPTED | TIMEOUT) echo failed ;;
*) echo running ;;
esac
