"""How the adapter learns: the loss, the step, the precision, the checkpoint."""
