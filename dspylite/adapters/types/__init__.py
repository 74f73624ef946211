"""Types of fields that are more than text and numbers: images, files, tools, conversations.

Values only; nothing here calls a model, and nothing is fetched or read that was not asked for.
"""
