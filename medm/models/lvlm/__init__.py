"""Vision-language models: configuration, processing, modelling, and the bridge from a recipe."""
