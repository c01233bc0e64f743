rule split:
    input:
        texts=made("ingest", "texts.parquet"),
        queries=made("ingest", "queries.parquet"),
        pairs=made("ingest", "pairs.parquet"),
        model=lambda wildcards: model_files(wildcards, "base"),
    output:
        lengths="results/{run}/split/lengths.parquet",
        bins="results/{run}/split/bins.parquet",
    log:
        "logs/{run}/split.log",
    benchmark:
        "benchmarks/{run}/split.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("split"),
        code=code("split"),
    script:
        "../scripts/split.py"
