"""Between signatures and text: adapters write prompts and read answers.

Pure text, no model inside.
"""
