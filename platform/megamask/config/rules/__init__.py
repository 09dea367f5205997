"""Rules between the numbers of a model and of a layout: integers in, problems out."""
