"""What a stage reads: sources, lengths, plan and loader, from the run file's words."""
