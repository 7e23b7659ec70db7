"""Models: encoders, connectors, the vision-language model, and its directories on disk."""
