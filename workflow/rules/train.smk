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
    threads: WIRING.training_threads(SHARE)
    # How many nodes and GPUs follows from the config; all else that a job asks for is in the profile.
    resources:
        gpu=WIRING.training("gpu"),
        gres=WIRING.training("gres"),
        nodes=WIRING.training("nodes"),
        tasks=WIRING.training("tasks"),
        tasks_per_gpu=WIRING.training("tasks_per_gpu"),
        mpi=WIRING.training("mpi"),
    params:
        settings=WIRING.settings("train"),
        # Checkpoints lie outside the outputs, which Snakemake deletes when a job fails.
        state=lambda wildcards: f"results/{wildcards.run}/train/.state",
        code=code("train"),
    script:
        "../scripts/train.py"
