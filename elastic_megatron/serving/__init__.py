"""Text from a model as it will be served, any submodel of it, or one that thinks and another that answers."""
