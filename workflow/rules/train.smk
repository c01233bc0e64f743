rule train:
    input:
        texts=WIRING.made("ingest", "texts.parquet"),
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.pairs,
        bins=WIRING.bins,
        judgments=WIRING.judgments,
        model=WIRING.model("base"),
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
        settings=WIRING.settings("train"),
        # Checkpoints lie outside the outputs, which Snakemake deletes when a job fails.
        state=lambda wildcards: f"results/{wildcards.run}/train/.state",
        code=code("train"),
    script:
        "../scripts/train.py"
