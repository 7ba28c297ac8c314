"""From files to token rows: read a user's data, render prompts, split, tokenise and batch.

One file a step: rows (files to rows), prompt (rows to text and tokens), split (which row is for what), task (all of it as TaskData), encode
(examples to token rows with labels), batches (the order of training). Nothing here imports
torch.
"""
