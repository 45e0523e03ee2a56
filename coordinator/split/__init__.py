"""The coordinator's half of split training (`lamina.split.plan`): it runs the high ends and the fusion net, and holds the
rounds."""
