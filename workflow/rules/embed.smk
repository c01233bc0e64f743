rule embed:
    input:
        table=WIRING.embedded_table,
        model=WIRING.model("model"),
    output:
        "results/{run}/embed/{model}/{part}.parquet",
    log:
        "logs/{run}/embed.{model}.{part}.log",
    benchmark:
        "benchmarks/{run}/embed.{model}.{part}.tsv"
    # Only where `--cache` asks for it: else Snakemake would speak of it in every run.
    cache: workflow.enable_cache
    conda:
        ENVIRONMENT
    threads: HALF
    params:
        settings=WIRING.portable("embed", "model", TRAIN, "part"),
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
    cache: workflow.enable_cache
    params:
        settings=WIRING.portable("embed", "model", "benchmark", "part"),
        part="{part}",
        code=code("embed"),


# Snakemake refuses a rule that has both a benchmark and results in its cache between workflows:
# those which are taken from there have no cost.
if workflow.enable_cache:
    for name in ("embed", "embed_benchmark"):
        workflow.get_rule(name)._benchmark = None
