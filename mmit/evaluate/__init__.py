"""Evaluation: answers and losses on held-out samples, with the true picture, a blank one, and another sample's.

    shards --questions--> asked one by one --accuracy--> exact match by question type
    shards --probes--> loss of the reference answers

What a model answers without the true picture is what it knows from the words alone; only the rest is seeing.
"""
