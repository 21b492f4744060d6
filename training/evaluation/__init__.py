"""How good answers are: the table of answers and labels, metrics of each task, interpretability."""
