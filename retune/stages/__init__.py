"""One module a stage: Parquet in, Parquet or a checkpoint out. Stages never import each other."""
