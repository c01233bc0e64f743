# The wiring that all rules share, and what wildcards may stand for.

WIRING = wire(config, workflow.overwrite_configfiles or workflow.configfiles)
ENVIRONMENT = WIRING.environment


wildcard_constraints:
    run=WIRING.runs,
    model="base|miner|tuned|merged",
    benchmark=WIRING.benchmarks,
    part=r"queries|texts-\d+-of-\d+",
