"""Floor 5: curriculum distillation of all submodels at once, and their evaluation."""
