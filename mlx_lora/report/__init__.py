"""One self-contained HTML page of a run, an adapter or a check; adapters side by side."""
