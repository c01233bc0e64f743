rule weigh:
    input:
        models=WIRING.merged,
        examples=WIRING.weighed_examples,
        tables=WIRING.weighed_tables,
    output:
        "results/{run}/merge/weights.parquet",
    log:
        "logs/{run}/weigh.log",
    benchmark:
        "benchmarks/{run}/weigh.tsv"
    conda:
        ENVIRONMENT
    threads: SHARE
    params:
        settings=WIRING.settings("weigh"),
        aside=WIRING.weighed_aside,
        guards=WIRING.weighed_guards,
        code=code("weigh"),
    script:
        "../scripts/weigh.py"


rule merge:
    input:
        models=WIRING.merged,
        weights=WIRING.merging_weights,
    output:
        directory("results/{run}/merge/model"),
    log:
        "logs/{run}/merge.log",
    benchmark:
        "benchmarks/{run}/merge.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("merge"),
        code=code("merge"),
    script:
        "../scripts/merge.py"
