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
    conda:
        ENVIRONMENT
    threads: HALF
    params:
        settings=WIRING.settings("embed", "model", TRAIN, "part"),
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
        settings=WIRING.settings("embed", "model", "benchmark", "part"),
        part="{part}",
        code=code("embed"),
