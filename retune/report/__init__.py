"""Pieces of the report's page: tables in, HTML out. Know nothing of stages or of how a run is started."""
