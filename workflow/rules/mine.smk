rule search:
    input:
        queries=WIRING.made("ingest", "queries.parquet"),
        query_vectors=WIRING.searched_queries,
        text_vectors=WIRING.searched_texts,
        lengths=WIRING.mined_lengths,
    output:
        "results/{run}/mine/found-{shard}.parquet",
    log:
        "logs/{run}/search.{shard}.log",
    benchmark:
        "benchmarks/{run}/search.{shard}.tsv"
    conda:
        ENVIRONMENT
    threads: SHARE
    params:
        settings=WIRING.settings("search", "shard"),
        code=code("search"),
    script:
        "../scripts/search.py"


rule mine:
    input:
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.made("ingest", "pairs.parquet"),
        vectors=WIRING.mined_vectors,
        found=WIRING.found,
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
    threads: SHARE
    params:
        settings=WIRING.settings("mine"),
        code=code("mine"),
    script:
        "../scripts/mine.py"
