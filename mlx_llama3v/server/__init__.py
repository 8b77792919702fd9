"""The OpenAI-compatible server and its page; see app.py. Needs the extra `[serve]`."""
