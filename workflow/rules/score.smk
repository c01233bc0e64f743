rule fit:
    input:
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.unscored_pairs,
        model=WIRING.encoder,
    output:
        model=directory("results/{run}/score/reranker"),
        history="results/{run}/score/history.parquet",
    log:
        "logs/{run}/fit.log",
    benchmark:
        "benchmarks/{run}/fit.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("fit"),
        state=lambda wildcards: f"results/{wildcards.run}/score/.state",
        code=code("fit"),
    script:
        "../scripts/fit.py"


rule score:
    input:
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.unscored_pairs,
        model=WIRING.teacher,
    output:
        "results/{run}/score/pairs.parquet",
    log:
        "logs/{run}/score.log",
    benchmark:
        "benchmarks/{run}/score.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("score"),
        code=code("score"),
    script:
        "../scripts/score.py"
