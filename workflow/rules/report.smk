def reported_tables(run):
    """What the report reads, by name; what the config switches off is absent."""
    plan, config = PLAN, PLAN.config(run)
    ingest, split = Node(run, "ingest"), Node(run, "split")
    found = {name: plan.path(ingest, f"{name}.parquet") for name in ("texts", "queries", "rejected")}
    found |= {name: plan.path(split, f"{name}.parquet") for name in ("lengths", "bins")}
    found |= {"pairs": plan.path(plan.pairs(run)), "config": plan.path(Node(run, "config"))}
    if config.train:
        found["history"] = plan.path(Node(run, "train"), "history.parquet")
    if config.score and config.reranker.fit:
        found["teacher_history"] = plan.path(Node(run, "fit"), "history.parquet")
    if plan.benchmarks(run):
        found |= {"metrics": plan.path(Node(run, "metrics")), "benchmarks": benchmark_tables(run)}
        found["runs"] = judged_runs(run)
    others = [other for other in plan.runs if other != run and plan.benchmarks(other)]
    found["variants"] = {other: plan.path(Node(other, "metrics")) for other in others}
    return found


def report_inputs(wildcards):
    def paths(value):
        return [path for item in value.values() for path in paths(item)] if isinstance(value, dict) else [value]

    merged = [PLAN.path(Node(wildcards.run, "merge"))] if PLAN.config(wildcards.run).merge else []
    return paths(reported_tables(wildcards.run)) + merged


localrules:
    config,
    report,


rule config:
    output:
        "results/{run}/config.yaml",
    log:
        "logs/{run}/config.log",
    conda:
        ENVIRONMENT
    params:
        settings=settings("config"),
        code=code("config"),
    script:
        "../scripts/config.py"


rule report:
    input:
        report_inputs,
    output:
        report(
            "results/{run}/report/index.html",
            caption="../report/report.rst",
            category="Report",
            labels={"run": "{run}"},
        ),
    log:
        "logs/{run}/report.log",
    benchmark:
        "benchmarks/{run}/report.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("report"),
        tables=lambda wildcards: reported_tables(wildcards.run),
        # What the jobs cost is told, but no reason to write the report again.
        costs=lambda wildcards: list(dict.fromkeys(f"benchmarks/{run}" for run in [PLAN.main, wildcards.run])),
        code=code("report"),
    script:
        "../scripts/report.py"
