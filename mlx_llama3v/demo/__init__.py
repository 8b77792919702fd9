"""The tiny world: scenes that this project draws itself, and the small bases it trains on them.

Nothing here is used on real data; it exists so that the whole path (convert, embed, train, chat) can be
run and measured in minutes, on any machine, without downloading one weight.
"""
