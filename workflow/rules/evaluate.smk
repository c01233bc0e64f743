rule evaluate:
    input:
        WIRING.benchmark_vectors,
    output:
        "results/{run}/evaluate/{benchmark}/{model}.run.parquet",
    log:
        "logs/{run}/evaluate.{benchmark}.{model}.log",
    benchmark:
        "benchmarks/{run}/evaluate.{benchmark}.{model}.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("evaluate", "benchmark", "model"),
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
