"""Published models and schedules, counted by `export.report`, beside the figures that their papers give."""
