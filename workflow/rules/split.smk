rule split:
    input:
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.made("ingest", "pairs.parquet"),
        model=WIRING.model("base"),
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
        settings=WIRING.settings("split"),
        code=code("split"),
    script:
        "../scripts/split.py"
