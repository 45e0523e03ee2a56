"""Published models and schedules, counted by `export.cost.estimate`, beside the figures that their papers give."""
