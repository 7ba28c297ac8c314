"""From rows of tokens to an adapter: the training loop, its checkpoints and its record. Never writes to the hub; workflows joins the two."""
