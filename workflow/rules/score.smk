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
    threads: SHARE
    params:
        settings=WIRING.settings("fit"),
        state=lambda wildcards: f"results/{wildcards.run}/score/.state",
        code=code("fit"),
    script:
        "../scripts/fit.py"


rule scores:
    input:
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.unscored_pairs,
        model=WIRING.teacher,
    output:
        "results/{run}/score/scores-{shard}.parquet",
    log:
        "logs/{run}/scores.{shard}.log",
    benchmark:
        "benchmarks/{run}/scores.{shard}.tsv"
    conda:
        ENVIRONMENT
    threads: SHARE
    params:
        settings=WIRING.settings("scores", "shard"),
        shard="{shard}",
        state=lambda wildcards: f"results/{wildcards.run}/score/.scores-{wildcards.shard}",
        code=code("scores"),
    script:
        "../scripts/scores.py"


rule score:
    input:
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.unscored_pairs,
        parts=WIRING.scored_parts,
    output:
        pairs="results/{run}/score/pairs.parquet",
        counts="results/{run}/score/counts.parquet",
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
