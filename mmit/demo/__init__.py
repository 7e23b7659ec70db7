"""The offline demo: a drawn world, parts made on the spot, two stages of training, and what came of it."""
