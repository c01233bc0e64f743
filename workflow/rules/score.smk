def unscored_pairs(wildcards):
    return PLAN.path(Node(wildcards.run, "mine" if PLAN.config(wildcards.run).mine else "ingest"))


def teacher(wildcards):
    reranker = PLAN.config(wildcards.run).reranker
    return [PLAN.path(Node(wildcards.run, "fit"))] if reranker.fit else weights(reranker.model)


rule fit:
    input:
        texts=made("ingest", "texts.parquet"),
        queries=made("ingest", "queries.parquet"),
        pairs=unscored_pairs,
        model=lambda wildcards: weights(PLAN.config(wildcards.run).reranker.model),
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
        settings=settings("fit"),
        state=lambda wildcards: f"results/{wildcards.run}/score/.state",
        code=code("fit"),
    script:
        "../scripts/fit.py"


rule score:
    input:
        texts=made("ingest", "texts.parquet"),
        queries=made("ingest", "queries.parquet"),
        pairs=unscored_pairs,
        model=teacher,
    output:
        "results/{run}/score/pairs.parquet",
    log:
        "logs/{run}/score.log",
    benchmark:
        "benchmarks/{run}/score.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("score"),
        code=code("score"),
    script:
        "../scripts/score.py"
