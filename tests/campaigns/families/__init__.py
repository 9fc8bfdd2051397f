"""Every family of models, each kind of fine-tune: folded alone, exported, loaded, and compared."""
