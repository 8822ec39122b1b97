"""To look at: where a model is surprised, what a file is made of, and pictures that appear while they are written."""
