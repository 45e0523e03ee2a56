"""Every method on the same data, model and rounds, federated in simulation: `make bench-methods`.

data_sets.py   the data sets with their models, dealt to clients in one of several splits
plans.py       the methods: a plan for a model
cells.py       what is run: the table of (data set, method, setting, seed)
run.py         one cell to its row of results
bounds.py      a linear model on raw values: what a method must beat to have been worth it
costs.py       FLOPs and bytes of a run
summary.py     means and spreads over seeds beside end-to-end training, as a table
plot.py        accuracy per round with the changes of stage
retrieval.py   recall at k, for contrastive models
"""
