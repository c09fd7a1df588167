"""Proximal policy optimization: `module` is the page to read first, every other file one of its steps."""
