def mined_vectors(wildcards):
    label = PLAN.miner(wildcards.run)
    return [PLAN.path(Node(wildcards.run, "embed", (label, TRAIN, part))) for part in PLAN.parts(wildcards.run)]


def mined_lengths(wildcards):
    if PLAN.config(wildcards.run).mine.pool != "bin":
        return []
    return [PLAN.path(Node(wildcards.run, "split"), file) for file in ("lengths.parquet", "bins.parquet")]


rule mine:
    input:
        texts=made("ingest", "texts.parquet"),
        queries=made("ingest", "queries.parquet"),
        pairs=made("ingest", "pairs.parquet"),
        vectors=mined_vectors,
        lengths=mined_lengths,
    output:
        "results/{run}/mine/pairs.parquet",
    log:
        "logs/{run}/mine.log",
    benchmark:
        "benchmarks/{run}/mine.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("mine"),
        code=code("mine"),
    script:
        "../scripts/mine.py"
