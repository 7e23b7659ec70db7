"""Sources: how published files are laid out and how a record of theirs becomes a conversation.

Each module has one kind of source: its options (a frozen dataclass, the keys of ``options:`` in a recipe) and
``open_...``, which gives the rows and the function that reads one. ``mmit.data.readers.READERS`` names them.
"""
