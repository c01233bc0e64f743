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
        settings=WIRING.settings("config"),
        code=code("config"),
    script:
        "../scripts/config.py"


rule report:
    input:
        WIRING.reported_files,
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
        settings=WIRING.settings("report"),
        tables=WIRING.reported,
        # What the jobs cost is told, but no reason to write the report again.
        costs=WIRING.costs,
        worked=WIRING.worked,
        code=code("report"),
    script:
        "../scripts/report.py"
