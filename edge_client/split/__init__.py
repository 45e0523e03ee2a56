"""A user of split training (`lamina.split.plan`): the low ends, the classifiers and the data of all modalities in one
process."""
