"""Attribution methods fitted to a model and a data set."""
