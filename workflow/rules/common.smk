# The wiring that all rules share, and what wildcards may stand for.

STORE = workflow.storage_settings.default_storage_provider
WIRING = wire(config, workflow.overwrite_configfiles or workflow.configfiles, stored=STORE is not None)
ENVIRONMENT = WIRING.environment
# Two such jobs run side by side: one loads while the other computes.
HALF = max(1, (workflow.cores or 2) // 2)
# On one machine a job asks for no more GPUs than there are, and waits for those that others use; `--resources gpu=1`
# lets the workflow have fewer.
if workflow.is_main_process and workflow.local_exec and workflow.nodes is None:
    os.environ[gpus.LENDS] = "1"  # for the jobs
    if "gpu" not in workflow.global_resources:
        workflow.register_resource("gpu", len(gpus.visible()))
GPUS = int(workflow.global_resources["gpu"].value) if "gpu" in workflow.global_resources else 0
# The threads of a job with one GPU: as many such jobs run side by side as there are GPUs.  Without any it has them all.
SHARE = max(1, (workflow.cores or 1) // max(1, GPUS)) if workflow.local_exec else 1

if STORE == "s3":
    see_folders_of_other_machines()


wildcard_constraints:
    run=WIRING.runs,
    model="base|miner|tuned|merged",
    stage="train|merge",
    judged=r"(base|tuned|merged)(-sparse|-colbert|-hybrid|-dense\+sparse)?",
    benchmark=WIRING.benchmarks,
    part=r"queries|texts-\d+-of-\d+",
    shard=r"\d+-of-\d+",
