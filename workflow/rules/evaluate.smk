rule evaluate:
    input:
        WIRING.benchmark_vectors,
    output:
        "results/{run}/evaluate/{benchmark}/{judged}.run.parquet",
    log:
        "logs/{run}/evaluate.{benchmark}.{judged}.log",
    benchmark:
        "benchmarks/{run}/evaluate.{benchmark}.{judged}.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("evaluate", "benchmark", "judged"),
        code=code("evaluate"),
    script:
        "../scripts/evaluate.py"


rule metrics:
    input:
        WIRING.judged_files,
    output:
        "results/{run}/evaluate/metrics.parquet",
    log:
        "logs/{run}/metrics.log",
    benchmark:
        "benchmarks/{run}/metrics.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("metrics"),
        runs=WIRING.judged_runs,
        benchmarks=WIRING.benchmark_tables,
        code=code("metrics"),
    script:
        "../scripts/metrics.py"
