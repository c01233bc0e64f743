def embedded_table(wildcards):
    """The texts or queries that a part's vectors are made from."""
    collection = getattr(wildcards, "benchmark", None)
    source = Node(wildcards.run, "benchmark", (collection,)) if collection else Node(wildcards.run, "ingest")
    return PLAN.path(source, "queries.parquet" if wildcards.part == "queries" else "texts.parquet")


rule embed:
    input:
        table=embedded_table,
        model=lambda wildcards: model_files(wildcards, wildcards.model),
    output:
        "results/{run}/embed/{model}/{part}.parquet",
    log:
        "logs/{run}/embed.{model}.{part}.log",
    benchmark:
        "benchmarks/{run}/embed.{model}.{part}.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("embed", "model", TRAIN, "part"),
        part="{part}",
        code=code("embed"),
    script:
        "../scripts/embed.py"


use rule embed as embed_benchmark with:
    output:
        "results/{run}/embed/{model}/{benchmark}/{part}.parquet",
    log:
        "logs/{run}/embed.{model}.{benchmark}.{part}.log",
    benchmark:
        "benchmarks/{run}/embed.{model}.{benchmark}.{part}.tsv"
    params:
        settings=settings("embed", "model", "benchmark", "part"),
        part="{part}",
        code=code("embed"),
