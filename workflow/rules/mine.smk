rule mine:
    input:
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.made("ingest", "pairs.parquet"),
        vectors=WIRING.mined_vectors,
        lengths=WIRING.mined_lengths,
        teacher=WIRING.mining_teacher,
    output:
        pairs="results/{run}/mine/pairs.parquet",
        mining="results/{run}/mine/mining.parquet",
    log:
        "logs/{run}/mine.log",
    benchmark:
        "benchmarks/{run}/mine.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("mine"),
        code=code("mine"),
    script:
        "../scripts/mine.py"
