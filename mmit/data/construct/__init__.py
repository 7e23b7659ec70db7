"""Instruction data from annotated sets: an annotation and a pool of wordings give a conversation.

    annotations.jsonl --source--> one record per (annotation, task) --instruct--> conversations --convert--> shards

``annotation`` is the form that is read, ``pools`` the wordings, ``tasks`` what can be asked of which annotation,
``boxes`` the ways to write a box.
"""
