localrules:
    card,


rule card:
    input:
        model=WIRING.carded_model,
        queries=WIRING.made("ingest", "queries.parquet"),
        pairs=WIRING.pairs,
        metrics=WIRING.measured,
        weights=WIRING.carded_weights,
    output:
        "results/{run}/{stage}/README.md",
    log:
        "logs/{run}/card.{stage}.log",
    benchmark:
        "benchmarks/{run}/card.{stage}.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("card", "stage"),
        code=code("card"),
    script:
        "../scripts/card.py"
