"""The coordinator: publishes runs, gives devices work, accepts their updates, aggregates, moves through the stages.

To read it in the data's order: `publish`, `check_in`, `updates`, `aggregate`, `aggregation`, `evaluations`; `rounds` holds
the state machine that joins them, `tables` the rows where it all stands, `app` the addresses, `serve` the process.
"""
