"""Language modelling: settings, task, text, network."""
