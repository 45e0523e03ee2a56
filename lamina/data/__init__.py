"""A user's own examples become the .npz file that a device trains from, and are checked on the way.

`pack.pack` and `pack.check` are the two doors. Nothing here imports torch; pillow and tokenizers (extra `data`) are imported
when the first image or the first tokenizer file is read.
"""
