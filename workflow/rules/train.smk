rule train:
    input:
        texts=made("ingest", "texts.parquet"),
        queries=made("ingest", "queries.parquet"),
        pairs=lambda wildcards: PLAN.path(PLAN.pairs(wildcards.run)),
        bins=lambda wildcards: (
            made("split", "bins.parquet")(wildcards) if PLAN.config(wildcards.run).split.drop_longer_than else []
        ),
        model=lambda wildcards: model_files(wildcards, "base"),
    output:
        model=directory("results/{run}/train/model"),
        history="results/{run}/train/history.parquet",
    log:
        "logs/{run}/train.log",
    benchmark:
        "benchmarks/{run}/train.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("train"),
        # Checkpoints lie outside the outputs, which Snakemake deletes when a job fails.
        state=lambda wildcards: f"results/{wildcards.run}/train/.state",
        code=code("train"),
    script:
        "../scripts/train.py"
