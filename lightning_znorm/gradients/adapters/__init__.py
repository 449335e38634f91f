"""How each strategy keeps gradients: one file a strategy."""
