"""What is decided before the first round: model, plan, stages, segments."""
