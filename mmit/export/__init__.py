"""Export: a model in another format, opened again by that format's own reader before it counts as written."""
