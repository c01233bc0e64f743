# The wiring that all rules share, and what wildcards may stand for.

WIRING = wire(config, workflow.overwrite_configfiles or workflow.configfiles)
ENVIRONMENT = WIRING.environment
# Two such jobs run side by side: one loads while the other computes.
HALF = max(1, (workflow.cores or 2) // 2)


wildcard_constraints:
    run=WIRING.runs,
    model="base|miner|tuned|merged",
    judged="(base|tuned|merged)(-sparse|-colbert|-hybrid)?",
    benchmark=WIRING.benchmarks,
    part=r"queries|texts-\d+-of-\d+",
    shard=r"\d+-of-\d+",
