rule merge:
    input:
        WIRING.merged,
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
