"""Instruction data written by a language model, from captions and boxes as text or from the picture itself.

    annotations --prompts--> requests --client--> answers --answers--> questions and answers --journal--> records.jsonl

``records.jsonl`` is in the form that the reader ``messages`` reads, so the path ends in shards like any other.
"""
