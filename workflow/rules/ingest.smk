rule ingest:
    input:
        WIRING.training_files,
        WIRING.excluded_files,
    output:
        texts="results/{run}/ingest/texts.parquet",
        queries="results/{run}/ingest/queries.parquet",
        pairs="results/{run}/ingest/pairs.parquet",
        rejected="results/{run}/ingest/rejected.parquet",
    log:
        "logs/{run}/ingest.log",
    benchmark:
        "benchmarks/{run}/ingest.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("ingest"),
        benchmarks=WIRING.excluded,
        code=code("ingest"),
    script:
        "../scripts/ingest.py"


rule benchmark:
    input:
        WIRING.benchmark_files,
    output:
        texts="results/{run}/ingest/{benchmark}/texts.parquet",
        queries="results/{run}/ingest/{benchmark}/queries.parquet",
        pairs="results/{run}/ingest/{benchmark}/pairs.parquet",
    log:
        "logs/{run}/ingest.{benchmark}.log",
    benchmark:
        "benchmarks/{run}/ingest.{benchmark}.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("benchmark", "benchmark"),
        code=code("benchmark"),
    script:
        "../scripts/benchmark.py"


rule leakage:
    input:
        WIRING.benchmark_table_files,
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.made("ingest", "pairs.parquet"),
    output:
        "results/{run}/ingest/leakage.parquet",
    log:
        "logs/{run}/leakage.log",
    benchmark:
        "benchmarks/{run}/leakage.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("leakage"),
        benchmarks=WIRING.benchmark_tables,
        code=code("leakage"),
    script:
        "../scripts/leakage.py"
